"""What makes a command wait in tests, and Ctrl-C while it waits."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unanswered_url() -> Iterator[str]:
    """Give a URL to which connecting takes forever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        # Fill the queue of connections that nobody accepts: the next one hangs.
        waiting = [socket.socket() for _ in range(8)]
        for connection in waiting:
            connection.setblocking(False)  # noqa: FBT003  # the name of its parameter is `flag`
            connection.connect_ex(address)
        try:
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            for connection in waiting:
                connection.close()


def press_ctrl_c() -> None:
    """Interrupt the main thread, once it waits for something.

    Python would see a signal that comes right before a system call only after that.
    """
    main_thread = threading.main_thread()
    stat = Path(f"/proc/self/task/{main_thread.native_id}/stat")
    asleep = 0
    while asleep < 2 and threading.current_thread() is not main_thread:
        asleep = asleep + 1 if stat.read_text().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


class Hold:
    """Stops a thread until the test ends."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self) -> None:
        """Stop the calling thread."""
        self._event.wait()

    def interrupt_and_wait(self) -> None:
        """Press Ctrl-C, and stop the calling thread."""
        press_ctrl_c()
        self.wait()

    def end(self) -> bool:
        """Let the stopped threads go on, and tell whether this is the first call."""
        was_held = not self._event.is_set()
        self._event.set()
        return was_held
