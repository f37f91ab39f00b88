"""The errors that a caller can get, each with its HTTP status."""

from __future__ import annotations

from typing import ClassVar


class TrackerError(Exception):
    """Base of all errors whose message is sent to the caller.

    Any other exception is a bug: it is logged, and its text is not sent.
    """

    status: ClassVar[int] = 500


class BadRequestError(TrackerError):
    """The request or one of its shapes is malformed."""

    status = 400


class NotFoundError(TrackerError):
    """Nothing is served at this path."""

    status = 404


class MethodNotAllowedError(TrackerError):
    """The path does not serve this method."""

    status = 405


class StateMismatchError(TrackerError):
    """The state is of another model or of frames of another size."""

    status = 409


class StateGoneError(TrackerError):
    """The state expired, was evicted or never existed: the track has to start again."""

    status = 410


class TooLargeError(TrackerError):
    """The request exceeds a limit (bytes, pixels, objects, points)."""

    status = 413


class NotAnImageError(TrackerError):
    """The image bytes cannot be decoded."""

    status = 422


class StateStoreUnavailableError(TrackerError):
    """The store cannot be reached or refuses a command; earlier tokens stay valid.

    Attributes:
        transient: Whether waiting may help: the connection failed, not a log-in or a command.
    """

    status = 503
    transient = False


class SettingsError(Exception):
    """A setting is missing or wrong; the process must not start."""
