from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

import images
from errors import NotAnImageError, TooLargeError, TrackerError
from images import MAX_IMAGE_READS, MAX_JPEG_SCANS, decode_image, read_image_size
from settings import Limits
from tests.malformed_requests import png_header

LIMITS = Limits()
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def colours() -> Image.Image:
    """Return a small picture of four different quarters."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30] = (250, 20, 20)
    pixels[:20, 30:] = (20, 250, 20)
    pixels[20:, :30] = (20, 20, 250)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("image_format", [*FORMATS, "MPO"])
def test_formats_of_cvat_are_decoded(image_format: str) -> None:
    """Every format that CVAT sends is decoded to RGB, within the format's loss."""
    decoded = np.asarray(decode_image(encoded(colours(), image_format), LIMITS)).astype(int)

    assert decoded.shape == (40, 60, 3)
    assert np.abs(decoded - np.asarray(colours()).astype(int)).mean() < 8


def test_every_format_is_decoded_by_a_fresh_process() -> None:
    """Pillow loads its plugins late: the first frame must not depend on earlier frames."""
    code = """
import base64, json, os, sys
from images import decode_image
from settings import Limits
for data in json.load(sys.stdin):
    if os.fork() == 0:
        print(decode_image(base64.b64decode(data), Limits()).size, flush=True)
        os._exit(0)
    os.wait()
"""
    files = [base64.b64encode(encoded(colours(), name)).decode() for name in FORMATS]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(files),
        cwd=Path(images.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines() == ["(60, 40)"] * len(FORMATS), done.stderr


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode_is_decoded(mode: str) -> None:
    """Grey, palette and transparent pictures are converted to RGB as Pillow does it."""
    image = colours().convert(mode)
    decoded = decode_image(encoded(image, "PNG"), LIMITS)

    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_with_transparency_is_decoded() -> None:
    """Pillow warns about the lost transparency; the colours are right nevertheless."""
    image = colours().quantize(8)
    decoded = decode_image(encoded(image, "PNG", transparency=bytes(range(8))), LIMITS)

    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled() -> None:
    """Medical and depth frames keep their contrast instead of being clipped to white."""
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(deep), "PNG"), LIMITS))

    np.testing.assert_array_equal(decoded, np.repeat((deep >> 8)[..., None], 3, axis=2))


def test_cmyk_jpeg_is_decoded() -> None:
    """Print colours become RGB."""
    decoded = decode_image(encoded(colours().convert("CMYK"), "JPEG", quality=95), LIMITS)

    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(colours())).mean() < 8


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 77])
def test_picture_is_turned_as_its_exif_says(image_format: str, orientation: int) -> None:
    """Shapes, and the size that is checked, refer to the turned picture that annotators see."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(colours(), image_format, exif=exif)
    red_corner = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    decoded = np.asarray(decode_image(data, LIMITS)).astype(int)

    assert decoded.shape[:2] == ((60, 40) if orientation in {5, 6, 7, 8} else (40, 60))
    assert decoded.shape[:2] == read_image_size(data, LIMITS)
    red = decoded[red_corner.get(orientation, (0, 0))]
    assert np.abs(red - (250, 20, 20)).max() < 30


def test_damaged_exif_is_ignored() -> None:
    """Cameras write malformed EXIF blocks beside valid pictures."""
    decoded = decode_image(encoded(colours(), "JPEG", exif=b"Exif\0\0garbage"), LIMITS)

    assert decoded.size == (60, 40)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_cut_off_picture_is_rejected(image_format: str, part: float) -> None:
    """Otherwise the missing part would be tracked as grey."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)

    with pytest.raises(NotAnImageError, match="image cannot be decoded"):
        decode_image(data[: int(len(data) * part)], LIMITS)


@pytest.mark.parametrize(
    "data",
    [b"", b"<svg/>", png_header(0, 0), encoded(colours(), "PPM"), encoded(colours(), "TGA")],
    ids=["nothing", "svg", "no pixels", "ppm", "tga"],
)
def test_other_files_are_rejected(data: bytes) -> None:
    """Pillow's rarer formats are not decoded either."""
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
def test_image_bomb_is_rejected_by_its_header(
    size: tuple[int, int], limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file that announces a huge picture is not decoded and takes no memory."""
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
    """Landscape or portrait; with a limit that is smaller by one it is rejected."""
    picture = colours().transpose(turn)
    data = encoded(picture, "PNG")
    enough, less = Limits(**{limit: largest}), Limits(**{limit: largest - 1})

    assert read_image_size(data, enough) == picture.size[::-1]
    assert decode_image(data, enough).size == picture.size
    for function in (read_image_size, decode_image):
        with pytest.raises(TooLargeError, match="pixels: at most"):
            function(data, less)


def test_jpeg_may_have_as_many_scans_as_the_limit() -> None:
    """One scan more is rejected."""
    data = encoded(colours(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    few = data.count(b"\xff\xda")
    most = data[:-2] + data[last:-2] * (MAX_JPEG_SCANS - few)

    assert read_image_size(most + data[-2:], LIMITS) == (40, 60)
    with pytest.raises(TooLargeError, match=f"image has {MAX_JPEG_SCANS + 1} scans"):
        read_image_size(most + data[last:], LIMITS)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it finds odd
def test_damaged_picture_is_decoded_or_rejected(image_format: str) -> None:
    """Whatever bytes change, the result is a picture or an error with a status."""
    data = encoded(colours(), image_format)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for index in rng.integers(0, len(data), 3):
            damaged[index] = rng.integers(0, 256)
        try:
            decoded = decode_image(bytes(damaged), Limits(image_pixels=100_000))
        except TrackerError:
            continue

        assert decoded.mode == "RGB"


COUNTLESS = {
    "segments": ("JPEG", 2, b"\xff\xe4\x00\x02"),
    "filler bytes": ("JPEG", 2, b"\xff"),
    "chunks": ("PNG", 33, b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big")),
}


@pytest.mark.parametrize(("image_format", "offset", "part"), COUNTLESS.values(), ids=COUNTLESS)
def test_image_of_countless_parts_is_rejected(image_format: str, offset: int, part: bytes) -> None:
    """Each part costs Pillow time, and some take thirty times their size in memory."""
    data = encoded(colours(), image_format)
    few, countless = (data[:offset] + part * count + data[offset:] for count in (1000, 300_000))

    assert decode_image(few, LIMITS).size == (60, 40)
    with pytest.raises(TooLargeError, match=f"too many parts: it takes over {MAX_IMAGE_READS} re"):
        decode_image(countless, LIMITS)


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "TIFF", "WEBP"])
def test_only_the_first_picture_of_a_file_is_decoded(image_format: str) -> None:
    """Further frames or pages change nothing."""
    pages = {"save_all": True, "append_images": [Image.new("RGB", (60, 40))] * 50}
    alone = encoded(colours(), image_format, lossless=True)
    first_of_many = encoded(colours(), image_format, lossless=True, **pages)

    assert len(first_of_many) > len(alone)
    np.testing.assert_array_equal(
        np.asarray(decode_image(first_of_many, LIMITS)), np.asarray(decode_image(alone, LIMITS))
    )
