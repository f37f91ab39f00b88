"""Track objects through a clip with the function's handler, in this process."""

import base64
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import numpy.typing as npt
from nuclio_sdk import Context, Event, Logger

import main as entry_point
from shapes import Mask, Shape, ShapeType, mask_to_shape, shape_to_mask


@dataclass(frozen=True, eq=False)
class Answer:
    """One object on one frame.

    `shape` is the function's answer, None where the object is lost; `mask` is `(H, W)` bool: the
    drawn shape, but for a rectangle the mask that the box was computed from.
    """

    shape: Shape | None
    mask: Mask


@contextmanager
def micro_defaults() -> Iterator[None]:
    """Set defaults for a function: the micro weights, the CPU, and no Redis."""
    defaults = {"SAM2_MODEL_ID": "micro", "SAM2_DEVICE": "cpu"}
    given = {name: os.environ[name] for name in os.environ if name != "CVAT_FUNCTIONS_REDIS_HOST"}
    with patch.dict(os.environ, defaults | given, clear=True):
        yield


class FunctionClient:
    """Start the function as Nuclio does, with the store in memory, and send it frames."""

    def __init__(self) -> None:
        """Start the function; `load_s` is its loading time, `request_ms` collects times."""
        self._context = Context(logger=Logger(level="INFO"), worker_id=0)
        begin = time.perf_counter()
        with micro_defaults():
            entry_point.init_context(self._context)
        self.load_s = time.perf_counter() - begin
        self.request_ms: list[float] = []
        self._masks: list[Mask] = []
        self._record_masks()

    def follow(
        self, frames: npt.NDArray[np.uint8], masks: list[Mask], kinds: list[ShapeType]
    ) -> list[list[Answer]]:
        """Prompt objects on the first frame and track them to the last.

        Args:
            frames: `(T, H, W, 3)` uint8 RGB.
            masks: The true mask of each object on the first frame, `(H, W)` bool.
            kinds: The shape type that each is prompted with.

        Returns:
            For each of the frames 1 to T - 1, one answer per object.
        """
        prompts = [mask_to_shape(mask, kind) for mask, kind in zip(masks, kinds, strict=True)]
        assert all(prompt is not None for prompt in prompts)
        shapes = [{"type": str(s.type), "points": list(s.points)} for s in prompts if s]
        states = self._post(frames[0], shapes, [])["states"]
        answers = []
        for frame in frames[1:]:
            self._masks.clear()
            reply = self._post(frame, [None] * len(kinds), states)
            states = reply["states"]
            answers.append(
                [
                    self._read(shape, mask)
                    for shape, mask in zip(reply["shapes"], self._masks, strict=True)
                ]
            )
        return answers

    def _post(
        self, frame: npt.NDArray[np.uint8], shapes: list[Any], states: list[str]
    ) -> dict[str, Any]:
        _, png = cv2.imencode(
            ".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1]
        )
        image = base64.b64encode(png.tobytes()).decode()
        body = {"image": image, "shapes": shapes, "states": states}
        event = Event(body=body, content_type="application/json", method="POST")
        begin = time.perf_counter()
        response = entry_point.handler(self._context, event)
        self.request_ms.append((time.perf_counter() - begin) * 1000)
        assert response.status_code == 200, response.body
        reply: dict[str, Any] = json.loads(response.body)
        return reply

    def _read(self, wire: dict[str, Any] | None, mask: Mask) -> Answer:
        if wire is None:
            return Answer(None, np.zeros_like(mask))
        shape = Shape(ShapeType(wire["type"]), wire["points"])
        if shape.type is ShapeType.RECTANGLE:
            # A lost object's rectangle keeps its last box; only the mask shows the loss.
            return Answer(shape if mask.any() else None, mask)
        return Answer(shape, shape_to_mask(shape, mask.shape))

    def _record_masks(self) -> None:
        """Collect the masks that answers are made from: a rectangle's answer has only the box."""
        handler = self._context.user_data.service.tracker._model  # noqa: SLF001
        original = handler.full_size_mask

        def recorded(*args: Any, **kwargs: Any) -> Mask:  # noqa: ANN401
            mask: Mask = original(*args, **kwargs)
            self._masks.append(mask)
            return mask

        handler.full_size_mask = recorded
