"""Owns putting a tracker together from settings: model, store and caches tied and warmed up."""

from __future__ import annotations

from PIL import Image

from model_loader import load_model
from object_requests import Continue, Start
from settings import Settings
from shapes import Shape, ShapeType
from state_store import MemoryStateStore, StateStore
from tracker import Frame, Tracker


def build_tracker(settings: Settings, store: StateStore) -> Tracker:
    """Load and warm the model that the settings name and tie it to a store.

    Raises:
        SettingsError: See `model_loader.load_model`.
    """
    model = load_model(settings)

    def tie(to: StateStore) -> Tracker:
        return Tracker(
            model=model,
            store=to,
            memory_cache_bytes=settings.memory_cache_bytes,
            polygon_tolerance=settings.polygon_tolerance,
            request_limit_s=settings.request_limit_s,
        )

    _warm_up(tie(MemoryStateStore(state_ttl_s=60, retry_window_s=60)))
    return tie(store)


def _warm_up(tracker: Tracker) -> None:
    """Run a start and a step, so that the first annotator does not pay for them."""
    side = 64
    blank = Frame("warm-up", (side, side), lambda: Image.new("RGB", (side, side)))
    box = Shape(ShapeType.RECTANGLE, [16.0, 16.0, 48.0, 48.0])
    (started,) = tracker.run(blank, [Start(box)])
    tracker.run(blank, [Continue(started.token)])
