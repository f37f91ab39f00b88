from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nuclio_sdk.logger import HumanReadableFormatter

from errors import TrackerError
from interaction import main as interactor_main
from testbed.drawn_frames import SIZE_HW, base64_text, jpeg_frames
from testbed.functions import Function
from tests.malformed_requests import IMAGE, INTERACTOR


@pytest.fixture(scope="module")
def interactor(micro_interactor: Function) -> Function:
    """The interactor with a very small model."""
    return micro_interactor


@pytest.fixture(scope="module")
def start(
    start_interactor: Callable[[dict[str, str]], Function], micro: dict[str, str]
) -> Callable[[dict[str, str]], Function]:
    """Start the interactor with this model and further variables."""
    return lambda environment: start_interactor(micro | environment)


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
    """Nuclio decodes JSON for one content type only; for others the handler gets bytes."""
    sent = json.dumps(click([60, 90])).encode()

    assert interactor.call(sent, content_type=content_type) == interactor.call(click([60, 90]))


@pytest.mark.parametrize(("sent", "error", "reason"), INTERACTOR.values(), ids=INTERACTOR)
def test_malformed_request_is_refused(
    interactor: Function, log: io.StringIO, sent: Any, error: type[TrackerError], reason: str
) -> None:
    """The caller gets status and reason, the log has one line."""
    status, answer = interactor.call(sent)

    assert (status, list(answer)) == (error.status, ["error"])
    assert re.search(reason, answer["error"])
    (line,) = log.getvalue().splitlines()
    assert f"[warning] refused: {{'status': {status}, 'reason': " in line


def test_second_click_neither_decodes_nor_encodes(
    start: Callable[[dict[str, str]], Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the prompt encoder and the mask decoder run."""
    replica = start({})
    replica.call(click([60, 90]))

    def unwanted(*_: object) -> None:
        raise AssertionError("the frame is cached")

    monkeypatch.setattr(interactor_main, "decode_image", unwanted)
    model = replica.context.user_data.service.segmenter._model
    monkeypatch.setattr(model, "forward_image", unwanted)

    assert replica.call(click([60, 90], [50, 80]))[0] == 200
    assert replica.call(click([60, 90], neg_points=[[200, 80]]))[0] == 200
    assert replica.call(click(obj_bbox=[30, 60, 90, 120]))[0] == 200


def test_request_logs_one_line_with_what_it_did(interactor: Function, log: io.StringIO) -> None:
    """The line shows why a click was slow."""
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
    start: Callable[[dict[str, str]], Function],
) -> None:
    """The form of the mask, and whether extreme points mean a box."""
    four = click([10, 50], [30, 20], [60, 45], [35, 90])
    _, usual = start({}).call(four)
    bare = start({"SAM2_INTERACTOR_MASK": "none"}).call(four)[1]
    boxed = start({"SAM2_INTERACTOR_EXTREME_POINTS": "on"}).call(four)[1]

    assert bare == {"shapes": usual["shapes"]}
    assert boxed["shapes"] != usual["shapes"]


def test_four_clicks_are_not_taken_for_a_box_by_default(
    start: Callable[[dict[str, str]], Function],
) -> None:
    """Four ordinary clicks on an object often lie like extreme points."""
    four = click([10, 50], [30, 20], [60, 45], [35, 90])
    default = start({}).call(four)
    off = start({"SAM2_INTERACTOR_EXTREME_POINTS": "off"}).call(four)

    assert default == off


def test_get_reports_the_health_and_other_methods_are_refused(interactor: Function) -> None:
    """GET is answered if the model is loaded."""
    assert interactor.call(b"", "GET") == (200, {"status": "ok"})
    status, answer = interactor.call(click([60, 90]), "PUT")
    assert status == 405
    assert answer["error"] == "PUT is not served: POST segments, GET reports the health"


def test_bug_is_logged_and_its_text_stays_inside(
    interactor: Function, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets a plain 500, the log the traceback."""

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
def test_failed_start_ends_with_one_line(
    start: Callable[[dict[str, str]], Function],
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    reason: str,
) -> None:
    """The process exits, and the log says why without a traceback."""
    with pytest.raises(SystemExit, match=r"^1$"):
        start(environment)
    (line,) = capsys.readouterr().out.splitlines()

    assert "[error] cannot start: {'reason': " in line
    assert reason in line


def test_no_store_is_used(
    start: Callable[[dict[str, str]], Function], capsys: pytest.CaptureFixture[str]
) -> None:
    """CVAT's deploy script names a Redis for every function; the interactor ignores it."""
    environment = {"CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1", "CVAT_FUNCTIONS_REDIS_PORT": "1"}
    replica = start(environment)
    (ready,) = capsys.readouterr().out.splitlines()
    fields = ast.literal_eval(ready.partition("ready: ")[2])

    assert {"model", "device", "dtype", "image_size", "config", "versions"} <= set(fields)
    assert replica.call(click([60, 90]))[0] == 200
