"""Ctrl-C during a run: it ends waiting at once, but lets a frame or a write in work finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from time import sleep
from typing import Self


class Interrupted(KeyboardInterrupt):
    """The first Ctrl-C, where nothing has to be finished first."""


class Interrupts:
    """Handles Ctrl-C while it is entered as a context, which only the main thread can do.

    The first Ctrl-C raises `Interrupted`, but inside `deferred()` it only sets `requested`, until
    an `allowed()` block is entered. A second Ctrl-C raises KeyboardInterrupt everywhere.

    Attributes:
        requested: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_deferred = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def deferred(self) -> AbstractContextManager[None]:
        """Let a block finish at the first Ctrl-C, but for its `allowed()` blocks."""
        return self._switched(is_deferred=True)

    def allowed(self) -> AbstractContextManager[None]:
        """End a block at Ctrl-C, or at once if it was pressed before. The block should only wait.

        An exception at any other point might hit clean-up code, where Python drops it.
        """
        return self._switched(is_deferred=False)

    def sleep(self, seconds: float) -> None:
        """Wait; in the main thread Ctrl-C ends it."""
        if threading.current_thread() is not threading.main_thread():
            sleep(seconds)
            return
        with self.allowed():
            sleep(seconds)

    @contextmanager
    def _switched(self, *, is_deferred: bool) -> Iterator[None]:
        before, self._is_deferred = self._is_deferred, is_deferred
        try:
            if self.requested and not is_deferred:
                raise Interrupted
            yield
        finally:
            self._is_deferred = before

    def _handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self._is_deferred:
            raise Interrupted
