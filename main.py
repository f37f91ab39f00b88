"""The tracker's Nuclio function: start-up, one event in, one response out.

Nuclio's Python wrapper, or `local_server.py` in its place, calls `init_context` once per worker
and then `handler` once per event.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from nuclio_sdk import Context, Event, Response
from PIL import Image

from errors import SettingsError, StateStoreUnavailableError
from images import decode_image, read_image_size
from nuclio_door import answer, start, to_json
from protocol import format_tracker_answer, parse_tracker_request
from settings import Limits, Settings
from state_store import StateStore, open_store
from tracker import Frame, Report, Tracker, build_tracker

# Longest wait at start-up for a store that does not answer yet, as when both start together.
STORE_WAIT_S = 60.0


@dataclass(frozen=True)
class TrackerService:
    """What one worker holds between events.

    Attributes:
        tracker: Computes.
        store: Holds the tracks.
        store_name: Host and port of the Redis server, or `embedded`.
        limits: Of one request.
    """

    tracker: Tracker
    store: StateStore
    store_name: str
    limits: Limits

    def describe(self) -> dict[str, str]:
        """Return what the function runs on, for the "ready" log record."""
        return self.tracker.describe() | {"store": self.store_name}

    def close(self) -> None:
        """Close the connections."""
        self.store.close()


def init_context(context: Context) -> None:
    """Read the settings, connect to the store, load the model; fill `context.user_data`.

    Raises:
        SystemExit: The function cannot start; one line of the log says why.
    """
    start(context, _build_service, packages=("sam2", "torch", "redis"))


def handler(context: Context, event: Event) -> Response:
    """Answer one event; never raises.

    POST tracks (see `protocol`); GET reports whether the store answers.
    """
    service: TrackerService = context.user_data.service
    return answer(
        context,
        event,
        serve=lambda body: _track(context, service, body),
        verb="tracks",
        check_health=service.store.ping,
    )


def _build_service(context: Context, settings: Settings) -> TrackerService:
    if settings.redis is None and str(context.worker_id or 0) != "0":
        raise SettingsError(
            "CVAT_FUNCTIONS_REDIS_HOST is not set and this is not the only worker: workers share "
            "their tracks through Redis; set the host, or numWorkers to 1"
        )
    store = open_store(settings)
    _wait_for_store(store)
    tracker = build_tracker(settings, store)
    if settings.redis is None:
        context.logger.warn_with(
            "tracks are stored in this process and end with it", missing="CVAT_FUNCTIONS_REDIS_HOST"
        )
        return TrackerService(tracker, store, "embedded", settings.limits)
    address = f"{settings.redis.host}:{settings.redis.port}"
    return TrackerService(tracker, store, address, settings.limits)


def _wait_for_store(store: StateStore) -> None:
    """Return when the store answers.

    Raises:
        StateStoreUnavailableError: It does not answer within `STORE_WAIT_S`, or refuses the log-in.
    """
    deadline = time.monotonic() + STORE_WAIT_S
    while True:
        try:
            return store.ping()
        except StateStoreUnavailableError as err:
            if not err.transient or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _track(context: Context, service: TrackerService, body: object) -> str:
    report = Report()
    with report.timed("decode"):
        request = parse_tracker_request(body, service.limits)
        size_hw = read_image_size(request.image, service.limits)
        key = hashlib.blake2b(request.image, digest_size=16).hexdigest()

    def image() -> Image.Image:
        with report.timed("decode"):
            return decode_image(request.image, service.limits)

    tracked = service.tracker.run(Frame(key, size_hw, image), request.items, report)
    context.logger.info_with("tracked", **vars(report))
    answers = [(obj.token, obj.shape, obj.lost) for obj in tracked]
    return to_json(format_tracker_answer(request, answers))
