from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nuclio_sdk.logger import HumanReadableFormatter

from interaction import main as interactor_main
from testbed.drawn_frames import SIZE_HW, base64_text, jpeg_frames
from testbed.functions import Function
from tests.test_interactor_protocol import BAD

IMAGE = base64_text(jpeg_frames(1)[0])


@pytest.fixture(autouse=True)
def log(interactor: Function) -> Iterator[io.StringIO]:
    """What the interactor logs during the test."""
    text = io.StringIO()
    interactor.context.logger.set_handler("default", text, HumanReadableFormatter())
    yield text
    interactor.context.logger.set_handler("default", io.StringIO(), HumanReadableFormatter())


def click(*points: list[float], **fields: Any) -> dict[str, Any]:
    """Return a request with positive points."""
    return {"image": IMAGE, "pos_points": list(points), "neg_points": [], "obj_bbox": []} | fields


def test_click_and_box_as_cvat_sends_them(interactor: Function) -> None:
    """The answer covers the whole frame."""
    for request in (click([60, 90]), click(obj_bbox=[[30, 60], [90, 120]])):
        status, answer = interactor.call(request)

        assert status == 200
        assert (len(answer["mask"]), len(answer["mask"][0])) == SIZE_HW
        assert {pixel for row in answer["mask"] for pixel in row} <= {0, 1}
        assert 0 <= float(answer["shapes"][0]["attributes"][0]["value"]) <= 1


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "text/plain"])
def test_request_is_answered_under_any_content_type(
    interactor: Function, content_type: str
) -> None:
    """Nuclio hands over bytes then."""
    sent = json.dumps(click([60, 90])).encode()

    assert interactor.call(sent, content_type=content_type) == interactor.call(click([60, 90]))


@pytest.mark.parametrize(("sent", "reason"), BAD.values(), ids=BAD)
def test_bad_prompt_gets_400_and_one_line_of_log(
    interactor: Function, log: io.StringIO, sent: Any, reason: str
) -> None:
    """The message is the caller's and the log's."""
    status, answer = interactor.call(sent)

    assert (status, list(answer)) == (400, ["error"])
    assert re.search(reason, answer["error"])
    (line,) = log.getvalue().splitlines()
    assert "[warning] refused: {'status': 400, 'reason': " in line


@pytest.mark.parametrize(("image", "status"), [("%%%", 400), (base64_text(b"none"), 422)])
def test_image_that_is_none_is_told_apart(interactor: Function, image: str, status: int) -> None:
    """As the tracker does."""
    assert interactor.call(click([60, 90], image=image))[0] == status


def test_second_click_neither_decodes_nor_encodes(
    start_interactor: Callable[[dict[str, str]], Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only prompt encoder and mask decoder are at work."""
    replica = start_interactor({})
    replica.call(click([60, 90]))

    def unwanted(*_: object) -> None:
        raise AssertionError("the frame is known")

    monkeypatch.setattr(interactor_main, "decode_image", unwanted)
    model = replica.context.user_data.service.segmenter._model
    monkeypatch.setattr(model, "forward_image", unwanted)

    assert replica.call(click([60, 90], [50, 80]))[0] == 200
    assert replica.call(click([60, 90], neg_points=[[200, 80]]))[0] == 200
    assert replica.call(click(obj_bbox=[30, 60, 90, 120]))[0] == 200


def test_request_logs_one_line_with_what_it_did(interactor: Function, log: io.StringIO) -> None:
    """Enough to see why a click was slow."""
    frame = base64_text(jpeg_frames(2, seed=7)[1])
    interactor.call(click([60, 90], image=frame))
    interactor.call(click([60, 90], image=frame, neg_points=[[5, 5]]))
    first, second = (
        ast.literal_eval(line.partition("segmented: ")[2]) for line in log.getvalue().splitlines()
    )

    assert (first["positive"], first["negative"], first["box"]) == (1, 0, False)
    assert (first["encoded"], first["refined"]) == (True, False)
    assert (second["encoded"], second["refined"]) == (False, True)
    assert second["negative"] == 1
    assert first["ms"] > 0


def test_settings_shape_the_answer(
    start_interactor: Callable[[dict[str, str]], Function],
) -> None:
    """The form of the mask, and whether extreme points mean a box."""
    four = click([10, 50], [30, 20], [60, 45], [35, 90])
    _, usual = start_interactor({}).call(four)
    bare = start_interactor({"SAM2_INTERACTOR_MASK": "none"}).call(four)[1]
    boxed = start_interactor({"SAM2_INTERACTOR_EXTREME_POINTS": "on"}).call(four)[1]

    assert bare == {"shapes": usual["shapes"]}
    assert boxed["shapes"] != usual["shapes"]


def test_four_clicks_are_not_taken_for_a_box_by_default(
    start_interactor: Callable[[dict[str, str]], Function],
) -> None:
    """Four ordinary clicks on an object often lie like extreme points."""
    four = click([10, 50], [30, 20], [60, 45], [35, 90])
    default = start_interactor({}).call(four)
    off = start_interactor({"SAM2_INTERACTOR_EXTREME_POINTS": "off"}).call(four)

    assert default == off


def test_get_tells_the_health_and_other_methods_are_refused(interactor: Function) -> None:
    """GET answers that the model is loaded."""
    assert interactor.call(b"", "GET") == (200, {"status": "ok"})
    status, answer = interactor.call(click([60, 90]), "PUT")
    assert status == 405
    assert answer["error"] == "PUT is not served: POST segments, GET reports the health"


def test_bug_is_logged_and_its_text_stays_inside(
    interactor: Function, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain 500 for the caller, the traceback for the log."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(interactor.context.user_data.service.segmenter, "segment", fail)
    status, answer = interactor.call(click([60, 90]))

    assert status == 500
    assert answer == {"error": "internal error; the function's log has the reason"}
    assert "RuntimeError: secret detail" in log.getvalue()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SAM2_CHECKPOINT": "/none.pt"}, "/none.pt does not exist"),
        ({"SAM2_INTERACTOR_MASK": "yes"}, "SAM2_INTERACTOR_MASK='yes' is not allowed"),
        ({"SAM2_DEVICE": "cuda:99"}, "SAM2_DEVICE='cuda:99'"),
    ],
)
def test_failed_start_ends_with_one_clear_line(
    start_interactor: Callable[[dict[str, str]], Function],
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    reason: str,
) -> None:
    """The process must not run, and the log says why without a traceback."""
    with pytest.raises(SystemExit, match=r"^1$"):
        start_interactor(environment)
    (line,) = capsys.readouterr().out.splitlines()

    assert "[error] cannot start: {'reason': " in line
    assert reason in line


def test_no_store_is_needed_nor_asked(
    start_interactor: Callable[[dict[str, str]], Function], capsys: pytest.CaptureFixture[str]
) -> None:
    """CVAT's deploy script names a Redis for every function; this one does without."""
    environment = {"CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1", "CVAT_FUNCTIONS_REDIS_PORT": "1"}
    replica = start_interactor(environment)
    (ready,) = capsys.readouterr().out.splitlines()
    fields = ast.literal_eval(ready.partition("ready: ")[2])

    assert {"model", "device", "dtype", "image_size", "config", "versions"} <= set(fields)
    assert replica.call(click([60, 90]))[0] == 200
