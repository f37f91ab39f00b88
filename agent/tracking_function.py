"""The tracker as cvat-cli's agents call it: shapes or states on a frame in, shapes out.

cvat-cli loads it through `func.py`.
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
    bad_requests,
    cvat_cli_is_known,
    cvat_cli_version,
)
from agent.worker import MODEL_PARAMETERS, create_function, log
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
    """One frame and the objects to track on it.

    Attributes:
        frame: The frame.
        track: Tracks objects on a frame.
        states: The states of the objects that cvat-cli has asked for so far.
    """

    frame: Frame
    track: Callable[[Frame, Sequence[TrackingState]], list[cvataa.TrackableShape | None]]
    states: list[TrackingState] = field(default_factory=list)

    @cached_property
    def shapes(self) -> list[cvataa.TrackableShape | None]:
        """The objects' shapes, None for objects that are not in the frame; tracked together."""
        return self.track(self.frame, self.states)


class PendingShape:
    """The shape of an object, computed when it is pickled.

    cvat-cli asks for one object after another, collects the answers, and pickles them to send them
    to its main process. By then all objects of the request are known: they are checked before any
    is computed, share forward passes, and are updated together or not at all.

    Args:
        request: The object's state is the last of its `states` so far.
        shape_type: The type of the shape; cvat-cli reads nothing else before it pickles.
    """

    def __init__(self, request: FrameRequest, shape_type: str) -> None:
        self.type = shape_type
        self._request = request
        self._index = len(request.states) - 1

    def __reduce__(self) -> tuple[object, ...]:
        """Unpickle as a shape or None."""
        return copy.copy, (self._request.shapes[self._index],)


class TrackingFunction:
    """A `cvat_sdk.auto_annotation.TrackingFunction`.

    Args:
        settings: Model, device, store.
    """

    spec = cvataa.TrackingFunctionSpec(
        supported_shape_types=[shape_type.value for shape_type in ShapeType]
    )

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._states: SharedStates | None = None
        self._defers = False  # whether a request's objects are tracked together

    def start_agent(self) -> None:
        """Load the model, connect to the store and share states, before the first request.

        Raises:
            SettingsError: Weights or the device are missing; see `model_loader.load_model`.
            StateStoreUnavailableError: The store does not answer.
        """
        log.info("ready: %s", self._tracker.describe() | {"process": str(os.getpid())})
        redis_settings = self._settings.redis
        self._defers = cvat_cli_is_known()
        if not self._defers:
            log.warning(
                "cvat-cli %s is not a tested version, so its states are not shared: tracks end "
                "with this agent, run one per function; tested is %s",
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
            self._states.install()

    def preprocess_image(
        self,
        context: cvataa.TrackingFunctionContext,  # noqa: ARG002  # cvat-sdk's interface
        image: Image.Image,
    ) -> FrameRequest:
        """Start a request; the frame is encoded when the first object needs it."""
        return FrameRequest(Frame.from_image(upright_rgb(image)), self._track)

    def init_tracking_state(
        self,
        context: cvataa.TrackingFunctionShapeContext,  # noqa: ARG002  # cvat-sdk's interface
        pp_image: FrameRequest,
        shape: cvataa.TrackableShape,
    ) -> TrackingState:
        """Start an object.

        Raises:
            BadArError: The shape cannot be drawn on this frame, or the store is unavailable.
        """
        with bad_requests():
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
        """Track an object on a further frame.

        Returns:
            The shape; None if the object is not in the frame (a lost rectangle keeps its last box).
            A `PendingShape` is unpickled as one of them.

        Raises:
            BadArError: The state is of another model, or the store is unavailable; no state has
                changed.
        """
        if not self._defers:
            return self._track(pp_image.frame, [state])[0]
        pp_image.states.append(state)
        return PendingShape(pp_image, context.original_shape_type)

    @cached_property
    def _tracker(self) -> Tracker:
        store = open_store(self._settings)
        store.ping()
        return build_tracker(self._settings, store)

    def _track(
        self, frame: Frame, states: Sequence[TrackingState]
    ) -> list[cvataa.TrackableShape | None]:
        with bad_requests():
            tracked = self._run(frame, [Continue(state.token) for state in states])
            for state, obj in zip(states, tracked, strict=True):
                state.token = obj.token
            if self._states is not None:
                self._states.update(states)
        return [_trackable(obj.shape) for obj in tracked]

    def _run(self, frame: Frame, items: Sequence[Start | Continue]) -> list[TrackedObject]:
        report = Report()
        tracked = self._tracker.run(frame, items, report)
        log.info("tracked: %s", vars(report))
        return tracked


def create(**parameters: object) -> TrackingFunction:
    """Create the function; cvat-cli calls this with the values of its `-p` options.

    Args:
        parameters: See `PARAMETERS`.

    Raises:
        SystemExit: See `worker.create_function`.
    """
    return create_function(TrackingFunction, parameters, PARAMETERS)


def _trackable(shape: Shape | None) -> cvataa.TrackableShape | None:
    # Plain types only: cvat-cli's main process, which unpickles this, cannot import our modules.
    return (
        None if shape is None else cvataa.TrackableShape(type=shape.type.value, points=shape.points)
    )
