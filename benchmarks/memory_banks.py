"""Fill memory banks with copies of their first memory.

A measured frame should attend to a full memory bank: seven frame memories and sixteen object
pointers. The content does not change the time, and tracking fifteen frames just to fill the bank
would take longer than the measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from settings import RedisSettings
from state_store import RedisStateStore, StepWrite, connect
from state_token import StateToken, new_id
from testbed.redis_server import RedisServer
from track_state import POINTER_REACH, decode_memory, decode_state, encode_memory, encode_state


def open_store(server: RedisServer) -> RedisStateStore:
    """Return a client of the function's state store, to write states as the function does."""
    client = connect(RedisSettings("127.0.0.1", server.port))
    return RedisStateStore(client=client, state_ttl_s=8 * 3600, retry_window_s=600)


def fill_memory_banks(store: RedisStateStore, states: Sequence[str]) -> list[str]:
    """Store each started track as a new track that has not moved for fifteen frames.

    Args:
        store: The function's.
        states: State tokens from the function's answer to the first frame.

    Returns:
        The new tracks' tokens.
    """
    tokens = [StateToken.parse(state) for state in states]
    keys = [(token.track, token.step) for token in tokens]
    values = zip(tokens, store.load_states(tokens), store.load_memories(keys), strict=True)
    filled = []
    for started, state_bytes, memory_bytes in values:
        assert state_bytes is not None
        assert memory_bytes is not None
        header, memory_header = _header(state_bytes), _header(memory_bytes)
        fingerprint = header["__metadata__"]["fingerprint"]
        state = decode_state(
            state_bytes,
            step_id=started.step,
            fingerprint=fingerprint,
            obj_ptr_size=header["obj_ptrs"]["shape"][1],
        )
        memory = decode_memory(
            memory_bytes,
            frame_id=started.step,
            fingerprint=fingerprint,
            shape=tuple(memory_header["maskmem_features"]["shape"]),
        )
        for _ in range(POINTER_REACH):
            state = state.advance(new_id(), state.newest.obj_ptr, state.last_box)
        token = StateToken(new_id(), state.newest.id)
        memories = {
            id_: encode_memory(memory, frame_id=id_, fingerprint=fingerprint)
            for id_ in state.memory_ids
        }
        store.save([StepWrite(token=token, state=encode_state(state), memories=memories)])
        filled.append(str(token))
    return filled


def copy_output(output: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a frame's output of SAM 2, tensors too.

    Shared tensors would be saved only once and would stay in the CPU's cache.
    """
    return {name: _copy(value) for name, value in output.items()}


def _copy(value: Any) -> Any:  # noqa: ANN401  # tensors, lists of them, None
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def _header(data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header
