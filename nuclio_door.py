"""What all Nuclio functions share: start-up, termination, answers and error handling."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Protocol

import torch
from nuclio_sdk import Context, Event, Response

from errors import MethodNotAllowedError, SettingsError, StateStoreUnavailableError, TrackerError
from settings import Settings


class Service(Protocol):
    """What one worker holds between events, in `context.user_data.service`."""

    def describe(self) -> Mapping[str, str]:
        """Return what the function runs on, for the "ready" log record."""

    def close(self) -> None:
        """Close the connections."""


def start(
    context: Context,
    build_service: Callable[[Context, Settings], Service],
    *,
    packages: Sequence[str],
) -> None:
    """Start a function: read the settings, build its service, log "ready".

    Args:
        context: Its `user_data.service` is set; its termination callback ends the process.
        build_service: Loads the model and connects to what the function needs.
        packages: Names of the packages whose versions are logged.

    Raises:
        SystemExit: A setting is wrong, weights are missing, or the store is unavailable; the log
            has one line with the reason.
    """
    with _exit_on_failure(context):
        settings = Settings.from_env(os.environ)
        service = build_service(context, settings)
    _exit_on_termination(context, service)
    context.logger.info_with(
        "ready",
        **service.describe(),
        config=settings.config or settings.model_id,
        versions={name: version(name) for name in packages},
        threads=torch.get_num_threads(),
    )
    context.user_data.service = service


def answer(
    context: Context,
    event: Event,
    *,
    serve: Callable[[object], str],
    verb: str,
    check_health: Callable[[], None] = lambda: None,
) -> Response:
    """Answer one event; never raises.

    Args:
        context: Its logger gets refusals and failures.
        event: POST is served, GET reports the health.
        serve: Turns the event's body into the answer, as JSON text.
        verb: What POST does, for the answer to other methods.
        check_health: Raises a TrackerError if requests cannot be served.
    """
    method = (event.method or "POST").upper()
    try:
        if method == "GET":
            check_health()
            return _response(to_json({"status": "ok"}))
        if method == "POST":
            return _response(serve(event.body))
        raise MethodNotAllowedError(  # noqa: TRY301  # answered like every other refusal
            f"{method} is not served: POST {verb}, GET reports the health"
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


@contextmanager
def _exit_on_failure(context: Context) -> Iterator[None]:
    """Log an error that prevents the start as one line, and exit."""
    try:
        yield
    except (SettingsError, StateStoreUnavailableError) as err:
        context.logger.error_with("cannot start", reason=str(err), cause=_cause(err))
        raise SystemExit(1) from None


def _exit_on_termination(context: Context, service: Service) -> None:
    """Let this process close its connections and exit when Nuclio terminates the worker.

    Nuclio's wrapper calls back between two events, so a running event is answered first. Without
    an exit the wrapper would go on and discard events, and the processor would wait for the full
    `workerTerminationTimeout`. The processor takes only exit status 0 for a regular end.
    """

    def terminate() -> None:
        service.close()
        raise SystemExit(0)

    context.platform.set_termination_callback(terminate)


def _cause(err: Exception) -> str | None:
    """Return the error of a library behind an error of ours: for the log, not for the caller."""
    cause = err.__cause__
    return None if cause is None else f"{type(cause).__name__}: {cause}"


def _response(body: str, status: int = 200) -> Response:
    return Response(body=body, content_type="application/json", status_code=status)
