from __future__ import annotations

import ast
import base64
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nuclio_sdk.logger import HumanReadableFormatter
from PIL import Image

from testbed.functions import ROOT, Function, micro_environment
from tests.faults.mutations import BOX, PICTURES, Judge, Spoiler, picture, shapes

CASES = 800
CHECK = settings(deadline=None, max_examples=40, derandomize=True)


@pytest.fixture(scope="module")
def micro(
    start_function: Callable[[dict[str, str]], Function],
    tmp_path_factory: pytest.TempPathFactory,
) -> Function:
    """The function in this process, with a very small model and the embedded store."""
    return start_function(micro_environment(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def tokens(micro: Function) -> list[str]:
    """The attacker's own tracks."""
    states: list[str] = micro.track(PICTURES[0], shapes(), [])["states"]
    return states


@pytest.fixture(scope="module")
def judge(micro: Function) -> Judge:
    """Looks on, and knows the tracks of somebody else."""
    return Judge(micro, set(micro.track(PICTURES[0], shapes(), [])["states"]))


def test_spoiled_requests_are_refused_or_answered_and_nothing_else(
    micro: Function, tokens: list[str], judge: Judge
) -> None:
    """A status, a reason, nobody else's data; and who had nothing to do with it notices nothing."""
    strangers = sorted(judge.strangers)
    before = micro.track(PICTURES[1], [None] * len(strangers), strangers)["shapes"]
    spoiler, by_way = Spoiler(0, tokens), Counter[str]()
    for _ in range(CASES):
        way, body = spoiler.spoiled()
        by_way[way] += 1
        judge.send(body)
    after = micro.track(PICTURES[1], [None] * len(strangers), strangers)["shapes"]

    assert min(by_way.values()) > CASES // 15
    assert {200, 400, 410, 413, 422} <= set(judge.seen)
    assert after == before


def test_requests_that_were_not_spoiled_are_answered(tokens: list[str], judge: Judge) -> None:
    """What the spoiler starts from is right: its refusals are due to what it changed."""
    spoiler = Spoiler(1, tokens)

    assert {judge.send(json.dumps(spoiler.request()).encode()) for _ in range(20)} == {200}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)


def lists_and_objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Put JSON values together."""
    return st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner)


ANY = st.recursive(LEAVES, lists_and_objects, max_leaves=12)
NUMBERS = st.lists(st.integers(-70, 70) | st.floats(-70, 70) | st.floats(), max_size=14)
SHAPES = st.fixed_dictionaries(
    {"type": st.sampled_from(["mask", "polygon", "rectangle", "ellipse"]), "points": NUMBERS}
)
FIELDS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "body": st.dictionaries(st.sampled_from(["image", "shapes", "states", "x"]), ANY, max_size=4),
    "image": st.fixed_dictionaries({"image": ANY}),
    "image text": st.fixed_dictionaries({"image": st.text(max_size=200)}),
    "image bytes": st.fixed_dictionaries(
        {"image": st.binary(max_size=300).map(lambda data: base64.b64encode(data).decode())}
    ),
    "shapes": st.fixed_dictionaries({"shapes": ANY}),
    "shape": st.fixed_dictionaries({"shapes": st.lists(ANY, min_size=1, max_size=3)}),
    "type": st.fixed_dictionaries(
        {"shapes": st.tuples(st.fixed_dictionaries({"type": ANY, "points": st.just(list(BOX))}))}
    ),
    "points": st.fixed_dictionaries({"shapes": st.lists(SHAPES, min_size=1, max_size=3)}),
    "bare points": st.fixed_dictionaries({"shapes": st.tuples(NUMBERS)}),
    "states": st.fixed_dictionaries({"states": ANY}),
    "state": st.fixed_dictionaries({"states": st.lists(ANY, min_size=1, max_size=3)}),
    "state text": st.fixed_dictionaries(
        {"states": st.tuples(st.from_regex(r"[\w.-]{40,50}", fullmatch=True))}
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_any_value_of_any_field_is_refused_or_answered(name: str, judge: Judge) -> None:
    """Whatever JSON has to say, a caller gets a status and a reason."""

    @CHECK
    @given(FIELDS[name])
    def check(changes: dict[str, Any]) -> None:
        fields = {"image": PICTURES[0], "shapes": shapes()[2:3], "states": []}
        judge.send(json.dumps(fields | changes).encode())

    check()


def test_log_cannot_be_forged(micro: Function) -> None:
    """What a caller says stays on the one line that is about it."""
    text = io.StringIO()
    micro.context.logger.set_handler("default", text, HumanReadableFormatter())
    for forged in ("\n[error] forged", "\r\n", "\u2028\x1b[31m"):
        shape = {"type": forged, "points": list(BOX)}
        micro.call({"image": PICTURES[0], "shapes": [shape], "states": []}, method=f"PUT{forged}")
        micro.call({"image": PICTURES[0], "shapes": [shape], "states": []})

    assert len(text.getvalue().splitlines()) == 6
    assert "\x1b" not in text.getvalue()


def test_picture_of_countless_scans_is_refused_before_it_is_decoded(micro: Function) -> None:
    """A progressive JPEG passes over the whole frame once a scan, and a scan has a few bytes."""
    data = base64.b64decode(picture("JPEG", progressive=True))
    last = data.rindex(b"\xff\xda")
    endless = data[:-2] + data[last:-2] * 5000 + data[-2:]
    image = base64.b64encode(endless).decode()
    status, answer = micro.call({"image": image, "shapes": [list(BOX)], "states": []})

    assert status == 413
    assert answer["error"].startswith("image has 5")
    assert "scans: at most" in answer["error"]


COUNTLESS = {
    "segments": ("JPEG", 2, b"\xff\xe4\x00\x02"),
    "filler bytes": ("JPEG", 2, b"\xff"),
    "chunks": ("PNG", 33, b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big")),
}


@pytest.mark.parametrize("part", COUNTLESS)
def test_picture_of_countless_parts_is_refused(micro: Function, part: str) -> None:
    """Each costs Pillow time, and some cost thirty times their size in memory."""
    image_format, place, data = COUNTLESS[part]
    whole = base64.b64decode(picture(image_format))
    for count, expected in ((1000, 200), (300_000, 413)):
        endless = whole[:place] + data * count + whole[place:]
        image = base64.b64encode(endless).decode()
        status, answer = micro.call({"image": image, "shapes": [list(BOX)], "states": []})

        assert status == expected
    assert answer["error"] == "image has too many parts: it takes over 200000 reads"


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG"])
def test_picture_within_the_limits_is_all_that_is_decoded(
    micro: Function, image_format: str
) -> None:
    """More frames or more pages behind the first cost nothing and change nothing."""
    first, second = Image.new("RGB", (64, 48), "teal"), Image.new("RGB", (64, 48), "olive")
    alone, more = io.BytesIO(), io.BytesIO()
    first.save(alone, image_format)
    many = image_format in {"PNG", "GIF", "TIFF", "WEBP"}
    first.save(
        more, image_format, **({"save_all": True, "append_images": [second] * 50} if many else {})
    )
    answers = [
        micro.track(base64.b64encode(data.getvalue()).decode(), [list(BOX)], [])["shapes"]
        for data in (alone, more)
    ]

    assert answers[0] == answers[1] == [list(BOX)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_bytes_are_run_as_code(path: Path) -> None:
    """Nothing unpickles, evaluates, or loads a checkpoint with more in it than tensors."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "jsonpickle", "joblib", "cloudpickle"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.partition(".")[0] for alias in node.names}
            names.add((getattr(node, "module", None) or "").partition(".")[0])
            assert not names & forbidden
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "yaml.load"}
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
