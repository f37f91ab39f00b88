"""Owns what cvat-cli's agents call: an auto-annotation function that tracks, and its parameters.

Adds no tracking of its own; `func.py` is the file that cvat-cli is given.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cvat_sdk.auto_annotation as cvataa
from PIL import Image

from agent.shared_states import (
    KNOWN_VERSIONS,
    SharedStates,
    TrackingState,
    cvat_cli_is_known,
    cvat_cli_version,
    refusals,
)
from agent.worker import MODEL_PARAMETERS, log, make
from images import upright_rgb
from object_requests import Continue, Start
from protocol import parse_shape
from settings import Settings
from shapes import Shape, ShapeType
from state_store import connect, open_store
from tracker import Frame, Report, TrackedObject, Tracker, build_tracker

PARAMETERS = (*MODEL_PARAMETERS, "batch_objects", "polygon_tolerance", "request_limit")


@dataclass(eq=False)
class FrameRequest:
    """What cvat-cli asks of one frame.

    Attributes:
        frame: The frame.
        find: Finds objects on it.
        objects: Those asked for so far.
    """

    frame: Frame
    find: Callable[[Frame, Sequence[TrackingState]], list[cvataa.TrackableShape | None]]
    objects: list[TrackingState] = field(default_factory=list)

    @cached_property
    def answers(self) -> list[cvataa.TrackableShape | None]:
        """Where the objects are, found together; None for those that are not in the frame."""
        return self.find(self.frame, self.objects)


class PendingShape:
    """Where an object is, found as late as possible.

    cvat-cli asks for one object after another, collects the answers, and pickles them to send them
    to its main process. By then all objects of the request are known: they are checked before any
    is computed, share forward passes, and move on together or not at all.

    Args:
        request: The object is the last of its `objects` so far.
        shape_type: What cvat-cli may know of the shape before.
    """

    def __init__(self, request: FrameRequest, shape_type: str) -> None:
        self.type = shape_type
        self._request = request
        self._index = len(request.objects) - 1

    def __reduce__(self) -> tuple[object, ...]:
        """Arrive as a shape or None."""
        return copy.copy, (self._request.answers[self._index],)


class TrackingFunction:
    """A tracking function in cvat-sdk's sense (`cvat_sdk.auto_annotation.TrackingFunction`).

    Args:
        settings: Model, device, store.
    """

    spec = cvataa.TrackingFunctionSpec(supported_shape_types=[one.value for one in ShapeType])

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._states: SharedStates | None = None
        self._answers_together = False

    def start_agent(self) -> None:
        """Load the model, reach the store and share the states, before the first request.

        Raises:
            SettingsError: Weights or the device are missing; see `model_loader.load_model`.
            StateStoreUnavailableError: The store does not answer.
        """
        log.info("ready: %s", self._tracker.describe() | {"process": str(os.getpid())})
        redis_settings = self._settings.redis
        self._answers_together = cvat_cli_is_known()
        if not self._answers_together:
            log.warning(
                "cvat-cli %s may keep its states in a way unknown to this function: tracks end "
                "with this agent, run one per function; known is %s",
                cvat_cli_version(),
                ", ".join(KNOWN_VERSIONS),
            )
        elif redis_settings is None:
            log.warning(
                "CVAT_FUNCTIONS_REDIS_HOST is not set: tracks end with this agent, run one per "
                "function"
            )
        else:
            client, ttl_s = connect(redis_settings), self._settings.state_ttl_s
            self._states = SharedStates(client=client, ttl_s=ttl_s)
            self._states.take_over()

    def preprocess_image(
        self,
        context: cvataa.TrackingFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        image: Image.Image,
    ) -> FrameRequest:
        """Begin a request; the frame is encoded when the first object needs it."""
        return FrameRequest(Frame.from_image(upright_rgb(image)), self._find)

    def init_tracking_state(
        self,
        context: cvataa.TrackingFunctionShapeContext,  # noqa: ARG002  # cvat-sdk's interface
        pp_image: FrameRequest,
        shape: cvataa.TrackableShape,
    ) -> TrackingState:
        """Start an object.

        Raises:
            BadArError: The shape cannot be drawn on this frame, or the store is away.
        """
        with refusals():
            fields = {"type": shape.type, "points": shape.points}
            start = Start(parse_shape(fields, self._settings.limits))
            (started,) = self._run(pp_image.frame, [start])
        return TrackingState(started.token)

    def track(
        self,
        context: cvataa.TrackingFunctionShapeContext,
        pp_image: FrameRequest,
        state: TrackingState,
    ) -> cvataa.TrackableShape | PendingShape | None:
        """Find an object on a further frame.

        Returns:
            None when it is not in the frame, but for rectangles, which keep their last box. A
            `PendingShape` becomes one or the other.

        Raises:
            BadArError: The state is of another model, or the store is away; nothing has moved.
        """
        if not self._answers_together:
            return self._find(pp_image.frame, [state])[0]
        pp_image.objects.append(state)
        return PendingShape(pp_image, context.original_shape_type)

    @cached_property
    def _tracker(self) -> Tracker:
        store = open_store(self._settings)
        store.ping()
        return build_tracker(self._settings, store)

    def _find(
        self, frame: Frame, objects: Sequence[TrackingState]
    ) -> list[cvataa.TrackableShape | None]:
        with refusals():
            found = self._run(frame, [Continue(one.token) for one in objects])
            for one, here in zip(objects, found, strict=True):
                one.token = here.token
            if self._states is not None:
                self._states.move(objects)
        return [_trackable(here.shape) for here in found]

    def _run(self, frame: Frame, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        report = Report()
        found = self._tracker.run(frame, items, report)
        log.info("tracked: %s", vars(report))
        return found


def create(**parameters: object) -> TrackingFunction:
    """Make the function; what cvat-cli calls with the values of its `-p` options.

    Args:
        parameters: See `PARAMETERS`.

    Raises:
        SystemExit: See `worker.make`.
    """
    return make(TrackingFunction, parameters, PARAMETERS)


def _trackable(shape: Shape | None) -> cvataa.TrackableShape | None:
    # Plain types only: cvat-cli's main process, where this arrives, does not know our modules.
    return (
        None if shape is None else cvataa.TrackableShape(type=shape.type.value, points=shape.points)
    )
