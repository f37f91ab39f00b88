from __future__ import annotations

import ast
import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nuclio_sdk.logger import HumanReadableFormatter

from testbed.functions import ROOT, Function
from tests.faults.mutations import BOX, PICTURES, Checker, Mutator, shapes

CASES = 400  # `make soak` sends 20 000
CHECK = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.fixture(scope="module")
def function(embedded_function: Function) -> Function:
    """The tracker with a very small model and the embedded store."""
    return embedded_function


@pytest.fixture(scope="module")
def tokens(function: Function) -> list[str]:
    """Tokens of the attacker's own tracks."""
    states: list[str] = function.track(PICTURES[0], shapes(), [])["states"]
    return states


@pytest.fixture(scope="module")
def checker(function: Function) -> Checker:
    """Checks every answer, also for the tokens of somebody else's tracks."""
    return Checker(function, set(function.track(PICTURES[0], shapes(), [])["states"]))


def test_mutated_requests_are_answered_or_refused(
    function: Function, tokens: list[str], checker: Checker
) -> None:
    """With a status and a reason, and without the data of other tracks, which do not change."""
    foreign_tokens = sorted(checker.foreign_tokens)
    before = function.track(PICTURES[1], [None] * len(foreign_tokens), foreign_tokens)["shapes"]
    mutator, by_way = Mutator(0, tokens), Counter[str]()
    for _ in range(CASES):
        way, body = mutator.mutated()
        by_way[way] += 1
        checker.send(body)
    after = function.track(PICTURES[1], [None] * len(foreign_tokens), foreign_tokens)["shapes"]

    assert min(by_way.values()) > CASES // 15
    assert {200, 400, 410, 413, 422} <= set(checker.seen)
    assert after == before


def test_requests_before_the_mutation_are_answered(tokens: list[str], checker: Checker) -> None:
    """The refusals are due to the mutations."""
    mutator = Mutator(1, tokens)

    assert {checker.send(json.dumps(mutator.request()).encode()) for _ in range(20)} == {200}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)


def lists_and_objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Combine JSON values."""
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
def test_any_value_of_any_field_is_refused_or_answered(name: str, checker: Checker) -> None:
    """Any JSON value gets a status and a reason."""

    @CHECK
    @given(FIELDS[name])
    def check(changes: dict[str, Any]) -> None:
        fields = {"image": PICTURES[0], "shapes": shapes()[2:3], "states": []}
        checker.send(json.dumps(fields | changes).encode())

    check()


def test_log_cannot_be_forged(function: Function) -> None:
    """A caller's text cannot add lines or control characters."""
    text = io.StringIO()
    function.context.logger.set_handler("default", text, HumanReadableFormatter())
    for forged in ("\n[error] forged", "\r\n", "\u2028\x1b[31m"):
        shape = {"type": forged, "points": list(BOX)}
        function.call(
            {"image": PICTURES[0], "shapes": [shape], "states": []}, method=f"PUT{forged}"
        )
        function.call({"image": PICTURES[0], "shapes": [shape], "states": []})

    assert len(text.getvalue().splitlines()) == 6
    assert "\x1b" not in text.getvalue()


def test_no_module_runs_data_as_code() -> None:
    """Nothing unpickles or evaluates, and checkpoints are loaded as tensors only."""
    folders = ["", "interaction", "agent", "clips", "cvat_task"]
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert len(paths) > 30
    for path in paths:
        check_for_code(path)


def check_for_code(path: Path) -> None:
    """Raise AssertionError if a module can run data as code."""
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
