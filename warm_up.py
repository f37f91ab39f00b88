"""Run the model before the first request, so that no annotator waits for it to warm up."""

from __future__ import annotations

from PIL import Image

from model_handler import FrameFeatures, ModelHandler, ObjectOutput
from shapes import ShapeType, SizeHW
from track_state import POINTER_REACH, PastFrame, TrackState

SIZE_HW: SizeHW = (64, 64)


def warm_up(model: ModelHandler) -> None:
    """Start an object and track it; of a compiled network compile all graphs.

    Graphs depend on the prompt, on the size of the batch, and on the numbers of frame memories and
    object pointers until both are full.

    Raises:
        torch.OutOfMemoryError: One object alone does not fit into the device's memory.
    """
    blank = Image.new("RGB", SIZE_HW)
    features = model.encode_frame("warm-up", SIZE_HW, lambda: model.pixels(blank))
    started = model.start_from_box(features, (16.0, 16.0, 48.0, 48.0))
    mask = model.full_size_mask(features, started)
    if not model.compiled:
        _track(model, features, started, objects=1, frames=1)
    else:
        model.start_from_mask(features, model.mask_prompt(mask))
        objects = 1
        while objects <= model.batch_objects:  # which shrinks if a batch does not fit
            _track(model, features, started, objects=objects, frames=POINTER_REACH + 1)
            objects *= 2
    model.free_memory()


def _track(
    model: ModelHandler,
    features: FrameFeatures,
    started: ObjectOutput,
    *,
    objects: int,
    frames: int,
) -> None:
    """Track equal objects over equal frames."""
    first = PastFrame("0", 0, started.obj_ptr)
    state = TrackState(model.fingerprint, SIZE_HW, ShapeType.RECTANGLE, None, (first,))
    memories = {first.id: started.memory}
    for _ in range(frames):
        output = model.step(features, [state] * objects, memories, free_memory=model.free_memory)[0]
        state = state.advance(str(state.newest.step + 1), output.obj_ptr, None)
        memories[state.newest.id] = output.memory
