"""Fixtures: a Redis server of our own, every kind of store, small models with sensitive weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fakeredis
import pytest
import redis

from state_store import MemoryStateStore, RedisStateStore, StateStore
from testbed.functions import CONFIG, IMAGE_SIZE, Function
from testbed.redis_server import RedisServer


def pytest_configure() -> None:
    """Let torch use one thread: threads of several test processes only wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


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
    from testbed.random_weights import write_checkpoint

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
    return lambda environment: Function("interaction.main", model_environment | environment)


@pytest.fixture(scope="session")
def interactor(start_interactor: Callable[[dict[str, str]], Function]) -> Function:
    """The interactor as it comes."""
    return start_interactor({})
