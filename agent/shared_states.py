"""Store cvat-cli's tracking states in Redis, shared by all agents of a function.

cvat-cli names a state once, when an object is started, and stores the state in the memory of one
agent. Here the name is the token of the object's first step, and the state is stored as

    key                          type    holds                              lives
    sam2:{<track>}:agent:<step>  string  JSON: the state's task, image      state TTL from its
                                         size, shape type, newest token     last frame

This is the only module that depends on private parts of cvat-cli.
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
except ImportError:  # an unknown version of cvat-cli
    driver = None
    # The only other error whose message CVAT gets; for every other error it gets "Unknown error".
    BadArError = BadFunctionError

# The versions of cvat-cli that this module was tested with: SHA-256 of the file that stores states.
# That file is the same in both.
KNOWN_VERSIONS = dict.fromkeys(
    ("2.79.0", "2.80.0"), "ab301f606145652b2e155179ed46a018d8331d83d71d03e1aa05ab4cdd58c9e3"
)


@dataclass(frozen=True)
class Record:
    """The stored fields of a state, except its newest token.

    Attributes:
        key: The key in Redis.
        task_id: The task that the object was started in.
        image_dims: Width and height of the frame that the object was started on.
        shape_type: The type of the shape that the annotator drew.
    """

    key: str
    task_id: int
    image_dims: tuple[int, int]
    shape_type: str


@dataclass
class TrackingState:
    """One object's state, as cvat-cli passes it to the function.

    Attributes:
        token: The object's newest step. It changes with each frame; the state's name does not.
        record: The stored fields; None if cvat-cli stores the state in the agent's memory.
    """

    token: StateToken
    record: Record | None = None


class SharedStates:
    """Replacement for cvat-cli's `_TrackingStateContainer`, with the same error messages.

    Args:
        client: Connection pool to the server, answering bytes.
        ttl_s: Life of a state from its last frame, in seconds.
    """

    def __init__(self, *, client: redis.Redis, ttl_s: int) -> None:
        self._client = client
        self._ttl_s = ttl_s

    def install(self) -> None:
        """Make cvat-cli use this container; call before cvat-cli creates its own."""
        driver._TrackingStateContainer = lambda: self  # noqa: SLF001  # cvat-cli has no hook for it

    def store(
        self, state: TrackingState, shape_type: str, task_id: int, image_dims: tuple[int, int]
    ) -> str:
        """Store a new object's state and return its name for CVAT."""
        key = _key(state.token)
        with bad_requests():
            self.update([TrackingState(state.token, Record(key, task_id, image_dims, shape_type))])
        return str(state.token)

    def retrieve(
        self, state_id: str, task_id: int, image_dims: tuple[int, int]
    ) -> tuple[TrackingState, str]:
        """Return a state and its shape type.

        Raises:
            BadArError: The state is missing, or of another task or image size. The check of the
                task keeps a leaked name from giving access to somebody else's task.
        """
        try:
            key = _key(StateToken.parse(state_id))
        except BadRequestError:
            raise _not_found(state_id) from None
        with bad_requests(), translated_errors():
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

    def update(self, states: Sequence[TrackingState]) -> None:
        """Write the newest tokens of states: all or none.

        Raises:
            StateStoreUnavailableError: The server is unavailable; the stored tokens are unchanged.
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
        """Do nothing: Redis expires states."""


def cvat_cli_version() -> str:
    """Return the version of the installed cvat-cli."""
    try:
        return version("cvat-cli")
    except PackageNotFoundError:
        return "of no version"


def cvat_cli_is_known() -> bool:
    """Tell whether the installed cvat-cli is a version that this module was written for."""
    expected = KNOWN_VERSIONS.get(cvat_cli_version())
    if driver is None or expected is None:
        return False
    return hashlib.sha256(Path(driver.__file__).read_bytes()).hexdigest() == expected


@contextmanager
def bad_requests() -> Iterator[None]:
    """Turn TrackerError into BadArError, whose message cvat-cli sends to CVAT."""
    try:
        yield
    except TrackerError as err:
        raise BadArError(str(err)) from err


def _key(token: StateToken) -> str:
    return f"sam2:{{{token.track}}}:agent:{token.step}"


def _not_found(state_id: str) -> Exception:
    error: Exception = BadArError(f"Tracking state {state_id!r} not found - possibly expired")
    return error
