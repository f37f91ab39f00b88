"""Owns what all Nuclio doors do alike: stop with one line, answer, hide bugs; knows no SAM 2."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nuclio_sdk import Context, Event, Response

from errors import MethodNotAllowedError, SettingsError, StateStoreUnavailableError, TrackerError


@contextmanager
def one_line_on_failure(context: Context) -> Iterator[None]:
    """Turn what must stop the start-up into one line of the log.

    Raises:
        SystemExit: A setting is wrong, weights are missing, or the store stays away.
    """
    try:
        yield
    except (SettingsError, StateStoreUnavailableError) as err:
        context.logger.error_with("cannot start", reason=str(err), cause=_cause(err))
        raise SystemExit(1) from None


def end_when_told(context: Context, close: Callable[[], None] = lambda: None) -> None:
    """Let this process close and end itself when Nuclio tells it to.

    Nuclio's wrapper calls back between two events, so the running one is answered first. It would
    then go on and read events only to throw them away, and the processor would wait for it in vain
    (`workerTerminationTimeout`) before ending; to end with status 0 is fine with the processor.

    Args:
        context: Gets the callback.
        close: Lets go of connections.
    """

    def end() -> None:
        close()
        raise SystemExit(0)

    context.platform.set_termination_callback(end)


def answer(
    context: Context,
    event: Event,
    *,
    serve: Callable[[object], str],
    verb: str,
    check_health: Callable[[], None] = lambda: None,
) -> Response:
    """Answer one event; no exception leaves.

    Args:
        context: Logs.
        event: POST is served, GET tells the health.
        serve: Turns the event's body into the answer, as JSON text.
        verb: What POST does, for those who ask otherwise.
        check_health: Returns if requests can be served.
    """
    method = (event.method or "POST").upper()
    try:
        if method == "GET":
            check_health()
            return _response(to_json({"status": "ok"}))
        if method == "POST":
            return _response(serve(event.body))
        raise MethodNotAllowedError(  # noqa: TRY301  # answered as all refusals are
            f"{method} is not served: POST {verb}, GET tells the health"
        )
    except TrackerError as err:
        context.logger.warn_with("refused", status=err.status, reason=str(err), cause=_cause(err))
        return _response(to_json({"error": str(err)}), err.status)
    except Exception:  # noqa: BLE001  # Nuclio would send the traceback to the caller
        context.logger.error_with("failed", traceback=traceback.format_exc())
        error = "internal error; the function's log has the reason"
        return _response(to_json({"error": error}), 500)


def to_json(body: dict[str, Any]) -> str:
    """Return an answer as JSON text."""
    return json.dumps(body, separators=(",", ":"))


def _cause(err: Exception) -> str | None:
    """Return what a library said behind an error of ours: for the log, not for the caller."""
    cause = err.__cause__
    return None if cause is None else f"{type(cause).__name__}: {cause}"  # redis-py's repr is mute


def _response(body: str, status: int = 200) -> Response:
    return Response(body=body, content_type="application/json", status_code=status)
