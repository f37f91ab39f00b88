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
    """Callers catch one family; each member knows its HTTP status."""
    assert issubclass(error, TrackerError)
    assert error.status == status
    assert str(error("what, where, what to do")) == "what, where, what to do"


def test_table_names_every_error() -> None:
    """An error that is added has to be given a status here."""
    members = {
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, Exception)
    }

    assert members == {*STATUSES, TrackerError, SettingsError}


def test_wrong_setting_is_no_answer_to_a_caller() -> None:
    """A wrong setting stops the process; it must not be turned into a response."""
    assert not issubclass(SettingsError, TrackerError)
