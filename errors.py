"""Every error a caller can meet, each with its HTTP status; knows nothing about who raises it."""

from __future__ import annotations

from typing import ClassVar


class TrackerError(Exception):
    """Base of all errors whose message is meant for the caller.

    Anything else that is raised is a bug: it is logged, and its text stays inside.
    """

    status: ClassVar[int] = 500


class BadRequestError(TrackerError):
    """The request or one of its shapes is malformed."""

    status = 400


class NotFoundError(TrackerError):
    """Nothing is served at this path."""

    status = 404


class MethodNotAllowedError(TrackerError):
    """The path exists, but not for this method."""

    status = 405


class StateMismatchError(TrackerError):
    """The state belongs to another model or to frames of another size."""

    status = 409


class StateGoneError(TrackerError):
    """The state expired, was evicted or never existed: the track has to start again."""

    status = 410


class TooLargeError(TrackerError):
    """The request exceeds a limit (bytes, pixels, objects, points)."""

    status = 413


class NotAnImageError(TrackerError):
    """The image bytes are not a picture that can be decoded."""

    status = 422


class StateStoreUnavailableError(TrackerError):
    """The store cannot be reached or refuses to write; tokens answered before stay valid.

    Attributes:
        may_pass: Whether waiting may help: the connection failed, not the log-in or the write.
    """

    status = 503
    may_pass = False


class SettingsError(Exception):
    """A setting is missing or wrong: the process must not start."""
