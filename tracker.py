"""Owns one tracking request from states to states: load, compute, save; no JSON, no HTTP.

Every door (Nuclio, plain HTTP, video files, agents) calls `Tracker.run` and adds no tracking of its
own. Nothing is written before all objects are computed, and only new keys are: whatever fails,
the tokens that the caller holds still work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import cachetools
import torch
from PIL import Image

from errors import StateGoneError, StateMismatchError, TooLargeError, TrackerError
from model_handler import FrameFeatures, ModelHandler, ObjectOutput
from model_loader import load_model
from object_requests import Continue, Start
from settings import Settings
from shapes import (
    Box,
    Mask,
    Shape,
    ShapeType,
    SizeHW,
    mask_to_box,
    mask_to_shape,
    rectangle_to_box,
    shape_to_mask,
)
from state_store import RETRY_STEPS, MemoryStateStore, StateStore, StepWrite
from state_token import StateToken, new_id
from track_state import (
    MEMORY_REACH,
    PastFrame,
    TrackState,
    decode_memory,
    decode_state,
    encode_memory,
    encode_state,
)


@dataclass(frozen=True, eq=False)
class TrackedObject:
    """Where one object is on the frame of a request.

    Attributes:
        token: The state to continue from.
        shape: In the type the object was started with. None where it is not in the frame, but for
            rectangles, which keep their last box (CVAT's own UI cannot take null for them).
        lost: Whether the object is not in the frame.
        mask: SAM 2's mask behind the shape, `(H, W)`. None unless asked for, where the annotator
            drew it, and where another process computed it.
        score: SAM 2's object score, a logit. None where another process computed it.
    """

    token: StateToken
    shape: Shape | None
    lost: bool
    mask: Mask | None = None
    score: float | None = None


@dataclass
class Report:
    """What a request did, for its log line. Times are in milliseconds."""

    started: int = 0
    continued: int = 0
    lost: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    times_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to `times_ms[name]`, without the blocks timed inside it."""
        begin, before_ms = time.perf_counter(), sum(self.times_ms.values())
        try:
            yield
        finally:
            inside_ms = sum(self.times_ms.values()) - before_ms
            spent_ms = (time.perf_counter() - begin) * 1000 - inside_ms
            self.times_ms[name] = round(self.times_ms.get(name, 0) + spent_ms, 1)


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame to track on.

    Attributes:
        key: Names its content; features of a known key are not computed again.
        size_hw: Its height and width.
        image: Gives the RGB frame.
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
    """The core: a model, a store and the frame memories this replica used last.

    Args:
        model: Computes.
        store: Remembers, for all replicas.
        memory_cache_bytes: Frame memories to keep on the model's device. They never change, so
            they are never stale; a replica that has them reads only the small steps.
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
        self._store = store
        self._polygon_tolerance = polygon_tolerance
        self._request_limit_s = request_limit_s
        self._memories: cachetools.LRUCache[str, torch.Tensor] = cachetools.LRUCache(
            memory_cache_bytes, getsizeof=lambda memory: memory.nbytes
        )

    def describe(self) -> dict[str, str]:
        """Return what the model is and runs on, for the log."""
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
            keep_masks: Hand out the masks as well; hundreds on a large frame fill gigabytes.

        Returns:
            One answer per item, in order.

        Raises:
            BadRequestError: A shape cannot be drawn on this frame.
            StateGoneError: A state expired or is damaged.
            StateMismatchError: A state is of another model or frame size.
            StateStoreUnavailableError: The store is away; nothing was lost.
            TooLargeError: There are more objects than can be computed in the time allowed.
        """
        end = time.monotonic() + self._request_limit_s

        def check_time() -> None:
            if time.monotonic() > end:
                raise TooLargeError(
                    f"{len(items)} objects take longer than {self._request_limit_s:.0f} s: track "
                    "fewer at a time; nothing is lost"
                )

        report = report or Report()

        def pixels() -> torch.Tensor:
            image = frame.image()
            with report.timed("resize"):
                return self._model.pixels(image)

        starts = {i: item.shape for i, item in enumerate(items) if isinstance(item, Start)}
        tokens = {i: item.token for i, item in enumerate(items) if isinstance(item, Continue)}
        report.started, report.continued = len(starts), len(tokens)

        with report.timed("shapes"):
            prompts = {}
            for i, shape in starts.items():
                check_time()
                prompts[i] = self._prompt(i, shape, frame.size_hw)
        with report.timed("store"):
            states = self._load_states(tokens, frame.size_hw, report)
            memories = self._load_memories(tokens, states, report)
        with report.timed("encode"):
            features = self._model.encode_frame(frame.key, frame.size_hw, pixels)
        with report.timed("model"):
            outputs = {}
            for i, prompt in prompts.items():
                check_time()
                outputs[i] = self._start(features, prompt)
            stepped = self._model.step(features, list(states.values()), memories, check_time)
            outputs |= dict(zip(states, stepped, strict=True))
        with report.timed("shapes"):
            found = []
            for i, output in sorted(outputs.items()):
                check_time()
                if i in states:
                    mask = self._model.full_size_mask(features, output)
                    one = self._follow(output, mask, states[i], tokens[i])
                else:
                    one = self._begin(output, starts[i], prompts[i], frame.size_hw)
                    if keep_masks and starts[i].type is ShapeType.RECTANGLE:
                        one = replace(one, mask=self._model.full_size_mask(features, output))
                found.append(one if keep_masks else replace(one, mask=None))
        report.lost = sum(one.lost for one in found)
        with report.timed("store"):
            saved = self._save(found, memories, report)
        return [
            TrackedObject(token, one.shape, one.lost, one.mask, one.score)
            for token, one in zip(saved, found, strict=True)
        ]

    def _prompt(self, i: int, shape: Shape, size_hw: SizeHW) -> torch.Tensor | Box:
        """Return a box, or a mask at the model's size: at the frame's, hundreds would not fit."""
        with _place(f"shapes[{i}]"):
            if shape.type is ShapeType.RECTANGLE:
                return rectangle_to_box(shape, size_hw)
            return self._model.mask_prompt(shape_to_mask(shape, size_hw))

    def _load_states(
        self, tokens: Mapping[int, StateToken], size_hw: SizeHW, report: Report
    ) -> dict[int, TrackState]:
        values = self._store.load_states(list(tokens.values()))
        states = {}
        for (i, token), value in zip(tokens.items(), values, strict=True):
            if value is None:
                raise StateGoneError(f"states[{i}] expired or is unknown: start the track again")
            report.bytes_read += len(value)
            with _place(f"states[{i}]"):
                state = decode_state(
                    value,
                    step_id=token.step,
                    fingerprint=self._model.fingerprint,
                    obj_ptr_size=self._model.obj_ptr_size,
                )
            if state.size_hw != size_hw:
                raise StateMismatchError(
                    f"states[{i}] is of frames of {state.size_hw[1]} x {state.size_hw[0]} pixels, "
                    f"this one has {size_hw[1]} x {size_hw[0]}: start the track again"
                )
            states[i] = state
        return states

    def _load_memories(
        self, tokens: Mapping[int, StateToken], states: Mapping[int, TrackState], report: Report
    ) -> dict[str, torch.Tensor]:
        """Return all frame memories that the states attend to, on the device."""
        wanted = {id_: i for i, state in states.items() for id_ in state.memory_ids}
        memories = {id_: self._memories[id_] for id_ in wanted if id_ in self._memories}
        missing = [id_ for id_ in wanted if id_ not in memories]
        keys = [(tokens[wanted[id_]].track, id_) for id_ in missing]
        for id_, value in zip(missing, self._store.load_memories(keys), strict=True):
            i = wanted[id_]
            if value is None:
                raise StateGoneError(f"states[{i}] lost its frames: start the track again")
            report.bytes_read += len(value)
            with _place(f"states[{i}]"):
                memory = decode_memory(
                    value,
                    frame_id=id_,
                    fingerprint=self._model.fingerprint,
                    shape=self._model.memory_shape,
                )
            memories[id_] = memory.to(self._model.device)
            self._remember(id_, memories[id_])
        return memories

    def _start(self, features: FrameFeatures, prompt: torch.Tensor | Box) -> ObjectOutput:
        if isinstance(prompt, tuple):
            return self._model.start_from_box(features, prompt)
        return self._model.start_from_mask(features, prompt)

    def _begin(
        self,
        output: ObjectOutput,
        shape: Shape,
        prompt: torch.Tensor | Box,
        size_hw: SizeHW,
    ) -> _Found:
        state = TrackState(
            fingerprint=self._model.fingerprint,
            size_hw=size_hw,
            shape_type=shape.type,
            last_box=prompt if isinstance(prompt, tuple) else None,
            conditioning=(PastFrame(new_id(), 0, output.obj_ptr),),
        )
        return _Found(state, output.memory, shape, lost=False, score=output.object_score)

    def _follow(
        self, output: ObjectOutput, mask: Mask, state: TrackState, token: StateToken
    ) -> _Found:
        shape = mask_to_shape(mask, state.shape_type, polygon_tolerance=self._polygon_tolerance)
        lost = shape is None
        box = mask_to_box(mask) or state.last_box if state.last_box is not None else None
        if lost and box is not None:
            shape = Shape(ShapeType.RECTANGLE, list(box))
        return _Found(
            state.advance(new_id(), output.obj_ptr, box),
            output.memory,
            shape,
            lost=lost,
            score=output.object_score,
            mask=mask,
            parent=token,
        )

    def _save(
        self, found: Sequence[_Found], memories: dict[str, torch.Tensor], report: Report
    ) -> list[StateToken]:
        """Write one step per object; `memories` holds all frame memories in their reach."""
        parents = [one.parent for one in found if one.parent is not None]
        first = iter(self._store.claim(parents))
        memories |= {one.state.newest.id: one.memory for one in found}
        writes = []
        for one in found:
            if one.parent is not None and next(first):
                write = _next_step(
                    one.parent, one.state, self._encode(one.state.newest.id, memories)
                )
            else:
                # A new track; or another continuation of a step, which goes on in keys of its own
                # because the first one lets the common ones expire.
                write = StepWrite(
                    token=StateToken(new_id(), one.state.newest.id),
                    state=encode_state(one.state),
                    memories={id_: self._encode(id_, memories) for id_ in one.state.memory_ids},
                )
            writes.append(write)
            report.bytes_written += len(write.state) + sum(map(len, write.memories.values()))
        lost = self._store.save(writes)
        restored = {
            (write.token.track, id_): self._encode(id_, memories)
            for write, ids in zip(writes, lost, strict=True)
            for id_ in ids
        }
        if restored:  # the store was flushed or ran full, and this replica still had them
            self._store.restore(restored)
        for one in found:
            self._remember(one.state.newest.id, one.memory)
        return [write.token for write in writes]

    def _encode(self, id_: str, memories: Mapping[str, torch.Tensor]) -> bytes:
        return encode_memory(memories[id_], frame_id=id_, fingerprint=self._model.fingerprint)

    def _remember(self, id_: str, memory: torch.Tensor) -> None:
        if memory.nbytes <= self._memories.maxsize:
            self._memories[id_] = memory


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


@dataclass(frozen=True, eq=False)
class _Found:
    """One object of a request, computed but not yet written."""

    state: TrackState
    memory: torch.Tensor
    shape: Shape | None
    lost: bool
    score: float
    mask: Mask | None = None
    parent: StateToken | None = None


def _next_step(parent: StateToken, state: TrackState, memory: bytes) -> StepWrite:
    """Write a step behind its parent, which stays usable with `RETRY_STEPS - 1` before it."""
    newest = state.newest.id
    chain = [frame.id for frame in state.conditioning + state.past]
    past = [frame.id for frame in state.past]
    return StepWrite(
        token=StateToken(parent.track, newest),
        state=encode_state(state),
        memories={newest: memory},
        renewed=[id_ for id_ in state.memory_ids if id_ != newest],
        superseded_steps=[parent.step],
        superseded_memories=past[-MEMORY_REACH - 1 : -MEMORY_REACH],
        dropped_steps=chain[-RETRY_STEPS - 2 : -RETRY_STEPS - 1],
        dropped_memories=past[-MEMORY_REACH - RETRY_STEPS - 1 : -MEMORY_REACH - RETRY_STEPS],
    )


@contextmanager
def _place(name: str) -> Iterator[None]:
    """Begin an error's message with the part of the request it is about."""
    try:
        yield
    except TrackerError as err:
        raise type(err)(f"{name}: {err}") from err
