"""The interactor's Nuclio function: start-up, one event in, one response out.

Nuclio's Python wrapper, or `local_server.py` in its place, calls `init_context` once per worker
and then `handler` once per event. There is no store: a worker only has caches.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from nuclio_sdk import Context, Event, Response

from images import decode_image
from interaction.protocol import format_interactor_answer, parse_interactor_request
from interaction.segmenter import Segmenter, build_segmenter
from nuclio_door import answer, start
from settings import InteractorSettings, Limits, Settings


@dataclass(frozen=True)
class InteractorService:
    """What one worker holds between events."""

    segmenter: Segmenter
    limits: Limits
    options: InteractorSettings

    def describe(self) -> dict[str, str]:
        """Return what the function runs on, for the "ready" log record."""
        return self.segmenter.describe()

    def close(self) -> None:
        """Return: there are no connections."""


def init_context(context: Context) -> None:
    """Read the settings, load and warm the model; fill `context.user_data`.

    Raises:
        SystemExit: The function cannot start; one line of the log says why.
    """
    start(context, _build_service, packages=("sam2", "torch"))


def handler(context: Context, event: Event) -> Response:
    """Answer one event; never raises.

    POST segments (see `interaction.protocol`); GET reports that the model is loaded.
    """
    service: InteractorService = context.user_data.service
    return answer(
        context, event, serve=lambda body: _segment(context, service, body), verb="segments"
    )


def _build_service(_: Context, settings: Settings) -> InteractorService:
    return InteractorService(build_segmenter(settings), settings.limits, settings.interactor)


def _segment(context: Context, service: InteractorService, body: object) -> str:
    begin = time.perf_counter()
    request = parse_interactor_request(
        body, service.limits, extreme_points=service.options.extreme_points
    )
    key = hashlib.blake2b(request.image, digest_size=16).hexdigest()
    prompt = request.prompt
    segment = service.segmenter.segment(
        key, lambda: decode_image(request.image, service.limits), prompt
    )
    text = format_interactor_answer(segment.mask, segment.confidence, service.options.mask)
    context.logger.info_with(
        "segmented",
        positive=len(prompt.positive),
        negative=len(prompt.negative),
        box=prompt.box is not None,
        encoded=segment.encoded,
        refined=segment.refined,
        confidence=round(segment.confidence, 3),
        ms=round((time.perf_counter() - begin) * 1000, 1),
    )
    return text
