"""Nuclio's door to the interactor: start-up, one event in, one response out; no SAM 2 itself.

`init_context` runs once per worker before it takes events, `handler` once per event. Nothing is
kept that a restart or another replica would miss, so there is no store.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from importlib.metadata import version

import torch
from nuclio_sdk import Context, Event, Response

from images import decode_image
from interaction.protocol import format_interactor_answer, parse_interactor_request
from interaction.segmenter import Segmenter, build_segmenter
from model_handler import compute_dtype
from model_loader import load_predictor
from nuclio_door import answer, end_when_told, one_line_on_failure
from settings import InteractorSettings, Limits, Settings


@dataclass(frozen=True)
class InteractorService:
    """What one worker holds between events."""

    segmenter: Segmenter
    limits: Limits
    options: InteractorSettings


def init_context(context: Context) -> None:
    """Read the settings, load and warm the model; fill `context.user_data`.

    Raises:
        SystemExit: The function must not start; one line of the log says why.
    """
    with one_line_on_failure(context):
        context.user_data.service = _start_up(context)


def handler(context: Context, event: Event) -> Response:
    """Answer one event; no exception leaves.

    POST segments (PROTOCOL: CVAT's interactor call). GET tells that the model is loaded.
    """
    service: InteractorService = context.user_data.service
    return answer(
        context, event, serve=lambda body: _segment(context, service, body), verb="segments"
    )


def _start_up(context: Context) -> InteractorService:
    settings = Settings.from_env(os.environ)
    model, fingerprint = load_predictor(settings)
    segmenter = build_segmenter(model, settings)
    end_when_told(context)
    context.logger.info_with(
        "ready",
        model=fingerprint,
        device=str(model.device),
        dtype=str(compute_dtype(model.device)),
        image_size=str(model.image_size),
        config=settings.config or settings.model_id,
        versions={name: version(name) for name in ("sam2", "torch")},
        threads=torch.get_num_threads(),
    )
    return InteractorService(segmenter, settings.limits, settings.interactor)


def _segment(context: Context, service: InteractorService, body: object) -> str:
    begin = time.perf_counter()
    request = parse_interactor_request(
        body, service.limits, extreme_points=service.options.extreme_points
    )
    key = hashlib.blake2b(request.image, digest_size=16).hexdigest()
    prompt = request.prompt
    found = service.segmenter.segment(
        key, lambda: decode_image(request.image, service.limits), prompt
    )
    text = format_interactor_answer(found.mask, found.confidence, service.options.mask)
    context.logger.info_with(
        "segmented",
        positive=len(prompt.positive),
        negative=len(prompt.negative),
        box=prompt.box is not None,
        encoded=found.encoded,
        refined=found.refined,
        confidence=round(found.confidence, 3),
        ms=round((time.perf_counter() - begin) * 1000, 1),
    )
    return text
