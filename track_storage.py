"""Load and save tracks through the state store, with a cache of frame memories on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cachetools
import torch

from errors import StateGoneError, StateMismatchError, TrackerError
from model_handler import ModelHandler
from shapes import SizeHW
from state_store import RETRY_STEPS, StateStore, StepWrite
from state_token import StateToken, new_id
from track_state import (
    MEMORY_REACH,
    TrackState,
    decode_memory,
    decode_state,
    encode_memory,
    encode_state,
)


@dataclass(frozen=True, eq=False)
class LoadedTracks:
    """What the tracks of a request continue from.

    Attributes:
        states: By position in the request.
        memories: All frame memories that the states attend to, by id, on the model's device.
        bytes_read: Bytes read from the store.
    """

    states: dict[int, TrackState]
    memories: dict[str, torch.Tensor]
    bytes_read: int


@dataclass(frozen=True, eq=False)
class TrackStep:
    """One track's step on the frame of a request, not yet written.

    Attributes:
        state: State after the frame.
        memory: Frame memory of the frame.
        parent: Step that it continues; None for a new track.
    """

    state: TrackState
    memory: torch.Tensor
    parent: StateToken | None


class TrackStorage:
    """Tracks in the store, and the frame memories this replica used last.

    Args:
        model: Whose tracks they are.
        store: Shared by all replicas.
        memory_cache_bytes: Frame memories to keep on the model's device. They never change, so
            cached ones are never stale; a replica that has them reads only the small states.
    """

    def __init__(self, *, model: ModelHandler, store: StateStore, memory_cache_bytes: int) -> None:
        self._model = model
        self._store = store
        self._memories: cachetools.LRUCache[str, torch.Tensor] = cachetools.LRUCache(
            memory_cache_bytes, getsizeof=lambda memory: memory.nbytes
        )

    def clear_cache(self) -> None:
        """Forget all cached frame memories."""
        self._memories.clear()

    def load(self, tokens: Mapping[int, StateToken], size_hw: SizeHW) -> LoadedTracks:
        """Load what tracks continue from.

        Args:
            tokens: Steps to continue, by position in the request.
            size_hw: Height and width of the next frame.

        Raises:
            StateGoneError: A state or one of its frame memories expired or is damaged.
            StateMismatchError: A state is of another model or frame size.
            StateStoreUnavailableError: The store cannot be reached.
        """
        states, state_bytes = self._load_states(tokens, size_hw)
        memories, memory_bytes = self._load_memories(tokens, states)
        return LoadedTracks(states, memories, state_bytes + memory_bytes)

    def save(
        self, steps: Sequence[TrackStep], memories: Mapping[str, torch.Tensor]
    ) -> tuple[list[StateToken], int]:
        """Write steps under new keys, and memories again that the store has lost meanwhile.

        Args:
            steps: One per track.
            memories: As they were loaded for the steps' parents.

        Returns:
            One token per step, in order; and the bytes written.

        Raises:
            StateStoreUnavailableError: The store cannot be reached; the parents stay usable.
        """
        parents = [step.parent for step in steps if step.parent is not None]
        is_first = iter(self._store.claim(parents))
        in_reach = {**memories, **{step.state.newest.id: step.memory for step in steps}}
        writes = [
            self._continuation(step.parent, step.state, step.memory)
            if step.parent is not None and next(is_first)
            # A new track; or another continuation of a step, which gets keys of its own because
            # the first one lets the common ones expire.
            else self._new_track(step.state, in_reach)
            for step in steps
        ]
        lost = self._store.save(writes)
        restored = {
            (write.token.track, id_): self._encode(id_, in_reach[id_])
            for write, ids in zip(writes, lost, strict=True)
            for id_ in ids
        }
        if restored:  # the store was flushed or ran full, and this replica still has them
            self._store.restore(restored)
        for step in steps:
            self._cache(step.state.newest.id, step.memory)
        written = sum(len(write.state) + sum(map(len, write.memories.values())) for write in writes)
        return [write.token for write in writes], written

    def _load_states(
        self, tokens: Mapping[int, StateToken], size_hw: SizeHW
    ) -> tuple[dict[int, TrackState], int]:
        values = self._store.load_states(list(tokens.values()))
        states, bytes_read = {}, 0
        for (index, token), value in zip(tokens.items(), values, strict=True):
            if value is None:
                raise StateGoneError(
                    f"states[{index}] expired or is unknown: start the track again"
                )
            bytes_read += len(value)
            with error_prefix(f"states[{index}]"):
                state = decode_state(
                    value,
                    step_id=token.step,
                    fingerprint=self._model.fingerprint,
                    obj_ptr_size=self._model.obj_ptr_size,
                )
            if state.size_hw != size_hw:
                raise StateMismatchError(
                    f"states[{index}] is of frames of {state.size_hw[1]} x {state.size_hw[0]} "
                    f"pixels, this frame has {size_hw[1]} x {size_hw[0]}: start the track again"
                )
            states[index] = state
        return states, bytes_read

    def _load_memories(
        self, tokens: Mapping[int, StateToken], states: Mapping[int, TrackState]
    ) -> tuple[dict[str, torch.Tensor], int]:
        index_of = {id_: index for index, state in states.items() for id_ in state.memory_ids}
        memories = {id_: self._memories[id_] for id_ in index_of if id_ in self._memories}
        missing = [id_ for id_ in index_of if id_ not in memories]
        keys = [(tokens[index_of[id_]].track, id_) for id_ in missing]
        bytes_read = 0
        for id_, value in zip(missing, self._store.load_memories(keys), strict=True):
            index = index_of[id_]
            if value is None:
                raise StateGoneError(
                    f"states[{index}] lost its frame memories: start the track again"
                )
            bytes_read += len(value)
            with error_prefix(f"states[{index}]"):
                memory = decode_memory(
                    value,
                    frame_id=id_,
                    fingerprint=self._model.fingerprint,
                    shape=self._model.memory_shape,
                )
            memories[id_] = memory.to(self._model.device)
            self._cache(id_, memories[id_])
        return memories, bytes_read

    def _new_track(self, state: TrackState, memories: Mapping[str, torch.Tensor]) -> StepWrite:
        return StepWrite(
            token=StateToken(new_id(), state.newest.id),
            state=encode_state(state),
            memories={id_: self._encode(id_, memories[id_]) for id_ in state.memory_ids},
        )

    def _continuation(
        self, parent: StateToken, state: TrackState, memory: torch.Tensor
    ) -> StepWrite:
        """Return a step after its parent, which stays usable with `RETRY_STEPS - 1` before it."""
        newest = state.newest.id
        chain = [frame.id for frame in state.conditioning + state.past]
        past = [frame.id for frame in state.past]
        return StepWrite(
            token=StateToken(parent.track, newest),
            state=encode_state(state),
            memories={newest: self._encode(newest, memory)},
            renewed=[id_ for id_ in state.memory_ids if id_ != newest],
            superseded_steps=[parent.step],
            superseded_memories=past[-MEMORY_REACH - 1 : -MEMORY_REACH],
            dropped_steps=chain[-RETRY_STEPS - 2 : -RETRY_STEPS - 1],
            dropped_memories=past[-MEMORY_REACH - RETRY_STEPS - 1 : -MEMORY_REACH - RETRY_STEPS],
        )

    def _encode(self, id_: str, memory: torch.Tensor) -> bytes:
        return encode_memory(memory, frame_id=id_, fingerprint=self._model.fingerprint)

    def _cache(self, id_: str, memory: torch.Tensor) -> None:
        if memory.nbytes <= self._memories.maxsize:
            self._memories[id_] = memory


@contextmanager
def error_prefix(name: str) -> Iterator[None]:
    """Begin an error's message with the part of the request that it is about."""
    try:
        yield
    except TrackerError as err:
        raise type(err)(f"{name}: {err}") from err
