"""Owns where cvat-cli keeps its tracking states: in Redis, shared by all agents of a function.

cvat-cli names a state once, when an object is started, and keeps what the name stands for in the
memory of one agent. Here the name is the token of the object's first step, and behind it lies

    key                          type    holds                              lives
    sam2:{<track>}:agent:<step>  string  JSON: the state's task, image      state TTL from its
                                         size, shape type, newest token     last frame

The only module that knows cvat-cli's insides; it knows nothing of SAM 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import redis
from cvat_sdk.auto_annotation import BadFunctionError

from errors import BadRequestError, TrackerError
from state_store import translated_errors
from state_token import StateToken

try:
    from cvat_cli._internal import agent_driver_tracking as driver
    from cvat_cli._internal.agent_driver import BadArError
except ImportError:  # another cvat-cli, and not a known one
    driver = None
    # the other error whose words CVAT is told; of all others it hears "Unknown error"
    BadArError = BadFunctionError

# The versions of cvat-cli whose agents were read and tested: SHA-256 of the file that keeps states.
KNOWN_VERSIONS = {"2.80.0": "ab301f606145652b2e155179ed46a018d8331d83d71d03e1aa05ab4cdd58c9e3"}


@dataclass(frozen=True)
class Record:
    """What lies behind a state's name, beside its newest token.

    Attributes:
        key: Where, in Redis.
        task_id: The task that the object was started in.
        image_dims: Width and height of the frame it was started on.
        shape_type: What the annotator drew.
    """

    key: str
    task_id: int
    image_dims: tuple[int, int]
    shape_type: str


@dataclass
class TrackingState:
    """What cvat-cli hands the function of one state.

    Attributes:
        token: The object's newest step; moves on with each frame, while the state's name stays.
        record: Where it came from; None when cvat-cli keeps it in the agent's memory.
    """

    token: StateToken
    record: Record | None = None


class SharedStates:
    """Stands in for cvat-cli's `_TrackingStateContainer`, with the same refusals.

    Args:
        client: Connection pool to the server, answering bytes.
        ttl_s: Life of a state from its last frame, in seconds.
    """

    def __init__(self, *, client: redis.Redis, ttl_s: int) -> None:
        self._client = client
        self._ttl_s = ttl_s

    def take_over(self) -> None:
        """Be what cvat-cli keeps states in; to be called before it makes a container of its own."""
        driver._TrackingStateContainer = lambda: self  # noqa: SLF001  # there is no other way in

    def store(
        self, state: TrackingState, shape_type: str, task_id: int, image_dims: tuple[int, int]
    ) -> str:
        """Keep a new object's state and return the name that CVAT is to know it by."""
        key = _key(state.token)
        with refusals():
            self.move([TrackingState(state.token, Record(key, task_id, image_dims, shape_type))])
        return str(state.token)

    def retrieve(
        self, state_id: str, task_id: int, image_dims: tuple[int, int]
    ) -> tuple[TrackingState, str]:
        """Return a state and its shape type.

        Raises:
            BadArError: It is gone, or of another task or image size. Names are unguessable; even
                so, whoever got hold of one learns nothing of a task that is not theirs.
        """
        try:
            key = _key(StateToken.parse(state_id))
        except BadRequestError:
            raise _not_found(state_id) from None
        with refusals(), translated_errors():
            data: Any = self._client.get(key)
        if data is None:
            raise _not_found(state_id)
        fields = json.loads(data)
        record = Record(key, fields["task"], tuple(fields["image_dims"]), fields["shape_type"])
        if record.task_id != task_id:
            raise BadArError(f"Tracking state {state_id!r} is not for task #{task_id}")
        if record.image_dims != image_dims:
            raise BadArError("Image sizes of the start frame and the current frame are different")
        return TrackingState(StateToken.parse(fields["token"]), record), record.shape_type

    def move(self, states: Sequence[TrackingState]) -> None:
        """Write where states stand now: all of them or none.

        Raises:
            StateStoreUnavailableError: The server is away; they stand where they stood.
        """
        with translated_errors():
            pipeline = self._client.pipeline(transaction=True)
            for state in states:
                assert state.record is not None
                fields = {
                    "task": state.record.task_id,
                    "image_dims": state.record.image_dims,
                    "shape_type": state.record.shape_type,
                    "token": str(state.token),
                }
                pipeline.set(state.record.key, json.dumps(fields), ex=self._ttl_s)
            pipeline.execute()

    def prune(self) -> None:
        """Return: Redis forgets by itself."""


def cvat_cli_version() -> str:
    """Return the version of the cvat-cli around us."""
    try:
        return version("cvat-cli")
    except PackageNotFoundError:
        return "of no version"


def cvat_cli_is_known() -> bool:
    """Tell whether the cvat-cli around us keeps its states as this module believes."""
    expected = KNOWN_VERSIONS.get(cvat_cli_version())
    if driver is None or expected is None:
        return False
    return hashlib.sha256(Path(driver.__file__).read_bytes()).hexdigest() == expected


@contextmanager
def refusals() -> Iterator[None]:
    """Turn our errors into the one whose words cvat-cli passes on, and whose class it can load."""
    try:
        yield
    except TrackerError as err:
        raise BadArError(str(err)) from err


def _key(token: StateToken) -> str:
    return f"sam2:{{{token.track}}}:agent:{token.step}"


def _not_found(state_id: str) -> Exception:
    error: Exception = BadArError(f"Tracking state {state_id!r} not found - possibly expired")
    return error
