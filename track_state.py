"""The state of a track after one frame, and its encoding as bytes.

Per track and frame two values are stored: the state (`TrackState`, some 17 KB) and one frame memory
(SAM 2's memory features, 0.5 MB at 1024 px), under the id of the step that made it. Both are
safetensors. Decoding checks everything: another process wrote the bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from safetensors import SafetensorError

from errors import StateGoneError, StateMismatchError
from shapes import Box, ShapeType, SizeHW

SCHEMA_VERSION = 1

# SAM 2 attends to the memory features of the six frames before the current one (num_maskmem - 1)
# and to fifteen of their object pointers (max_obj_ptrs_in_encoder - 1): sam2/modeling/sam2_base.py.
MEMORY_REACH = 6
POINTER_REACH = 15

MAX_STEPS = 1 << 31  # more than any video has frames
MAX_CONDITIONING = 64  # each is a frame memory to read and attend to at every step


@dataclass(frozen=True, eq=False)
class PastFrame:
    """One earlier frame of a track, without its memory features.

    Attributes:
        id: Id of its step and of its frame memory.
        step: Its number, counted from the track's first frame; only differences matter.
        obj_ptr: Object pointer `(C,)`, float32, on the CPU.
    """

    id: str
    step: int
    obj_ptr: torch.Tensor


@dataclass(frozen=True, eq=False)
class TrackState:
    """Everything needed to track one object one frame further, without the memory features.

    Attributes:
        fingerprint: Identifies model, weights and input size (see `ModelHandler`).
        size_hw: Height and width of the track's frames.
        shape_type: Type of the annotator's shape, and of every answer.
        last_box: Box XYXY of the object's last mask, far edge excluded; None but for rectangles.
        conditioning: Conditioning frames, which are attended to for ever.
        past: At most the last 15 other frames, oldest first.
    """

    fingerprint: str
    size_hw: SizeHW
    shape_type: ShapeType
    last_box: Box | None
    conditioning: tuple[PastFrame, ...]
    past: tuple[PastFrame, ...] = ()

    @property
    def newest(self) -> PastFrame:
        """The last frame that was tracked."""
        return self.past[-1] if self.past else self.conditioning[-1]

    @property
    def memory_ids(self) -> tuple[str, ...]:
        """Ids of the frame memories that the next step attends to."""
        frames = self.conditioning + self.past[-MEMORY_REACH:]
        return tuple(frame.id for frame in frames)

    def advance(self, frame_id: str, obj_ptr: torch.Tensor, last_box: Box | None) -> TrackState:
        """Return the state after one more frame; this state does not change.

        Args:
            frame_id: Id of the new step and its frame memory.
            obj_ptr: The new object pointer `(C,)`, float32, on the CPU.
            last_box: New value of the attribute.
        """
        frame = PastFrame(frame_id, self.newest.step + 1, obj_ptr)
        return replace(self, last_box=last_box, past=(*self.past, frame)[-POINTER_REACH:])


def encode_state(state: TrackState) -> bytes:
    """Encode a state; `decode_state` is its inverse."""
    frames = state.conditioning + state.past
    record = {
        "size_hw": state.size_hw,
        "shape_type": state.shape_type,
        "last_box": state.last_box,
        "conditioning": [[frame.id, frame.step] for frame in state.conditioning],
        "past": [[frame.id, frame.step] for frame in state.past],
    }
    tensors = {"obj_ptrs": torch.stack([frame.obj_ptr for frame in frames])}
    return safetensors.torch.save(
        tensors,
        _metadata("step", state.newest.id, state.fingerprint) | {"state": json.dumps(record)},
    )


def decode_state(data: bytes, *, step_id: str, fingerprint: str, obj_ptr_size: int) -> TrackState:
    """Decode and check a state.

    Args:
        data: Bytes from the store.
        step_id: Id of the expected step.
        fingerprint: Of this replica's model.
        obj_ptr_size: C, the length of this model's object pointers.

    Raises:
        StateMismatchError: Another model or another version of this function wrote it.
        StateGoneError: The bytes are damaged, or are not this step.
    """
    tensors, metadata = _load(data, "step", step_id, fingerprint)
    try:
        record = json.loads(metadata["state"])
        conditioning = [(str(id_), int(step)) for id_, step in record["conditioning"]]
        past = [(str(id_), int(step)) for id_, step in record["past"]]
        obj_ptrs = tensors.pop("obj_ptrs")
        height, width = (int(side) for side in record["size_hw"])
        shape_type = ShapeType(record["shape_type"])
        last_box = None
        if record["last_box"] is not None:
            x1, y1, x2, y2 = (float(edge) for edge in record["last_box"])
            last_box = (x1, y1, x2, y2)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as err:
        raise _damaged(step_id) from err
    entries = conditioning + past
    steps = [step for _, step in entries]
    if (
        tensors
        or not conditioning
        or len(conditioning) > MAX_CONDITIONING
        or len(past) > POINTER_REACH
        or steps != sorted(set(steps))
        or not 0 <= steps[0] <= steps[-1] < MAX_STEPS
        or not all(map(math.isfinite, last_box or ()))
        or entries[-1][0] != step_id
        or obj_ptrs.dtype != torch.float32
        or obj_ptrs.shape != (len(entries), obj_ptr_size)
        or not bool(torch.isfinite(obj_ptrs).all())
    ):
        raise _damaged(step_id)
    frames = tuple(
        PastFrame(id_, step, obj_ptr)
        for (id_, step), obj_ptr in zip(entries, obj_ptrs, strict=True)
    )
    return TrackState(
        fingerprint=fingerprint,
        size_hw=(height, width),
        shape_type=shape_type,
        last_box=last_box,
        conditioning=frames[: len(conditioning)],
        past=frames[len(conditioning) :],
    )


def encode_memory(memory: torch.Tensor, *, frame_id: str, fingerprint: str) -> bytes:
    """Encode one frame's memory features `(M, h, w)`, bfloat16; `decode_memory` is the inverse."""
    tensors = {"maskmem_features": memory.cpu().contiguous()}
    return safetensors.torch.save(tensors, _metadata("frame", frame_id, fingerprint))


def decode_memory(
    data: bytes, *, frame_id: str, fingerprint: str, shape: tuple[int, int, int]
) -> torch.Tensor:
    """Decode and check one frame's memory features.

    Returns:
        `(M, h, w)`, bfloat16 (NumPy has no such type, hence torch all the way), on the CPU.

    Raises:
        StateMismatchError: Another model or another version of this function wrote it.
        StateGoneError: The bytes are damaged, or belong to another frame.
    """
    tensors, _ = _load(data, "frame", frame_id, fingerprint)
    memory = tensors.get("maskmem_features")
    if (
        memory is None
        or len(tensors) != 1
        or memory.dtype != torch.bfloat16
        or memory.shape != shape
        or not bool(torch.isfinite(memory).all())
    ):
        raise _damaged(frame_id)
    return memory


def _metadata(kind: str, id_: str, fingerprint: str) -> dict[str, str]:
    return {"schema": str(SCHEMA_VERSION), "kind": kind, "id": id_, "fingerprint": fingerprint}


def _load(
    data: bytes, kind: str, id_: str, fingerprint: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        # safetensors checks the header but does not hand out its metadata when reading bytes.
        header_bytes = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
        values = [metadata[name] for name in ("schema", "kind", "id", "fingerprint")]
    except (SafetensorError, KeyError, ValueError, TypeError) as err:
        raise _damaged(id_) from err
    schema, actual_kind, actual_id, actual_fingerprint = values
    if schema != str(SCHEMA_VERSION):
        raise StateMismatchError(
            f"state has schema {schema!r:.40}, this function reads {SCHEMA_VERSION}: start the "
            "track again"
        )
    if actual_fingerprint != fingerprint:
        raise StateMismatchError(
            f"state belongs to model {actual_fingerprint:.40}, this function runs {fingerprint}: "
            "start the track again"
        )
    if (actual_kind, actual_id) != (kind, id_):
        raise _damaged(id_)
    return tensors, metadata


def _damaged(id_: str) -> StateGoneError:
    return StateGoneError(f"the stored state {id_[:6]}… is damaged: start the track again")
