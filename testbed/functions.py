"""Run a function for tests and benchmarks: in this process, or as an HTTP server process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from nuclio_sdk import Context, Event

from testbed.redis_server import free_port

ROOT = Path(__file__).parent.parent
MICRO_CONFIG = ROOT / "weights" / "micro" / "config.yaml"
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
IMAGE_SIZE = 128  # the smallest at which every part of the model works


class Function:
    """A function in this process, called as Nuclio calls it.

    Args:
        entry_point: Name of the module that Nuclio would import.
        environment: The function's settings; none are taken from this process's environment.
    """

    def __init__(self, entry_point: str, environment: dict[str, str]) -> None:
        import local_server

        self._module = importlib.import_module(entry_point)
        self.context: Context = local_server.create_context()
        with patch.dict(os.environ, without_settings(os.environ) | environment, clear=True):
            self._module.init_context(self.context)

    def call(self, body: Any, method: str = "POST", **fields: Any) -> tuple[int, dict[str, Any]]:
        """Return the status and the decoded body of the answer."""
        response = self._module.handler(self.context, Event(body=body, method=method, **fields))
        assert response.content_type == "application/json"
        return response.status_code, json.loads(response.body)

    def track(self, image: str, shapes: list[Any], states: list[str]) -> dict[str, Any]:
        """Call the tracker with a request that has to succeed, and return the answer."""
        status, answer = self.call({"image": image, "shapes": shapes, "states": states})
        assert status == 200, answer
        return answer


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that the functions read."""
    ours = ("SAM2_", "CVAT_")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}


def micro_environment(folder: Path, *, seed: int = 0) -> dict[str, str]:
    """Return the settings of a very small model with random weights; see `random_weights`.

    Args:
        folder: Where the weights are written, once.
        seed: Of the weights.
    """
    from testbed.random_weights import write_checkpoint  # imports torch

    path = folder / f"micro-{seed}.pt"
    if not path.exists():
        write_checkpoint(str(MICRO_CONFIG), path, seed=seed)
    return {
        "SAM2_CONFIG": str(MICRO_CONFIG),
        "SAM2_CHECKPOINT": str(path),
        "SAM2_IMAGE_SIZE": "128",
        "SAM2_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",  # replicas share the cores; and sums keep one order
    }


@dataclass(frozen=True)
class Reply:
    """The outcome of a request.

    Attributes:
        status: HTTP status; 0 for a connection that ended without an answer.
        body: The decoded answer, or `{"error": ...}`.
        seconds: From the request to the answer.
    """

    status: int
    body: dict[str, Any]
    seconds: float

    @property
    def message(self) -> str:
        """The error message, empty if there is none."""
        return str(self.body.get("error", ""))


class Replica:
    """A `local_server.py` process.

    Args:
        environment: All of its environment variables.
        log: File that its output is appended to; None discards it.
    """

    def __init__(self, environment: dict[str, str], *, log: Path | None = None) -> None:
        self.port = free_port()
        self._log = log or Path(os.devnull)
        self.process = self._start(["--port", str(self.port)], environment, self._log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def _start(self, arguments: list[str], environment: dict[str, str], log: Path) -> Any:
        """Start the process and return its `Popen`."""
        command = [sys.executable, "local_server.py", *arguments]
        with log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        """Wait until the server is healthy; fail if the process ends."""
        while True:
            assert self.process.poll() is None, self._log.read_text()[-1000:]
            try:
                if self.client.get("/healthz").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

    def post(self, image: str, shapes: Sequence[Any], states: Sequence[str]) -> Reply:
        """Post a tracker request; errors are returned as well."""
        begin = time.monotonic()
        body = {"image": image, "shapes": list(shapes), "states": list(states)}
        try:
            response = self.client.post("/", json=body)
        except httpx.TransportError as err:
            return Reply(0, {"error": type(err).__name__}, time.monotonic() - begin)
        return Reply(response.status_code, response.json(), time.monotonic() - begin)

    def track(self, image: str, shapes: Sequence[Any], states: Sequence[str]) -> dict[str, Any]:
        """Post a tracker request that has to succeed, and return the answer."""
        reply = self.post(image, shapes, states)
        assert reply.status == 200, reply
        return reply.body

    def resident_bytes(self) -> int:
        """Return the resident memory of the process."""
        return resident_bytes(self.process.pid)

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self.process.kill()
        self.process.wait()
        self.client.close()


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
