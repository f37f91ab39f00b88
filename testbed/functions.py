"""The functions as tests and benchmarks run them: in this process, and as replica processes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from nuclio_sdk import Context, Event

from testbed.redis_server import free_port

ROOT = Path(__file__).parent.parent
MICRO_CONFIG = ROOT / "weights" / "micro" / "config.yaml"
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
IMAGE_SIZE = 128  # as small as keeps every part of the model at work


class Function:
    """A function in this process, called as Nuclio calls it.

    Args:
        door: The module that Nuclio would import.
        environment: What it is started with; nothing else of ours is set.
    """

    def __init__(self, door: str, environment: dict[str, str]) -> None:
        import local_server

        self._door = importlib.import_module(door)
        self.context: Context = local_server.create_context()
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("SAM2_", "CVAT_"))]:
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            self._door.init_context(self.context)

    def call(self, body: Any, method: str = "POST", **fields: Any) -> tuple[int, dict[str, Any]]:
        """Return the status and the decoded body of the answer."""
        response = self._door.handler(self.context, Event(body=body, method=method, **fields))
        assert response.content_type == "application/json"
        return response.status_code, json.loads(response.body)

    def track(self, image: str, shapes: list[Any], states: list[str]) -> dict[str, Any]:
        """Return the answer of a call that has to succeed."""
        status, answer = self.call({"image": image, "shapes": shapes, "states": states})
        assert status == 200, answer
        return answer


def micro_environment(folder: Path, *, seed: int = 0) -> dict[str, str]:
    """Return the variables of a very small model whose masks tell any inexactness."""
    from testbed.random_weights import write_checkpoint  # torch, which not every test needs

    path = folder / f"micro-{seed}.pt"
    if not path.exists():
        write_checkpoint(str(MICRO_CONFIG), path, seed=seed)
    return {
        "SAM2_CONFIG": str(MICRO_CONFIG),
        "SAM2_CHECKPOINT": str(path),
        "SAM2_IMAGE_SIZE": "128",
        "SAM2_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",  # as many replicas as cores; and sums in one order
    }


@dataclass(frozen=True)
class Reply:
    """What a caller got.

    Attributes:
        status: HTTP status; 0 for a connection that ended without an answer.
        body: The answer, or the error.
        seconds: Until it came.
    """

    status: int
    body: dict[str, Any]
    seconds: float

    @property
    def message(self) -> str:
        """The error, if it is one."""
        return str(self.body.get("error", ""))


class Replica:
    """A `local_server.py` process.

    Args:
        environment: All of its variables.
        log: Where its output goes; nowhere without.
    """

    def __init__(self, environment: dict[str, str], *, log: Path | None = None) -> None:
        self.port = free_port()
        command = [sys.executable, "local_server.py", "--port", str(self.port)]
        self._log = log or Path(os.devnull)
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def wait(self) -> None:
        """Return when it is healthy."""
        while True:
            assert self.process.poll() is None, self._log.read_text()[-1000:]
            try:
                if self.client.get("/healthz").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

    def post(self, image: str, shapes: Sequence[Any], states: Sequence[str]) -> Reply:
        """Post a tracker request and return whatever comes."""
        begin = time.monotonic()
        body = {"image": image, "shapes": list(shapes), "states": list(states)}
        try:
            response = self.client.post("/", json=body)
        except httpx.TransportError as err:
            return Reply(0, {"error": type(err).__name__}, time.monotonic() - begin)
        return Reply(response.status_code, response.json(), time.monotonic() - begin)

    def track(self, image: str, shapes: Sequence[Any], states: Sequence[str]) -> dict[str, Any]:
        """Post a tracker request that has to succeed."""
        reply = self.post(image, shapes, states)
        assert reply.status == 200, reply
        return reply.body

    def resident_bytes(self) -> int:
        """Return how much memory it takes."""
        return resident_bytes(self.process.pid)

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        self.process.kill()
        self.process.wait()
        self.client.close()


def resident_bytes(pid: int) -> int:
    """Return how much memory a process takes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
