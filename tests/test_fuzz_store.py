from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
import redis
import safetensors.torch
import torch

from shapes import ShapeType
from state_token import StateToken, new_id
from testbed.functions import Function
from testbed.redis_server import RedisServer
from tests.faults.machinery import FRAMES, prompts
from tests.faults.mutations import Checker, Mutator
from track_state import PastFrame, TrackState, encode_memory, encode_state


@pytest.fixture(scope="module")
def checker(
    start_function: Callable[[dict[str, str]], Function],
    micro: dict[str, str],
    redis_server: RedisServer,
) -> Checker:
    """The tracker on a real server, without a cache: it reads every value from the store."""
    uncached = {"SAM2_MEMORY_CACHE_MB": "0"}
    return Checker(start_function(micro | redis_server.environment | uncached))


@pytest.fixture(scope="module")
def fingerprint(checker: Checker) -> str:
    """The model's fingerprint in stored values."""
    name: str = checker.function.context.user_data.service.tracker._model.fingerprint
    return name


@pytest.fixture
def token(checker: Checker) -> StateToken:
    """The token of a track of two frames."""
    states = checker.function.track(FRAMES[0], prompts()[:1], [])["states"]
    states = checker.function.track(FRAMES[1], [None], states)["states"]
    return StateToken.parse(states[0])


def track_next_frame(checker: Checker, token: StateToken) -> int:
    """Return the status of a request for the track's next frame."""
    fields = {"image": FRAMES[2], "shapes": [None], "states": [str(token)]}
    return checker.send(json.dumps(fields).encode())


def keys_of(token: StateToken) -> dict[str, str]:
    """Return the keys of the newest step and its frame memory."""
    return {kind: f"sam2:{{{token.track}}}:{kind}:{token.step}" for kind in ("step", "frame")}


@pytest.mark.parametrize("kind", ["step", "frame"])
def test_mutated_values_never_reach_the_network(
    checker: Checker, client: redis.Redis, token: StateToken, kind: str
) -> None:
    """With random changes the track continues or has to start again."""
    key = keys_of(token)[kind]
    whole = client.get(key)
    assert isinstance(whole, bytes)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    mutator, seen = Mutator(0, []), set()
    for number in range(100):
        high = (8, header, len(whole))[number % 3]
        client.set(key, mutator.scramble(whole, 0, high))
        seen.add(track_next_frame(checker, token))

    assert 410 in seen
    assert seen <= {200, 409, 410}
    client.set(key, whole)
    assert track_next_frame(checker, token) == 200


def safetensors_file(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    """Return a valid safetensors file."""
    return safetensors.torch.save(tensors, metadata)


def hand_made(kind: str, token: StateToken, fingerprint: str) -> dict[str, bytes]:
    """Return invalid values by name."""
    metadata = {"schema": "1", "kind": kind, "id": token.step, "fingerprint": fingerprint}
    name = {"step": "obj_ptrs", "frame": "maskmem_features"}[kind]
    shape = {"step": (2, 64), "frame": (16, 8, 8)}[kind]
    dtype = {"step": torch.float32, "frame": torch.bfloat16}[kind]
    good = torch.zeros(shape, dtype=dtype)
    values = {
        "nothing": b"",
        "a text": b"hello",
        "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os",
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of 100 MB": struct.pack("<Q", 100_000_000) + b"{" * 1000,
        "a header of nothing but spaces": struct.pack("<Q", 10**7) + b" " * 10**7,
        "a deep header": struct.pack("<Q", 20_000) + b"[" * 20_000,
        "no metadata": safetensors.torch.save({name: good}),
        "no tensors": safetensors_file({}, **metadata),
        "other tensors": safetensors_file({"other": good}, **metadata),
        "more tensors": safetensors_file({name: good, "more": torch.ones(3)}, **metadata),
        "64 MB of tensors": safetensors_file({name: torch.zeros(1 << 24)}, **metadata),
        "another schema": safetensors_file({name: good}, **metadata | {"schema": "2"}),
        "another kind": safetensors_file({name: good}, **metadata | {"kind": "x"}),
        "another step": safetensors_file({name: good}, **metadata | {"id": new_id()}),
        "another model": safetensors_file({name: good}, **metadata | {"fingerprint": "x" * 5000}),
    }  # fmt: skip
    if kind == "step":
        for name_of, state in (("no JSON", "{"), ("deep", "[" * 99_999), ("a list", "[1]")):
            values[f"a state that is {name_of}"] = safetensors_file(
                {name: good}, **metadata, state=state
            )
    for other in (torch.float64, torch.int8, torch.bool, torch.float16, torch.uint8):
        values[str(other)] = safetensors_file({name: good.to(other)}, **metadata)
    for size in ((), (0,), (1, *shape), shape[:-1], (*shape[:-1], shape[-1] + 1)):
        values[f"shape {size}"] = safetensors_file(
            {name: torch.zeros(size, dtype=dtype)}, **metadata
        )
    for bad in (float("nan"), float("inf"), float("-inf")):
        values[f"{bad}"] = safetensors_file({name: torch.full(shape, bad, dtype=dtype)}, **metadata)
    return values


@pytest.mark.parametrize("kind", ["step", "frame"])
def test_hand_made_values_never_reach_the_network(
    checker: Checker, client: redis.Redis, token: StateToken, fingerprint: str, kind: str
) -> None:
    """Any value but one of this step and model ends the track with 409 or 410."""
    key = keys_of(token)[kind]
    whole = client.get(key)
    for name, value in hand_made(kind, token, fingerprint).items():
        client.set(key, value)
        status = track_next_frame(checker, token)

        assert status in {409, 410}, name
    client.set(key, whole)  # type: ignore[arg-type]
    assert track_next_frame(checker, token) == 200


def test_keys_of_another_type_are_errors_of_the_store(
    checker: Checker, client: redis.Redis, token: StateToken
) -> None:
    """Redis refuses GET for a list, and the function answers 503."""
    for key in keys_of(token).values():
        whole = client.get(key)
        client.delete(key)
        client.rpush(key, "a", "b")

        assert track_next_frame(checker, token) == 503
        client.delete(key)
        client.set(key, whole)  # type: ignore[arg-type]
    assert track_next_frame(checker, token) == 200


def test_values_of_another_track_are_refused(checker: Checker, client: redis.Redis) -> None:
    """Values copied from another track, or tokens of mixed parts, give no access to it."""
    states = checker.function.track(FRAMES[0], prompts()[:2], [])["states"]
    states = checker.function.track(FRAMES[1], [None] * 2, states)["states"]
    mine, theirs = map(StateToken.parse, states)
    for kind in ("step", "frame"):
        whole = client.get(keys_of(mine)[kind])
        client.set(keys_of(mine)[kind], client.get(keys_of(theirs)[kind]))  # type: ignore[arg-type]

        assert track_next_frame(checker, mine) == 410
        client.set(keys_of(mine)[kind], whole)  # type: ignore[arg-type]
    assert track_next_frame(checker, StateToken(mine.track, theirs.step)) == 410
    assert track_next_frame(checker, StateToken(theirs.track, mine.step)) == 410
    assert track_next_frame(checker, mine) == track_next_frame(checker, theirs) == 200


def states_by_hand(fingerprint: str) -> dict[str, TrackState]:
    """Return well-formed states that no track has."""

    def past(step: int, value: float = 0.1) -> PastFrame:
        return PastFrame(new_id(), step, torch.full((64,), value))

    def state(*frames: PastFrame, conditioning: int = 1, **changes: Any) -> TrackState:
        fields: dict[str, Any] = {
            "fingerprint": fingerprint,
            "size_hw": (180, 320),
            "shape_type": ShapeType.RECTANGLE,
            "last_box": (1.0, 2.0, 3.0, 4.0),
            "conditioning": frames[:conditioning],
            "past": frames[conditioning:],
        }
        return TrackState(**(fields | changes))

    return {
        "gaps": state(past(0), past(3), past(70), past(1000)),
        "the last step of all": state(past(0), past(2**31 - 1)),
        "only the last step": state(past(2**31 - 1)),
        "huge pointers": state(past(0, 3e38), past(1, -3e38)),
        "tiny pointers": state(past(0, 1e-45), past(1, 0.0)),
        "a box beyond": state(past(0), last_box=(1e300, -1e300, 1e308, 0.0)),
        "a box turned over": state(past(0), last_box=(9.0, 9.0, 1.0, 1.0)),
        "a mask with a box": state(past(0), shape_type=ShapeType.MASK),
        "no height": state(past(0), size_hw=(0, 320)),
        "less than no height": state(past(0), size_hw=(-180, -320)),
        "a giant frame": state(past(0), size_hw=(10**300, 10**300)),
        "many prompts": state(*map(past, range(16)), conditioning=16),
        "countless prompts": state(*map(past, range(3000)), conditioning=3000),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in states_by_hand("")
        for value in ([0.0] if name == "countless prompts" else [0.0, 3e38, -1e-40])
    ],
)
def test_states_made_by_hand_are_answered_or_refused(
    checker: Checker, client: redis.Redis, fingerprint: str, name: str, value: float
) -> None:
    """Well-formed states with all their frame memories get an answer or a reason."""
    state = states_by_hand(fingerprint)[name]
    track = new_id()
    memory = torch.full((16, 8, 8), value, dtype=torch.bfloat16)
    client.set(f"sam2:{{{track}}}:step:{state.newest.id}", encode_state(state), ex=60)
    for id_ in set(state.memory_ids):
        data = encode_memory(memory, frame_id=id_, fingerprint=fingerprint)
        client.set(f"sam2:{{{track}}}:frame:{id_}", data, ex=60)
    token = StateToken(track, state.newest.id)

    allowed = {410} if name == "countless prompts" else {200, 409, 410}
    assert track_next_frame(checker, token) in allowed


def test_ids_made_by_hand_reach_no_other_keys(
    checker: Checker, client: redis.Redis, fingerprint: str, token: StateToken
) -> None:
    """Ids inside a state cannot address another track or another kind of key."""
    rng = random.Random(0)
    for id_ in ("", "*", "a" * 100_000, f"x}}:frame:{token.step}", "\r\nGET x", "\0", "é" * 9):
        newest = PastFrame(new_id(), 1, torch.zeros(64))
        state = TrackState(
            fingerprint, (180, 320), ShapeType.MASK, None,
            (PastFrame(id_, 0, torch.full((64,), rng.random())),), (newest,),
        )  # fmt: skip
        track = new_id()
        client.set(f"sam2:{{{track}}}:step:{newest.id}", encode_state(state), ex=60)

        assert track_next_frame(checker, StateToken(track, newest.id)) == 410
