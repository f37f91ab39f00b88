from __future__ import annotations

import inspect

import pytest

import errors
from errors import (
    BadRequestError,
    MethodNotAllowedError,
    NotAnImageError,
    NotFoundError,
    SettingsError,
    StateGoneError,
    StateMismatchError,
    StateStoreUnavailableError,
    TooLargeError,
    TrackerError,
)

STATUSES = {
    BadRequestError: 400,
    NotFoundError: 404,
    MethodNotAllowedError: 405,
    StateMismatchError: 409,
    StateGoneError: 410,
    TooLargeError: 413,
    NotAnImageError: 422,
    StateStoreUnavailableError: 503,
}


@pytest.mark.parametrize(("error", "status"), STATUSES.items())
def test_error_has_its_status_and_keeps_its_message(error: type[TrackerError], status: int) -> None:
    """All errors have one base class, and each has its HTTP status."""
    assert issubclass(error, TrackerError)
    assert error.status == status
    assert str(error("what, where, what to do")) == "what, where, what to do"


def test_table_names_every_error() -> None:
    """A new error has to be added to the table."""
    members = {
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, Exception)
    }

    assert members == {*STATUSES, TrackerError, SettingsError}


def test_wrong_setting_is_not_sent_to_a_caller() -> None:
    """A wrong setting ends the process; it has no HTTP status."""
    assert not issubclass(SettingsError, TrackerError)
