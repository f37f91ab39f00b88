from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import StateGoneError, StateMismatchError, TrackerError
from shapes import ShapeType
from state_token import new_id
from track_state import (
    MEMORY_REACH,
    POINTER_REACH,
    PastFrame,
    TrackState,
    decode_memory,
    decode_state,
    encode_memory,
    encode_state,
)

MODEL = "0123456789abcdef"
POINTER = 32
SHAPE = (8, 4, 4)
CHECK = settings(deadline=None, max_examples=300, derandomize=True)


def track(steps: int = 0, **changes: Any) -> TrackState:
    """Return the state of a rectangle after some steps."""
    torch.manual_seed(steps)
    fields: dict[str, Any] = {
        "fingerprint": MODEL,
        "size_hw": (180, 320),
        "shape_type": ShapeType.RECTANGLE,
        "last_box": (1.0, 2.5, 30.0, 40.0),
        "conditioning": (PastFrame(new_id(), 0, torch.randn(POINTER)),),
    }
    state = TrackState(**(fields | changes))
    for _ in range(steps):
        state = state.advance(new_id(), torch.randn(POINTER), state.last_box)
    return state


def decoded(data: bytes, step_id: str, fingerprint: str = MODEL) -> TrackState:
    """Decode as a replica of the test's model does."""
    return decode_state(data, step_id=step_id, fingerprint=fingerprint, obj_ptr_size=POINTER)


def rewritten(data: bytes, *, tensors: Any = None, drop: str = "", **metadata: str) -> bytes:
    """Return a safetensors file with other tensors or metadata."""
    length = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + length])["__metadata__"] | metadata
    fields.pop(drop, None)
    if tensors is None:
        tensors = safetensors.torch.load(data)
    return safetensors.torch.save(tensors, fields)


def with_record(data: bytes, **changes: Any) -> bytes:
    """Return an encoded state whose JSON record is changed."""
    length = struct.unpack("<Q", data[:8])[0]
    record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
    return rewritten(data, state=json.dumps(record | changes))


def frames(state: TrackState) -> list[tuple[str, int, list[float]]]:
    """Return a state's frames, comparable."""
    past = state.conditioning + state.past
    return [(frame.id, frame.step, frame.obj_ptr.tolist()) for frame in past]


@pytest.mark.parametrize("steps", [0, 1, 6, 7, 15, 16, 40])
@pytest.mark.parametrize(
    ("shape_type", "last_box"), [("mask", None), ("rectangle", (0.1, 0.2, 319.5, 1e3))]
)
def test_state_comes_back_from_its_bytes(steps: int, shape_type: str, last_box: Any) -> None:
    """Every field and every bit of the pointers survives."""
    state = track(steps, shape_type=ShapeType(shape_type), last_box=last_box)
    again = decoded(encode_state(state), state.newest.id)

    assert frames(again) == frames(state)
    assert len(again.conditioning) == 1
    assert (again.fingerprint, again.size_hw, again.shape_type, again.last_box) == (
        MODEL, (180, 320), ShapeType(shape_type), last_box,
    )  # fmt: skip


def test_memory_comes_back_bit_for_bit() -> None:
    """Every finite bfloat16, including subnormal numbers and minus zero."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    memory = bits.view(torch.bfloat16)
    memory = memory[torch.isfinite(memory)].reshape(2, 255, 128)
    data = encode_memory(memory, frame_id="a", fingerprint=MODEL)
    again = decode_memory(data, frame_id="a", fingerprint=MODEL, shape=(2, 255, 128))

    assert again.dtype == torch.bfloat16
    assert torch.equal(again.view(torch.int16), memory.view(torch.int16))


def test_memory_may_be_a_view() -> None:
    """One object of a batch, or a permuted map, is written by its values and without the rest."""
    batch = torch.randn(3, 4, 4, 8).to(torch.bfloat16)
    view = batch[1].permute(2, 0, 1)
    data = encode_memory(view, frame_id="a", fingerprint=MODEL)

    whole = encode_memory(batch[1], frame_id="a", fingerprint=MODEL)

    assert torch.equal(decode_memory(data, frame_id="a", fingerprint=MODEL, shape=SHAPE), view)
    assert len(data) == len(whole) < 600  # the one object only


def test_state_holds_what_sam2_attends_to() -> None:
    """The conditioning frame, fifteen pointers and six memories, however long the track."""
    state = track(40)

    assert [frame.step for frame in state.past] == list(range(26, 41))
    assert len(state.past) == POINTER_REACH
    assert state.newest.step == 40
    assert state.memory_ids == (
        state.conditioning[0].id, *(frame.id for frame in state.past[-MEMORY_REACH:]),
    )  # fmt: skip


def test_young_track_holds_all_its_frames() -> None:
    """Until the sixth step every frame memory is attended to."""
    state = track(3)

    assert state.memory_ids == tuple(frame.id for frame in state.conditioning + state.past)
    assert track(0).newest.step == 0


def test_advancing_leaves_the_old_state_alone() -> None:
    """States are immutable: two continuations of one state are independent."""
    state = track(20)
    before = frames(state)
    first = state.advance("first", torch.zeros(POINTER), None)
    second = state.advance("second", torch.ones(POINTER), (1.0, 1.0, 2.0, 2.0))

    assert frames(state) == before
    assert (first.newest.id, second.newest.id) == ("first", "second")
    assert (first.last_box, second.last_box) == (None, (1.0, 1.0, 2.0, 2.0))
    assert first.newest.step == second.newest.step == 21


def test_state_stays_small() -> None:
    """A state of the real models (256 numbers per pointer) takes some 17 KB."""
    pointer = torch.zeros(256)
    state = track(0, conditioning=(PastFrame(new_id(), 0, pointer),))
    for _ in range(30):
        state = state.advance(new_id(), pointer, None)

    assert len(encode_state(state)) < 20_000


def test_state_of_another_model_is_told_apart() -> None:
    """It is not damaged; the message names both models."""
    state = track(2)

    with pytest.raises(StateMismatchError, match=rf"belongs to model {MODEL}, this .* runs other"):
        decoded(encode_state(state), state.newest.id, fingerprint="other")


@pytest.mark.parametrize("schema", ["0", "2", "", "x"])
def test_state_of_another_schema_is_told_apart(schema: str) -> None:
    """A rolling update may meet states of another version of this function."""
    state = track(2)
    data = rewritten(encode_state(state), schema=schema)
    memory = encode_memory(torch.zeros(SHAPE), frame_id="a", fingerprint=MODEL)

    with pytest.raises(StateMismatchError, match=f"has schema '{schema}', this function reads 1"):
        decoded(data, state.newest.id)
    with pytest.raises(StateMismatchError, match="has schema"):
        decode_memory(
            rewritten(memory, schema=schema), frame_id="a", fingerprint=MODEL, shape=SHAPE
        )


STATE = track(3)
DATA = encode_state(STATE)
ID = STATE.newest.id
POINTERS = torch.zeros(4, POINTER)
ENTRIES = [[frame.id, frame.step] for frame in STATE.past]
MEMORY = encode_memory(torch.zeros(SHAPE, dtype=torch.bfloat16), frame_id=ID, fingerprint=MODEL)
DAMAGED_FILES = {
    "empty": b"",
    "short": DATA[:7],
    "without its end": DATA[:-1],
    "with more": DATA + b"x",
    "text": b"not safetensors at all",
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
    "huge header": struct.pack("<Q", 2**63) + DATA[8:],
    "of another step": rewritten(DATA, id=new_id()),
    "a memory": MEMORY,
    "without metadata": safetensors.torch.save({"obj_ptrs": POINTERS}),
    **{f"without {name}": rewritten(DATA, drop=name)
       for name in ("schema", "kind", "id", "fingerprint", "state")},
    "not JSON": rewritten(DATA, state="{"),
    "deep JSON": rewritten(DATA, state="[" * 100_000),
    "a list": rewritten(DATA, state="[]"),
    "no pointers": rewritten(DATA, tensors={"other": POINTERS + 1}),
    "more tensors": rewritten(DATA, tensors={"obj_ptrs": POINTERS, "other": POINTERS + 1}),
    "fewer pointers": rewritten(DATA, tensors={"obj_ptrs": POINTERS[1:]}),
    "longer pointers": rewritten(DATA, tensors={"obj_ptrs": torch.zeros(4, POINTER + 1)}),
    "flat pointers": rewritten(DATA, tensors={"obj_ptrs": POINTERS.flatten()}),
    "half pointers": rewritten(DATA, tensors={"obj_ptrs": POINTERS.half()}),
    "whole pointers": rewritten(DATA, tensors={"obj_ptrs": POINTERS.int()}),
    "NaN pointers": rewritten(DATA, tensors={"obj_ptrs": POINTERS / 0}),
    "no conditioning": with_record(DATA, conditioning=[]),
    "unordered": with_record(DATA, past=ENTRIES[::-1]),
    "same step twice": with_record(DATA, past=[ENTRIES[0], ENTRIES[0], ENTRIES[2]]),
    "another newest": with_record(DATA, past=[*ENTRIES[:2], [new_id(), 3]]),
    "triples": with_record(DATA, past=[[*entry, 1] for entry in ENTRIES]),
    "past is a number": with_record(DATA, past=3),
    "infinite step": with_record(DATA, past=[*ENTRIES[:2], [ID, float("inf")]]),
    "step beyond reason": with_record(DATA, past=[*ENTRIES[:2], [ID, 10**30]]),
    "negative step": with_record(DATA, conditioning=[[STATE.conditioning[0].id, -1]]),
    "long past": with_record(DATA, past=[[str(i), i] for i in range(1, 17)]),
    "another shape": with_record(DATA, shape_type="skeleton"),
    "no size": with_record(DATA, size_hw=None),
    "three sides": with_record(DATA, size_hw=[1, 2, 3]),
    "three edges": with_record(DATA, last_box=[1, 2, 3]),
    "NaN edge": with_record(DATA, last_box=[1, 2, 3, float("nan")]),
    "text edge": with_record(DATA, last_box=[1, 2, 3, "x"]),
}  # fmt: skip
DAMAGED_MEMORIES = {
    "empty": b"",
    "without its end": MEMORY[:-1],
    "of another frame": rewritten(MEMORY, id=new_id()),
    "a step": DATA,
    "another name": rewritten(MEMORY, tensors={"memory": torch.zeros(SHAPE).bfloat16()}),
    "float32": rewritten(MEMORY, tensors={"maskmem_features": torch.zeros(SHAPE)}),
    "float16": rewritten(MEMORY, tensors={"maskmem_features": torch.zeros(SHAPE).half()}),
    "another size": rewritten(MEMORY, tensors={"maskmem_features": torch.ones(8, 4).bfloat16()}),
    "batched": rewritten(MEMORY, tensors={"maskmem_features": torch.zeros(1, *SHAPE).bfloat16()}),
    "infinite": rewritten(MEMORY, tensors={"maskmem_features": torch.ones(SHAPE).bfloat16() / 0}),
    "more": rewritten(MEMORY, tensors={"maskmem_features": torch.zeros(SHAPE).bfloat16(),
                                       "other": torch.zeros(1)}),
}  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_damaged_state_is_gone(data: bytes) -> None:
    """Nothing of a damaged state is used: the track starts again."""
    with pytest.raises(StateGoneError, match=f"{ID[:6]}… is damaged: start the track again"):
        decoded(data, ID)


@pytest.mark.parametrize("data", DAMAGED_MEMORIES.values(), ids=DAMAGED_MEMORIES)
def test_damaged_memory_is_gone(data: bytes) -> None:
    """Another frame's memory, shape or type never reaches the network."""
    with pytest.raises(StateGoneError, match=f"{ID[:6]}… is damaged: start the track again"):
        decode_memory(data, frame_id=ID, fingerprint=MODEL, shape=SHAPE)


byte_changes = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4
)


@pytest.mark.parametrize("data", [DATA, MEMORY], ids=["state", "memory"])
@given(changes=byte_changes, end=st.integers(0, 20), more=st.binary(max_size=8))
@CHECK
def test_changed_bytes_never_fail_otherwise(
    data: bytes, changes: list[tuple[int, int]], end: int, more: bytes
) -> None:
    """Whatever the store returns, it is decoded or refused with an error for the caller."""
    damaged = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for position, value in changes:  # mostly in the header, which is parsed
        damaged[position % (header if position % 8 else len(data))] = value
    damaged = damaged[: len(damaged) - end] + more
    try:
        decoded(bytes(damaged), ID)
        decode_memory(bytes(damaged), frame_id=ID, fingerprint=MODEL, shape=SHAPE)
    except TrackerError as err:
        refusal = err

    assert refusal.status in {409, 410}  # no bytes are both a state and a memory


@given(st.binary(max_size=300))
@CHECK
def test_any_bytes_never_fail_otherwise(data: bytes) -> None:
    """A value of another program is refused with an error for the caller."""
    with pytest.raises(TrackerError, match="start"):
        decoded(data, ID)
    with pytest.raises(TrackerError, match="start"):
        decoded(struct.pack("<Q", len(data)) + data, ID)
