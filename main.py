"""Nuclio's door: start-up, one event in, one response out; knows nothing of tracking itself.

`init_context` runs once per worker before it takes events, `handler` once per event. Both are
called by Nuclio's Python wrapper, and by `local_server.py` in the same way.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from importlib.metadata import version

import torch
from nuclio_sdk import Context, Event, Response
from PIL import Image

from errors import SettingsError, StateStoreUnavailableError
from images import decode_image, read_image_size
from nuclio_door import answer, end_when_told, one_line_on_failure, to_json
from protocol import format_tracker_answer, parse_tracker_request
from settings import Limits, Settings
from state_store import StateStore, open_store
from tracker import Frame, Report, Tracker, build_tracker

# A store that restarts beside us is waited for; one that is not there stops us with a clear line.
STORE_PATIENCE_S = 60.0


@dataclass(frozen=True)
class TrackerService:
    """What one worker holds between events."""

    tracker: Tracker
    store: StateStore
    limits: Limits


def init_context(context: Context) -> None:
    """Read the settings, load and warm the model, reach the store; fill `context.user_data`.

    Raises:
        SystemExit: The function must not start; one line of the log says why.
    """
    with one_line_on_failure(context):
        context.user_data.service = _start_up(context)


def handler(context: Context, event: Event) -> Response:
    """Answer one event; no exception leaves.

    POST tracks (PROTOCOL: CVAT's tracker call). GET tells whether model and store are ready.
    """
    service: TrackerService = context.user_data.service
    return answer(
        context,
        event,
        serve=lambda body: _track(context, service, body),
        verb="tracks",
        check_health=service.store.ping,
    )


def _start_up(context: Context) -> TrackerService:
    settings = Settings.from_env(os.environ)
    if settings.redis is None and str(context.worker_id or 0) != "0":
        raise SettingsError(
            "CVAT_FUNCTIONS_REDIS_HOST is not set and this is not the only worker: workers share "
            "their tracks through Redis; set the host, or numWorkers to 1"
        )
    store = open_store(settings)
    _wait_for(store)
    end_when_told(context, store.close)
    tracker = build_tracker(settings, store)
    if settings.redis is None:
        context.logger.warn_with(
            "tracks live in this process and end with it", missing="CVAT_FUNCTIONS_REDIS_HOST"
        )
    context.logger.info_with(
        "ready",
        **tracker.describe(),
        config=settings.config or settings.model_id,
        store="embedded"
        if settings.redis is None
        else f"{settings.redis.host}:{settings.redis.port}",
        versions={name: version(name) for name in ("sam2", "torch", "redis")},
        threads=torch.get_num_threads(),
    )
    return TrackerService(tracker, store, settings.limits)


def _wait_for(store: StateStore) -> None:
    """Return when the store answers.

    Raises:
        StateStoreUnavailableError: It stays away, or refuses us, which waiting does not change.
    """
    deadline = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            return store.ping()
        except StateStoreUnavailableError as err:
            if not err.may_pass or time.monotonic() > deadline:
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

    frame = Frame(key, size_hw, image)
    found = service.tracker.run(frame, request.items, report)
    context.logger.info_with("tracked", **vars(report))
    answers = [(one.token, one.shape, one.lost) for one in found]
    return to_json(format_tracker_answer(request, answers))
