"""Track objects on one frame: load their states, compute, save the new states.

Every entry point (Nuclio, plain HTTP, video files, agents) calls `Tracker.run`. Nothing is written
before all objects are computed, and only under new keys: whatever fails, the tokens that the caller
has still work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from PIL import Image

from errors import SettingsError, TooLargeError
from model_handler import FrameFeatures, ModelHandler, ObjectOutput
from model_loader import load_model
from object_requests import Continue, Start
from report import Report
from settings import Settings
from shape_prompt import shape_to_prompt
from shapes import Box, Mask, Shape, ShapeType, SizeHW, mask_to_box, mask_to_shape
from state_store import StateStore
from state_token import StateToken, new_id
from track_state import PastFrame, TrackState
from track_storage import LoadedTracks, TrackStep, TrackStorage, error_prefix
from warm_up import warm_up

__all__ = ["Frame", "Report", "TrackedObject", "Tracker", "build_tracker"]

T = TypeVar("T")

MORE_MEMORY = (
    "set a smaller SAM2_IMAGE_SIZE, SAM2_FEATURE_CACHE_FRAMES or SAM2_MEMORY_CACHE_MB, or use a "
    "GPU with more memory"
)


@dataclass(frozen=True, eq=False)
class TrackedObject:
    """One object on the frame of a request.

    Attributes:
        token: State token to continue from.
        shape: Of the type that the object was started with. None if it is not in the frame; but a
            rectangle keeps its last box, because CVAT's own UI cannot take null for it.
        lost: Whether the object is not in the frame.
        mask: SAM 2's mask that the shape was made from, `(H, W)`. None unless asked for, if the
            annotator drew it, and if another process computed it.
        score: SAM 2's object score, a logit. None if another process computed it.
    """

    token: StateToken
    shape: Shape | None
    lost: bool
    mask: Mask | None = None
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame to track on.

    Attributes:
        key: Identifies its content; features of a cached key are not computed again.
        size_hw: Its height and width.
        image: Returns the RGB image; called only if it has to be encoded.
    """

    key: str
    size_hw: SizeHW
    image: Callable[[], Image.Image]

    @classmethod
    def from_image(cls, image: Image.Image) -> Frame:
        """Return an RGB image as a frame; its key is a hash of its pixels."""
        size_hw = (image.height, image.width)
        pixels = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        return cls(f"{size_hw} {pixels}", size_hw, lambda: image)


class Tracker:
    """A model and a store of tracks.

    Args:
        model: Computes.
        store: Holds the tracks, for all replicas.
        memory_cache_bytes: See `TrackStorage`.
        polygon_tolerance: See `shapes.mask_to_polygon`.
        request_limit_s: Longest time to compute one request, in seconds.
    """

    def __init__(
        self,
        *,
        model: ModelHandler,
        store: StateStore,
        memory_cache_bytes: int,
        polygon_tolerance: float,
        request_limit_s: float,
    ) -> None:
        self._model = model
        self._storage = TrackStorage(
            model=model, store=store, memory_cache_bytes=memory_cache_bytes
        )
        self._polygon_tolerance = polygon_tolerance
        self._request_limit_s = request_limit_s

    def describe(self) -> dict[str, str]:
        """Return model, device, type and input size, for the log."""
        return {
            "model": self._model.fingerprint,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype),
            "image_size": str(self._model.image_size),
        }

    def run(
        self,
        frame: Frame,
        items: Sequence[Start | Continue],
        report: Report | None = None,
        *,
        keep_masks: bool = False,
    ) -> list[TrackedObject]:
        """Start and continue objects on one frame.

        Args:
            frame: The frame.
            items: One per object; all are checked before any is computed.
            report: Filled with counts and times.
            keep_masks: Whether to return the masks; hundreds on a large frame fill gigabytes.

        Returns:
            One object per item, in order.

        Raises:
            BadRequestError: A shape cannot be drawn on this frame, or is too small for the model.
            StateGoneError: A state expired or is damaged.
            StateMismatchError: A state is of another model or frame size.
            StateStoreUnavailableError: The store cannot be reached; nothing was lost.
            TooLargeError: There are more objects than can be computed in the time allowed or in
                the device's memory.
        """
        request = _Request(frame, items, report or Report(), keep_masks, self._request_limit_s)

        def load_and_compute() -> tuple[LoadedTracks, list[_ComputedObject]]:
            loaded, objects = self._load(request)
            return loaded, self._compute(request, loaded, objects)

        loaded, computed = self._repeat_if_out_of_memory(load_and_compute, request)
        return self._save(request, loaded, computed)

    def _load(self, request: _Request) -> tuple[LoadedTracks, list[_RequestedObject]]:
        """Return the tracks' memories, and one record per item with its prompt or its state."""
        items, report, size_hw = request.items, request.report, request.frame.size_hw
        with report.timed("shapes"):
            prompts = {}
            for index, item in enumerate(items):
                if isinstance(item, Start):
                    request.check_time()
                    with error_prefix(f"shapes[{index}]"):
                        prompts[index] = shape_to_prompt(self._model, item.shape, size_hw)
        with report.timed("store"):
            tokens = {
                index: item.token for index, item in enumerate(items) if isinstance(item, Continue)
            }
            loaded = self._storage.load(tokens, size_hw)
        report.started, report.continued = len(prompts), len(tokens)
        report.bytes_read += loaded.bytes_read
        return loaded, [
            _StartedObject(item.shape, prompts[index])
            if isinstance(item, Start)
            else _ContinuedObject(item.token, loaded.states[index])
            for index, item in enumerate(items)
        ]

    def _compute(
        self, request: _Request, loaded: LoadedTracks, objects: Sequence[_RequestedObject]
    ) -> list[_ComputedObject]:
        """Run the model, and turn its outputs into shapes and new states."""
        frame, report = request.frame, request.report

        def pixels() -> torch.Tensor:
            image = frame.image()
            with report.timed("resize"):
                return self._model.pixels(image)

        with report.timed("encode", self._model.device):
            features = self._model.encode_frame(frame.key, frame.size_hw, pixels)
        with report.timed("model", self._model.device):
            states = [obj.state for obj in objects if isinstance(obj, _ContinuedObject)]
            stepped = iter(
                self._model.step(
                    features,
                    states,
                    loaded.memories,
                    request.check_time,
                    lambda: self._free_memory(report),
                )
            )
            outputs = []
            for obj in objects:
                if isinstance(obj, _StartedObject):
                    request.check_time()
                    outputs.append(self._start(features, obj.prompt))
                else:
                    outputs.append(next(stepped))
        with report.timed("shapes"):
            computed = []
            for obj, output in zip(objects, outputs, strict=True):
                request.check_time()
                if isinstance(obj, _StartedObject):
                    computed.append(self._started(request, obj, features, output))
                else:
                    computed.append(self._continued(request, obj, features, output))
        return computed

    def _save(
        self, request: _Request, loaded: LoadedTracks, computed: Sequence[_ComputedObject]
    ) -> list[TrackedObject]:
        """Write all steps to the store."""
        report = request.report
        report.lost = sum(obj.lost for obj in computed)
        with report.timed("store"):
            tokens, report.bytes_written = self._storage.save(
                [obj.step for obj in computed], loaded.memories
            )
        return [
            TrackedObject(token, obj.shape, obj.lost, obj.mask, obj.score)
            for token, obj in zip(tokens, computed, strict=True)
        ]

    def _start(self, features: FrameFeatures, prompt: torch.Tensor | Box) -> ObjectOutput:
        if isinstance(prompt, tuple):
            return self._model.start_from_box(features, prompt)
        return self._model.start_from_mask(features, prompt)

    def _started(
        self, request: _Request, obj: _StartedObject, features: FrameFeatures, output: ObjectOutput
    ) -> _ComputedObject:
        """Return the annotator's own shape; the mask only if SAM 2 made it, from a rectangle."""
        box = obj.prompt if isinstance(obj.prompt, tuple) else None
        masked = request.keep_masks and box is not None
        state = TrackState(
            fingerprint=self._model.fingerprint,
            size_hw=request.frame.size_hw,
            shape_type=obj.shape.type,
            last_box=box,
            conditioning=(PastFrame(new_id(), 0, output.obj_ptr),),
        )
        return _ComputedObject(
            step=TrackStep(state, output.memory, parent=None),
            shape=obj.shape,
            lost=False,
            mask=self._model.full_size_mask(features, output) if masked else None,
            score=output.object_score,
        )

    def _continued(
        self,
        request: _Request,
        obj: _ContinuedObject,
        features: FrameFeatures,
        output: ObjectOutput,
    ) -> _ComputedObject:
        """Return the shape of SAM 2's mask; of a rectangle that is lost the last box."""
        state = obj.state
        mask = self._model.full_size_mask(features, output)
        shape = mask_to_shape(mask, state.shape_type, polygon_tolerance=self._polygon_tolerance)
        lost = shape is None
        box = mask_to_box(mask) or state.last_box if state.last_box is not None else None
        if lost and box is not None:
            shape = Shape(ShapeType.RECTANGLE, list(box))
        advanced = state.advance(new_id(), output.obj_ptr, box)
        return _ComputedObject(
            step=TrackStep(advanced, output.memory, parent=obj.token),
            shape=shape,
            lost=lost,
            mask=mask if request.keep_masks else None,
            score=output.object_score,
        )

    def _repeat_if_out_of_memory(self, compute: Callable[[], T], request: _Request) -> T:
        """Compute, and once more without caches if the device's memory does not suffice.

        Raises:
            TooLargeError: It does not suffice for the second attempt either.
        """
        for _ in range(2):
            try:
                return compute()
            except torch.OutOfMemoryError:
                pass
            # Here, unlike in the except block, no traceback holds the attempt's tensors.
            self._free_memory(request.report)
        raise TooLargeError(
            f"{self._model.device} has too little memory for {len(request.items)} objects on this "
            f"frame: track fewer at a time, {MORE_MEMORY}; nothing is lost"
        )

    def _free_memory(self, report: Report) -> None:
        """Empty all caches on the device."""
        report.out_of_memory += 1
        self._storage.clear_cache()
        self._model.free_memory()


def build_tracker(settings: Settings, store: StateStore) -> Tracker:
    """Load and warm up the model that the settings name, and connect it to a store.

    Raises:
        SettingsError: See `model_loader.load_model`; or one object does not fit into the device's
            memory.
    """
    try:
        model = load_model(settings)
        warm_up(model)
    except torch.OutOfMemoryError as err:
        raise SettingsError(
            f"SAM2_DEVICE={settings.device!r} has too little memory for one object: {MORE_MEMORY}"
        ) from err
    return Tracker(
        model=model,
        store=store,
        memory_cache_bytes=settings.memory_cache_bytes,
        polygon_tolerance=settings.polygon_tolerance,
        request_limit_s=settings.request_limit_s,
    )


@dataclass(frozen=True, eq=False)
class _Request:
    """One call of `Tracker.run`, whose arguments these are."""

    frame: Frame
    items: Sequence[Start | Continue]
    report: Report
    keep_masks: bool
    limit_s: float
    begin: float = field(default_factory=time.monotonic)

    def check_time(self) -> None:
        """Raise `TooLargeError` if the time allowed is over."""
        if time.monotonic() > self.begin + self.limit_s:
            raise TooLargeError(
                f"{len(self.items)} objects take longer than {self.limit_s:.0f} s: track fewer at "
                "a time; nothing is lost"
            )


@dataclass(frozen=True, eq=False)
class _StartedObject:
    """An object to start.

    Attributes:
        shape: The annotator's.
        prompt: The shape as a box XYXY, or as a mask at the model's input size.
    """

    shape: Shape
    prompt: torch.Tensor | Box


@dataclass(frozen=True, eq=False)
class _ContinuedObject:
    """An object to continue: its token, and the state loaded for it."""

    token: StateToken
    state: TrackState


_RequestedObject = _StartedObject | _ContinuedObject


@dataclass(frozen=True, eq=False)
class _ComputedObject:
    """An object on the frame, before its step is written; see `TrackedObject`."""

    step: TrackStep
    shape: Shape | None
    lost: bool
    mask: Mask | None
    score: float
