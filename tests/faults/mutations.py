"""Valid requests, seeded mutations of them, and a checker of the answers."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from shapes import Shape, ShapeType, encode_cvat_rle, shape_to_mask
from state_token import StateToken, new_id
from testbed.functions import Function

SIZE = (64, 48)
BOX = (16, 12, 40, 36)
REFUSALS = {400, 409, 410, 413, 422, 503}
TOKEN = re.compile(r"[\w-]{22}\.[\w-]{22}", re.ASCII)


def picture(image_format: str, mode: str = "RGB", shift: int = 0, **options: Any) -> str:
    """Return a small frame with a square on it, as CVAT sends it."""
    image = Image.new("RGB", SIZE, (40, 80, 60))
    ImageDraw.Draw(image).rectangle((16 + shift, 12, 40 + shift, 36), fill=(220, 180, 90))
    data = io.BytesIO()
    image.convert(mode).save(data, image_format, **options)
    return base64.b64encode(data.getvalue()).decode()


PICTURES = [
    picture("JPEG"), picture("JPEG", progressive=True), picture("JPEG", "CMYK"), picture("PNG"),
    picture("PNG", "P"), picture("PNG", "I;16"), picture("PNG", "RGBA"), picture("WEBP"),
    picture("BMP"), picture("TIFF"), picture("TIFF", compression="tiff_lzw"), picture("GIF", "P"),
]  # fmt: skip


def shapes() -> list[Any]:
    """Return one shape of each type that callers send."""
    mask = shape_to_mask(Shape(ShapeType.RECTANGLE, BOX), SIZE[::-1])
    return [
        {"type": "mask", "points": encode_cvat_rle(mask)},
        {"type": "polygon", "points": [16.5, 12, 40, 12.25, 40, 36, 16, 36]},
        {"type": "rectangle", "points": list(BOX)},
        {"type": "ellipse", "points": [28, 24, 40, 12]},
        list(BOX),
    ]


@dataclass
class Checker:
    """Sends requests to a function and checks every answer.

    Attributes:
        function: The function.
        foreign_tokens: Tokens of other tracks, which no answer may contain.
        seen: Number of answers by status.
    """

    function: Function
    foreign_tokens: set[str] = field(default_factory=set)
    seen: Counter[int] = field(default_factory=Counter)

    def send(self, body: bytes) -> int:
        """Send a body, decoded as by Nuclio and the local server; return the status.

        Raises:
            AssertionError: The answer is malformed, or has a status that no caller may get.
        """
        decoded: Any = body
        with suppress(ValueError, RecursionError):
            decoded = json.loads(body)
        with warnings.catch_warnings():  # of Pillow, which pytest makes errors
            warnings.simplefilter("ignore")
            status, answer = self.function.call(decoded)
        self.seen[status] += 1
        text = json.dumps(answer)
        assert not any(token in text for token in self.foreign_tokens), text[:300]
        if status == 200:
            self._check(decoded, answer)
        else:
            assert status in REFUSALS, (status, body[:300])
            assert list(answer) == ["error"]
            assert 10 < len(answer["error"]) < 1000
            assert "Traceback" not in text
        return status

    def _check(self, sent: dict[str, Any], answer: dict[str, Any]) -> None:
        count = max(len(sent.get("shapes") or ()), len(sent.get("states") or ()))
        assert len(answer["shapes"]) == len(answer["states"]) == count
        assert len(set(answer["states"])) == count
        assert all(TOKEN.fullmatch(token) for token in answer["states"])
        for shape in answer["shapes"]:
            points = shape["points"] if isinstance(shape, dict) else shape
            assert points is None or all(type(number) in {int, float} for number in points)


class Mutator:
    """Makes nearly valid requests from a seed.

    Args:
        seed: Seed of all random choices.
        tokens: Valid tokens.
    """

    def __init__(self, seed: int, tokens: list[str]) -> None:
        self._rng = random.Random(seed)
        self._tokens = tokens
        self.ways: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "bytes of the body": self._bytes,
            "a node of the JSON": self._node,
            "base64": self._base64,
            "bytes of the image": self._image,
            "the image's header": self._header,
            "numbers of a shape": self._points,
            "a state": self._state,
        }

    def request(self) -> dict[str, Any]:
        """Return a valid request."""
        rng = self._rng
        fields: dict[str, Any] = {"image": rng.choice(PICTURES), "shapes": [], "states": []}
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.3:
                fields["shapes"].append(None)
                fields["states"].append(rng.choice(self._tokens))
            else:
                fields["shapes"].append(rng.choice(shapes()))
                fields["states"].append(None)
        return fields

    def mutated(self) -> tuple[str, bytes]:
        """Return the name of a mutation and a body with this mutation."""
        way = self._rng.choice(list(self.ways))
        return way, self.ways[way](deepcopy(self.request()))

    def scramble(self, data: bytes, low: int = 0, high: int | None = None) -> bytes:
        """Return bytes with a few changed, deleted, inserted, repeated or cut off."""
        rng, result = self._rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            end = min(len(result), high or len(result))
            if end <= low:
                break
            index = rng.randrange(low, end)
            match rng.randrange(7):
                case 0:
                    result[index] ^= 1 << rng.randrange(8)
                case 1:
                    result[index] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                case 2:
                    del result[index : index + rng.randint(1, 8)]
                case 3:
                    result[index:index] = rng.randbytes(rng.randint(1, 8))
                case 4:
                    result[index:index] = result[index : index + rng.randint(1, 64)]
                case 5:
                    word = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 40_000))
                    size = rng.choice((2, 4))
                    result[index : index + size] = (word & (256**size - 1)).to_bytes(
                        size,
                        rng.choice(("big", "little")),
                    )
                case _:
                    if rng.random() < 0.2:
                        del result[index:]
        return bytes(result)

    def _bytes(self, fields: dict[str, Any]) -> bytes:
        if self._rng.random() < 0.7:  # the image has most of the bytes; mutate the rest more often
            fields = {name: fields[name] for name in ("shapes", "states", "image")}
            body = json.dumps(fields).encode()
            return self.scramble(body, 0, body.index(b'"image"') + 12)
        return self.scramble(json.dumps(fields).encode())

    def _node(self, fields: dict[str, Any]) -> bytes:
        rng, parents = self._rng, list[tuple[Any, Any]]()

        def visit(node: Any) -> None:
            keys = node if isinstance(node, dict) else range(len(node))
            for key in keys:
                parents.append((node, key))
                if isinstance(node[key], dict | list):
                    visit(node[key])

        visit(fields)
        for _ in range(rng.choice((1, 1, 2))):
            node, key = rng.choice(parents)
            if rng.random() < 0.2 and isinstance(node, dict):
                node.pop(key, None)
            elif isinstance(node, dict) or key < len(node):
                node[key] = self.hostile()
        return json.dumps(fields).encode()

    def hostile(self) -> Any:
        """Return a value of a wrong type or size."""
        rng = self._rng
        deep: Any = 1
        for _ in range(300):
            deep = [deep]
        return rng.choice([
            None, True, False, 0, -1, 1, 2**31, 2**63, 10**300, -(10**300), 0.5, -0.0, 1e-320,
            1e308, float("nan"), float("inf"), "", "a", "x" * 5000, "\0", "\ud800", "é" * 100,
            "../../etc/passwd", "%s%n{0}", "\r\n[error] forged line", [], {}, [[]], [None], deep,
            {"type": "mask"}, {"type": "mask", "points": [0, 1, 0, 0, 0, 0]}, [1, 2, 3, 4],
            [0] * 5000, {"type": "polygon", "points": [1e9, -1e9] * 50}, new_id(), {"": {}},
            str(StateToken(new_id(), new_id())), {"points": list(BOX)}, list(range(100)), "mask",
        ])  # fmt: skip

    def _base64(self, fields: dict[str, Any]) -> bytes:
        text = fields["image"]
        rng = self._rng
        index = rng.randrange(len(text))
        fields["image"] = rng.choice([
            text[:index], text[:index] + rng.choice("=-_ \n%é\0") + text[index:], text + "====",
            text.replace("+", "-").replace("/", "_"), "data:image/png;base64," + text, text * 2,
            text[index:], text[: index // 4 * 4], text[:index] + "A" * 4 + text[index:],
        ])  # fmt: skip
        return json.dumps(fields).encode()

    def _image(self, fields: dict[str, Any]) -> bytes:
        data = self.scramble(base64.b64decode(fields["image"]))
        return json.dumps(fields | {"image": base64.b64encode(data).decode()}).encode()

    def _header(self, fields: dict[str, Any]) -> bytes:
        data = self.scramble(base64.b64decode(fields["image"]), 0, self._rng.choice((32, 64, 256)))
        return json.dumps(fields | {"image": base64.b64encode(data).decode()}).encode()

    def _points(self, fields: dict[str, Any]) -> bytes:
        rng = self._rng
        drawn = [shape for shape in fields["shapes"] if shape]
        if not drawn:
            drawn = [rng.choice(shapes())]
            fields |= {"shapes": drawn, "states": []}
        shape = rng.choice(drawn)
        points = shape["points"] if isinstance(shape, dict) else shape
        for _ in range(rng.choice((1, 1, 2, 5))):
            if not points:
                break
            index = rng.randrange(len(points))
            match rng.randrange(6):
                case 0:
                    points[index] += rng.choice((-1, 1, 0.5, 100, -100))
                case 1:
                    points[index] = rng.choice(
                        (0, -1, 2**31, 1e9, -1e9, 1e308, 5e-324, float("nan"), 10**30, 0.1)
                    )
                case 2:
                    del points[index]
                case 3:
                    points.insert(index, rng.choice((0, 1, 7.5, -3)))
                case 4:
                    rng.shuffle(points)
                case _:
                    points *= rng.choice((0, 2, 50))
        if isinstance(shape, dict) and rng.random() < 0.2:
            shape["type"] = rng.choice(list(ShapeType))
        return json.dumps(fields).encode()

    def _state(self, fields: dict[str, Any]) -> bytes:
        rng = self._rng
        token, other = rng.choice(self._tokens), rng.choice(self._tokens)
        track, _, step = token.partition(".")
        mutated: Any = rng.choice([
            f"{track}.{other.partition('.')[2]}", f"{step}.{track}", track, f"{track}.", token * 2,
            token.swapcase(), token + "\n", token[:-1] + rng.choice("A-é*}{"),
            f"{track}}}:step:{step}", [token], {"token": token}, token.encode().hex(),
            str(StateToken(new_id(), new_id())), "",
        ])  # fmt: skip
        fields["states"] = [*fields["states"], mutated]
        rng.shuffle(fields["states"])
        return json.dumps(fields).encode()
