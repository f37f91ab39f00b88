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
from testbed.functions import Function, micro_environment
from testbed.redis_server import RedisServer
from tests.faults.machinery import FRAMES, prompts
from tests.faults.mutations import Judge, Spoiler
from track_state import PastFrame, TrackState, encode_memory, encode_state


@pytest.fixture(scope="module")
def judge(
    start_function: Callable[[dict[str, str]], Function],
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Judge:
    """The function on a real server; it remembers nothing by itself, and reads all there is."""
    environment = micro_environment(tmp_path_factory.mktemp("weights"))
    cold = {"SAM2_MEMORY_CACHE_MB": "0"}
    return Judge(start_function(environment | redis_server.environment | cold))


@pytest.fixture(scope="module")
def fingerprint(judge: Judge) -> str:
    """The model's name in stored values."""
    name: str = judge.function.context.user_data.service.tracker._model.fingerprint
    return name


@pytest.fixture
def token(judge: Judge) -> StateToken:
    """A track of two frames."""
    states = judge.function.track(FRAMES[0], prompts()[:1], [])["states"]
    states = judge.function.track(FRAMES[1], [None], states)["states"]
    return StateToken.parse(states[0])


def go_on(judge: Judge, token: StateToken) -> int:
    """Return what comes of the track's next frame."""
    fields = {"image": FRAMES[2], "shapes": [None], "states": [str(token)]}
    return judge.send(json.dumps(fields).encode())


def keys_of(token: StateToken) -> dict[str, str]:
    """Return where the newest step and its frame memory lie."""
    return {kind: f"sam2:{{{token.track}}}:{kind}:{token.step}" for kind in ("step", "frame")}


@pytest.mark.parametrize("kind", ["step", "frame"])
def test_spoiled_values_never_reach_the_network(
    judge: Judge, client: redis.Redis, token: StateToken, kind: str
) -> None:
    """Bits, lengths and pieces changed at random: the track goes on or has to start again."""
    key = keys_of(token)[kind]
    whole = client.get(key)
    assert isinstance(whole, bytes)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    spoiler, seen = Spoiler(0, []), set()
    for number in range(150):
        high = (8, header, len(whole))[number % 3]
        client.set(key, spoiler.scramble(whole, 0, high))
        seen.add(go_on(judge, token))

    assert 410 in seen
    assert seen <= {200, 409, 410}
    client.set(key, whole)
    assert go_on(judge, token) == 200


def safetensors_file(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    """Return a well-formed file of anything."""
    return safetensors.torch.save(tensors, metadata)


def hand_made(kind: str, token: StateToken, fingerprint: str) -> dict[str, bytes]:
    """Return values that somebody might write by hand."""
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
    judge: Judge, client: redis.Redis, token: StateToken, fingerprint: str, kind: str
) -> None:
    """Whatever is not exactly a value of this step and model ends the track, and says so."""
    key = keys_of(token)[kind]
    whole = client.get(key)
    for name, value in hand_made(kind, token, fingerprint).items():
        client.set(key, value)
        status = go_on(judge, token)

        assert status in {409, 410}, name
    client.set(key, whole)  # type: ignore[arg-type]
    assert go_on(judge, token) == 200


def test_keys_of_another_type_are_told(
    judge: Judge, client: redis.Redis, token: StateToken
) -> None:
    """A list where a value belongs: the store refuses, and so does the function."""
    for key in keys_of(token).values():
        whole = client.get(key)
        client.delete(key)
        client.rpush(key, "a", "b")

        assert go_on(judge, token) == 503
        client.delete(key)
        client.set(key, whole)  # type: ignore[arg-type]
    assert go_on(judge, token) == 200


def test_values_of_another_track_are_refused(judge: Judge, client: redis.Redis) -> None:
    """Bytes copied from one track to another, or names of steps mixed, do not let one in."""
    states = judge.function.track(FRAMES[0], prompts()[:2], [])["states"]
    states = judge.function.track(FRAMES[1], [None] * 2, states)["states"]
    mine, theirs = map(StateToken.parse, states)
    for kind in ("step", "frame"):
        whole = client.get(keys_of(mine)[kind])
        client.set(keys_of(mine)[kind], client.get(keys_of(theirs)[kind]))  # type: ignore[arg-type]

        assert go_on(judge, mine) == 410
        client.set(keys_of(mine)[kind], whole)  # type: ignore[arg-type]
    assert go_on(judge, StateToken(mine.track, theirs.step)) == 410
    assert go_on(judge, StateToken(theirs.track, mine.step)) == 410
    assert go_on(judge, mine) == go_on(judge, theirs) == 200


def states_by_hand(fingerprint: str) -> dict[str, TrackState]:
    """Return states in the right form that no track ever has."""

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


@pytest.mark.parametrize("name", states_by_hand(""))
@pytest.mark.parametrize("value", [0.0, 3e38, -1e-40])
def test_states_made_by_hand_are_answered_or_refused(
    judge: Judge, client: redis.Redis, fingerprint: str, name: str, value: float
) -> None:
    """In the right form and with all its frames: what comes of it is an answer or a reason."""
    state = states_by_hand(fingerprint)[name]
    track = new_id()
    memory = torch.full((16, 8, 8), value, dtype=torch.bfloat16)
    client.set(f"sam2:{{{track}}}:step:{state.newest.id}", encode_state(state), ex=60)
    for id_ in set(state.memory_ids):
        data = encode_memory(memory, frame_id=id_, fingerprint=fingerprint)
        client.set(f"sam2:{{{track}}}:frame:{id_}", data, ex=60)
    token = StateToken(track, state.newest.id)

    allowed = {410} if name == "countless prompts" else {200, 409, 410}
    assert go_on(judge, token) in allowed


def test_ids_made_by_hand_reach_no_other_keys(
    judge: Judge, client: redis.Redis, fingerprint: str, token: StateToken
) -> None:
    """Names inside a state are ids: they cannot point to another track, nor be anything else."""
    rng = random.Random(0)
    for id_ in ("", "*", "a" * 100_000, f"x}}:frame:{token.step}", "\r\nGET x", "\0", "é" * 9):
        newest = PastFrame(new_id(), 1, torch.zeros(64))
        state = TrackState(
            fingerprint, (180, 320), ShapeType.MASK, None,
            (PastFrame(id_, 0, torch.full((64,), rng.random())),), (newest,),
        )  # fmt: skip
        track = new_id()
        client.set(f"sam2:{{{track}}}:step:{newest.id}", encode_state(state), ex=60)

        assert go_on(judge, StateToken(track, newest.id)) == 410
