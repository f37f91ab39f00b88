"""Replicas that are forked from a process that has their modules loaded already.

Importing PyTorch and SAM 2 takes two seconds of processor time, and the tests start a hundred
replicas. Benchmarks use `functions.Replica`, a new interpreter, as users have it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from testbed.functions import ROOT, Replica

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["interaction.main", "local_server", "main"])


class ForkedReplica(Replica):
    """A `local_server.py` process that is killed, stopped and asked like any other."""

    def _start(self, arguments: list[str], environment: dict[str, str], log: Path) -> ForkedProcess:
        return ForkedProcess(arguments, environment, log)


class ForkedProcess:
    """`local_server.py`, with the methods of `subprocess.Popen` that tests use.

    Args:
        arguments: Of its command line.
        environment: All of its environment variables.
        log: File that its output is appended to.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._process: BaseProcess = _context.Process(
            target=_serve, args=(arguments, environment, str(log)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status once it has ended; the negative signal number if a signal ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("local_server.py", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self._process.kill()


def _serve(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Become a server; runs in the new process."""
    import torch

    import local_server

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # PyTorch read the variable when it was imported, in the process that this one is forked from.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    local_server.main(arguments)
