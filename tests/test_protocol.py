from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

import protocol
from errors import BadRequestError, NotAnImageError, TooLargeError, TrackerError
from images import MAX_JPEG_SCANS, decode_image, read_image_size
from object_requests import Continue, Start
from protocol import TrackerRequest, format_tracker_answer, parse_tracker_request
from settings import Limits
from shapes import Shape, ShapeType
from state_token import StateToken, new_id

LIMITS = Limits()
TOKEN = StateToken(new_id(), new_id())
STATE = str(TOKEN)
IMAGE = base64.b64encode(b"picture").decode()
POLYGON: dict[str, Any] = {"type": "polygon", "points": [0, 0, 9, 0, 9, 9]}
BARE = [1, 2, 30, 40]

RECTANGLE_ITEM = Start(Shape(ShapeType.RECTANGLE, BARE))
POLYGON_ITEM = Start(Shape(ShapeType.POLYGON, POLYGON["points"]))
NEXT = Continue(TOKEN)


def parse(limits: Limits = LIMITS, **fields: Any) -> TrackerRequest:
    """Read a request with a picture, as the dict that Nuclio hands over."""
    return parse_tracker_request({"image": IMAGE} | fields, limits)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Return the file of a picture."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def colours() -> Image.Image:
    """Return a small picture whose four quarters differ."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30] = (250, 20, 20)
    pixels[:20, 30:] = (20, 250, 20)
    pixels[20:, :30] = (20, 20, 250)
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that announces a size and holds next to nothing."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


# What the callers of PROTOCOL.md send, and what is to be done: (shapes, states), items, bare
CALLS: list[tuple[dict[str, Any], list[Start | Continue], list[bool]]] = [
    ({"shapes": [POLYGON], "states": []}, [POLYGON_ITEM], [False]),
    ({"shapes": [POLYGON]}, [POLYGON_ITEM], [False]),
    ({"shapes": [POLYGON], "states": None}, [POLYGON_ITEM], [False]),
    ({"shapes": [None, None], "states": [STATE, STATE]}, [NEXT, NEXT], [False, False]),
    ({"shapes": [], "states": [STATE]}, [NEXT], [False]),
    ({"states": [STATE]}, [NEXT], [False]),
    ({"shapes": [BARE], "states": []}, [RECTANGLE_ITEM], [True]),
    ({"shapes": [BARE], "states": [None]}, [RECTANGLE_ITEM], [True]),
    ({"shapes": [BARE, BARE], "states": [STATE, STATE]}, [NEXT, NEXT], [True, True]),
    (
        {"shapes": [BARE, POLYGON, None, POLYGON, BARE], "states": [STATE, None, STATE, STATE]},
        [NEXT, POLYGON_ITEM, NEXT, NEXT, RECTANGLE_ITEM],
        [True, False, False, False, True],
    ),
    ({"shapes": [POLYGON], "states": [], "threshold": 1, "x": {}}, [POLYGON_ITEM], [False]),
]


@pytest.mark.parametrize(("fields", "items", "bare"), CALLS)
def test_every_callers_request_is_understood(
    fields: dict[str, Any], items: list[Start | Continue], bare: list[bool]
) -> None:
    """A state continues a track, else the shape starts one; dict, bytes and bytearray alike."""
    text = json.dumps({"image": IMAGE} | fields).encode()

    expected = TrackerRequest(b"picture", tuple(items), tuple(bare))
    assert parse(**fields) == expected
    assert parse_tracker_request(text, LIMITS) == expected
    assert parse_tracker_request(bytearray(text), LIMITS) == expected


def test_answer_has_the_form_of_the_question() -> None:
    """Bare boxes are answered bare, shapes as objects, a lost object as null; order is kept.

    A lost rectangle keeps its box and says so where there is room to.
    """
    request = TrackerRequest(b"", (NEXT,) * 5, (True, False, False, True, False))
    box = Shape(ShapeType.RECTANGLE, (1.0, 2.0, 3.0, 4.0))
    answer = format_tracker_answer(
        request,
        [
            (TOKEN, box, True),
            (TOKEN, box, False),
            (TOKEN, None, True),
            (TOKEN, None, True),
            (TOKEN, box, True),
        ],
    )

    assert json.loads(json.dumps(answer)) == {
        "shapes": [
            [1.0, 2.0, 3.0, 4.0],
            {"type": "rectangle", "points": [1.0, 2.0, 3.0, 4.0]},
            None,
            None,
            {"type": "rectangle", "points": [1.0, 2.0, 3.0, 4.0], "outside": True},
        ],
        "states": [STATE] * 5,
    }


WRONG_BODIES: list[tuple[Any, str]] = [
    (b"", "body is not JSON"),
    (b"{", "body is not JSON"),
    (b"\xff\xfe\x00", "body is not JSON"),
    (b"[" * 100_000, "body is not JSON"),
    (b'{"image": ' + b"[" * 5000 + b"]" * 5000 + b"}", "body is not JSON"),
    (b"[1" + b"0" * 5000 + b"]", "body is not JSON"),
    (b"[]", "must be a JSON object with image, shapes and states, not list"),
    (b"NaN", "not float"),
    ("text", "not str"),
    (7, "not int"),
    (None, "not NoneType"),
    ({}, "nothing to track: shapes and states are both empty"),
    ({"shapes": {}}, "shapes must be a list, not dict"),
    ({"states": "abc"}, "states must be a list, not str"),
    ({"shapes": 0}, "shapes must be a list, not int"),
    ({"shapes": [POLYGON]}, "image is missing: expected a base64 string"),
    ({"shapes": [POLYGON], "image": ""}, "image is missing"),
    ({"shapes": [POLYGON], "image": [1]}, "image is missing"),
    ({"shapes": [POLYGON], "image": "####"}, "image is not base64"),
    ({"shapes": [POLYGON], "image": "AAA"}, "image is not base64"),
    ({"shapes": [POLYGON], "image": "AA\nAA"}, "image is not base64"),
    ({"shapes": [POLYGON], "image": "ÄÄÄÄ"}, "image is not base64"),
    ({"shapes": [POLYGON], "image": "\ud800AAA"}, "image is not base64"),
    ({"shapes": [POLYGON], "image": "data:image/png;base64,AAAA"}, "image is not base64"),
]
WRONG_ITEMS: list[tuple[dict[str, Any], str]] = [
    ({"shapes": [None]}, r"^shapes\[0\] and states\[0\] are both missing"),
    ({"shapes": [BARE, None], "states": [STATE, None]}, r"^shapes\[1\] and states\[1\] are both"),
    ({"shapes": [BARE, 5]}, r"^shapes\[1\]: a shape must be an object, not int"),
    ({"shapes": ["mask"]}, r"^shapes\[0\]: a shape must be an object, not str"),
    ({"shapes": [{}]}, r"type must be one of mask, polygon, rectangle, ellipse, not None"),
    ({"shapes": [POLYGON | {"type": "skeleton"}]}, r"not 'skeleton'"),
    ({"shapes": [POLYGON | {"type": "MASK"}]}, r"not 'MASK'"),
    ({"shapes": [POLYGON | {"type": ["mask"]}]}, r"not \['mask'\]"),
    ({"shapes": [POLYGON | {"type": "\ud800" * 99}]}, r"not .(\\ud800)+.*\.\.\..*\\ud800.$"),
    ({"shapes": [{"type": "mask"}]}, r"^shapes\[0\]: points must be a flat list of numbers"),
    ({"shapes": [{"type": "mask", "points": "1,2"}]}, r"points must be a flat list"),
    ({"shapes": [{"type": "mask", "points": {}}]}, r"points must be a flat list"),
    ({"states": ["abc"]}, r"^states\[0\]: it is no state token"),
    ({"states": [STATE, 0]}, r"^states\[1\]: it is no state token"),
    ({"states": [False]}, r"^states\[0\]: it is no state token"),
    ({"states": [{"key": 1}]}, r"^states\[0\]: it is no state token"),
]


@pytest.mark.parametrize(("body", "reason"), WRONG_BODIES)
def test_malformed_body_is_refused(body: object, reason: str) -> None:
    """Whatever arrives in place of a request is a bad request with a reason."""
    with pytest.raises(BadRequestError, match=reason):
        parse_tracker_request(body, LIMITS)


@pytest.mark.parametrize(("fields", "reason"), WRONG_ITEMS)
def test_malformed_item_is_refused_by_its_place(fields: dict[str, Any], reason: str) -> None:
    """The reason begins with the part of the request it is about."""
    with pytest.raises(BadRequestError, match=reason):
        parse(**fields)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_deep_nesting_is_a_bad_request_at_every_depth(depth: int) -> None:
    """Neither the parser nor the words of the refusal run out of stack."""
    nested = b"[" * depth + b"]" * depth
    body = b'{"image": "AAAA", "shapes": [{"type": ' + nested + b', "points": []}]}'

    with pytest.raises(BadRequestError, match=r"type must be one of|body is not JSON"):
        parse_tracker_request(body, LIMITS)


@pytest.mark.parametrize(
    ("limits", "fields", "reason"),
    [
        (Limits(objects=2), {"shapes": [POLYGON] * 3}, "3 objects in one request: at most 2"),
        (Limits(objects=2), {"states": [STATE] * 3}, "3 objects in one request: at most 2"),
        (Limits(polygon_points=3), {"shapes": [POLYGON, {"type": "polygon", "points": [0] * 8}]},
         r"^shapes\[1\]: polygon has 8 numbers: at most 6"),
        (Limits(polygon_points=3), {"shapes": [[0] * 7]}, "rectangle has 7 numbers: at most 6"),
        (Limits(mask_runs=3), {"shapes": [{"type": "mask", "points": [0] * 8}]},
         r"^shapes\[0\]: mask has 8 numbers: at most 7"),
        (Limits(body_bytes=7), {"shapes": [POLYGON]}, "image has 12 characters: at most 7"),
    ],
)  # fmt: skip
def test_limit_is_kept(limits: Limits, fields: dict[str, Any], reason: str) -> None:
    """What is too large is refused with what is allowed, even inside a decoded body."""
    with pytest.raises(TooLargeError, match=reason):
        parse(limits, **fields)


def test_what_just_fits_is_taken() -> None:
    """A limit is the largest that is allowed."""
    body = json.dumps({"image": IMAGE, "shapes": [POLYGON]}).encode()
    limits = Limits(body_bytes=len(body), polygon_points=3, objects=1)

    assert parse_tracker_request(body, limits).items == (POLYGON_ITEM,)


@pytest.mark.parametrize(
    ("limit", "largest", "fields"),
    [
        ("objects", 2, {"shapes": [POLYGON] * 2}),
        ("objects", 2, {"states": [STATE] * 2}),
        ("polygon_points", 3, {"shapes": [POLYGON]}),
        ("mask_runs", 3, {"shapes": [{"type": "mask", "points": [1, 1, 1, 0, 0, 2, 0]}]}),
        ("body_bytes", len(IMAGE), {"shapes": [POLYGON]}),
    ],
)
def test_limit_is_the_largest_that_is_allowed(
    limit: str, largest: int, fields: dict[str, Any]
) -> None:
    """Under a limit that is smaller by one the same request is refused."""
    assert parse(Limits(**{limit: largest}), **fields).items

    with pytest.raises(TooLargeError, match="at most"):
        parse(Limits(**{limit: largest - 1}), **fields)


def test_large_body_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size counts first: nothing reads the JSON of a body beyond the limit."""
    monkeypatch.delattr("json.loads")

    with pytest.raises(TooLargeError, match="body has 1001 bytes: at most 1000 are allowed"):
        parse_tracker_request(bytes(1001), Limits(body_bytes=1000))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "MPO"])
def test_formats_of_cvat_are_decoded(image_format: str) -> None:
    """What CVAT sends as frames comes out as RGB, within what the format's loss allows."""
    found = np.asarray(decode_image(encoded(colours(), image_format), LIMITS)).astype(int)

    assert found.shape == (40, 60, 3)
    assert np.abs(found - np.asarray(colours()).astype(int)).mean() < 8


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_format_is_decoded_by_a_fresh_process(image_format: str) -> None:
    """Pillow loads its plugins late; the first frame of a process must not depend on others."""
    code = (
        "import sys; from protocol import decode_image; from settings import Limits;"
        "print(decode_image(sys.stdin.buffer.read(), Limits()).size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=encoded(colours(), image_format),
        cwd=Path(protocol.__file__).parent,
        capture_output=True,
        check=True,
    )

    assert done.stdout.strip() == b"(60, 40)"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode_is_decoded(mode: str) -> None:
    """Grey, palette and transparent pictures become what Pillow calls their RGB."""
    image = colours().convert(mode)
    found = decode_image(encoded(image, "PNG"), LIMITS)

    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_with_transparency_is_decoded() -> None:
    """Pillow warns about the lost transparency; the colours are right all the same."""
    image = colours().quantize(8)
    found = decode_image(encoded(image, "PNG", transparency=bytes(range(8))), LIMITS)

    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled() -> None:
    """Medical and depth frames keep their contrast instead of being clipped to white."""
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    found = np.asarray(decode_image(encoded(Image.fromarray(deep), "PNG"), LIMITS))

    np.testing.assert_array_equal(found, np.repeat((deep >> 8)[..., None], 3, axis=2))


def test_cmyk_jpeg_is_decoded() -> None:
    """Print colours become RGB."""
    found = decode_image(encoded(colours().convert("CMYK"), "JPEG", quality=95), LIMITS)

    assert found.mode == "RGB"
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(colours())).mean() < 8


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 77])
def test_picture_is_turned_as_its_exif_says(image_format: str, orientation: int) -> None:
    """Annotators see the turned picture: the shapes, and the size that is checked, are its own."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(colours(), image_format, exif=exif)
    red_corner = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    found = np.asarray(decode_image(data, LIMITS)).astype(int)

    assert found.shape[:2] == ((60, 40) if orientation in {5, 6, 7, 8} else (40, 60))
    assert found.shape[:2] == read_image_size(data, LIMITS)
    red = found[red_corner.get(orientation, (0, 0))]
    assert np.abs(red - (250, 20, 20)).max() < 30


def test_damaged_exif_does_not_spoil_the_picture() -> None:
    """Cameras write strange EXIF blocks; the frame is what counts."""
    found = decode_image(encoded(colours(), "JPEG", exif=b"Exif\0\0garbage"), LIMITS)

    assert found.size == (60, 40)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_cut_off_picture_is_refused(image_format: str, part: float) -> None:
    """Half a frame would be tracked on grey: it is refused instead."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)

    with pytest.raises(NotAnImageError, match="image cannot be decoded"):
        decode_image(data[: int(len(data) * part)], LIMITS)


@pytest.mark.parametrize(
    "data",
    [b"", b"<svg/>", png_header(0, 0), encoded(colours(), "PPM"), encoded(colours(), "TGA")],
    ids=["nothing", "svg", "no pixels", "ppm", "tga"],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    """Other files, and Pillow's rarer formats, are not decoded."""
    with pytest.raises(NotAnImageError, match=r"expected one of JPEG, PNG, WEBP, BMP, TIFF, GIF"):
        decode_image(data, LIMITS)


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        ((30_000, 30_000), LIMITS),
        ((16_385, 1), LIMITS),
        ((1, 16_385), LIMITS),
        ((2**31 - 1, 2**31 - 1), LIMITS),
        ((60, 40), Limits(image_pixels=2399)),
    ],
)
def test_image_bomb_is_refused_by_its_header(
    size: tuple[int, int], limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file that announces a huge picture is never decoded and costs no memory."""
    loads: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", loads.append)
    data = png_header(*size)
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match=rf"image has {size[0]} x {size[1]} pixels"):
            decode_image(data, limits)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert not loads
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize(("limit", "largest"), [("image_pixels", 60 * 40), ("image_side", 60)])
@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90])
def test_picture_may_be_as_large_as_the_limit(
    limit: str, largest: int, turn: Image.Transpose
) -> None:
    """Lying or upright; under a limit that is smaller by one it is refused."""
    picture = colours().transpose(turn)
    data = encoded(picture, "PNG")
    enough, less = Limits(**{limit: largest}), Limits(**{limit: largest - 1})

    assert read_image_size(data, enough) == picture.size[::-1]
    assert decode_image(data, enough).size == picture.size
    for refusing in (read_image_size, decode_image):
        with pytest.raises(TooLargeError, match="pixels: at most"):
            refusing(data, less)


def test_jpeg_may_have_as_many_scans_as_the_limit() -> None:
    """One more is refused."""
    data = encoded(colours(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    few = data.count(b"\xff\xda")
    most = data[:-2] + data[last:-2] * (MAX_JPEG_SCANS - few)

    assert read_image_size(most + data[-2:], LIMITS) == (40, 60)
    with pytest.raises(TooLargeError, match=f"image has {MAX_JPEG_SCANS + 1} scans"):
        read_image_size(most + data[last:], LIMITS)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it finds odd
def test_damaged_picture_never_fails_otherwise(image_format: str) -> None:
    """Whatever bytes change, it is a picture or an error that a caller can be told."""
    data = encoded(colours(), image_format)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            found = decode_image(bytes(damaged), Limits(image_pixels=100_000))
        except TrackerError:
            continue

        assert found.mode == "RGB"


def test_modules_without_a_model_need_no_torch() -> None:
    """Shapes, settings, protocol and stores can be used and tested where torch is not installed."""
    modules = ["errors", "settings", "shapes", "state_token", "protocol", "state_store"]
    code = f"""
import importlib, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "sam2", "safetensors"):
            raise ImportError("forbidden: " + name)
sys.meta_path.insert(0, Forbid())
for name in {modules} + ["tests.test_" + name for name in {modules}] + ["tests.conftest"]:
    importlib.import_module(name)
print("free")
"""
    root = Path(protocol.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )

    assert done.stdout.strip() == "free", done.stderr
