"""Fixtures: a Redis server, every kind of store, functions with small models of random weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fakeredis
import pytest
import redis

from state_store import MemoryStateStore, RedisStateStore, StateStore
from testbed.functions import CONFIG, IMAGE_SIZE, Function, micro_environment
from testbed.redis_server import RedisServer


def pytest_configure() -> None:
    """Let torch use one thread, as several test processes share the cores; let Ctrl-C work."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts background jobs with SIGINT ignored, and so would be every program that a test
    # starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One real server for the whole run; tests use different track ids."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client that reads and writes the store directly."""
    client = redis_server.client()
    yield client
    client.close()


@pytest.fixture(params=["memory", "fakeredis", "redis"])
def state_store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    """Every store: all have to pass the same tests."""
    state_ttl_s, retry_window_s = 1000, 100
    if request.param == "memory":
        yield MemoryStateStore(state_ttl_s=state_ttl_s, retry_window_s=retry_window_s)
        return
    if request.param == "fakeredis":
        client: redis.Redis = fakeredis.FakeRedis()
    else:
        client = request.getfixturevalue("redis_server").client()
    store = RedisStateStore(client=client, state_ttl_s=state_ttl_s, retry_window_s=retry_window_s)
    yield store
    store.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sensitive random weights for the tiny config."""
    from testbed.random_weights import write_checkpoint

    return write_checkpoint(CONFIG, tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="session")
def model_environment(checkpoint: Path) -> dict[str, str]:
    """The variables that make a function load the tiny config with these weights."""
    return {
        "SAM2_CONFIG": CONFIG,
        "SAM2_CHECKPOINT": str(checkpoint),
        "SAM2_IMAGE_SIZE": str(IMAGE_SIZE),
        "SAM2_DEVICE": "cpu",
    }


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables that make a function load a very small model with sensitive random weights."""
    return micro_environment(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="session")
def start_function(
    model_environment: dict[str, str],
) -> Iterator[Callable[[dict[str, str]], Function]]:
    """Start the tracker in this process with the tiny config, or what further variables say."""
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
    """The tracker with the tiny config on the real Redis server."""
    return start_function(redis_server.environment)


@pytest.fixture(scope="session")
def micro_function(
    start_function: Callable[[dict[str, str]], Function],
    micro: dict[str, str],
    redis_server: RedisServer,
) -> Function:
    """The tracker with the very small model on the real Redis server."""
    return start_function(micro | redis_server.environment)


@pytest.fixture(scope="session")
def embedded_function(
    start_function: Callable[[dict[str, str]], Function], micro: dict[str, str]
) -> Function:
    """The tracker with the very small model and the embedded store."""
    return start_function(micro)


@pytest.fixture(scope="session")
def start_interactor(
    model_environment: dict[str, str],
) -> Callable[[dict[str, str]], Function]:
    """Start the interactor in this process with the tiny config, or what further variables say."""
    return lambda environment: Function("interaction.main", model_environment | environment)


@pytest.fixture(scope="session")
def interactor(start_interactor: Callable[[dict[str, str]], Function]) -> Function:
    """The interactor with the tiny config."""
    return start_interactor({})


@pytest.fixture(scope="session")
def micro_interactor(
    start_interactor: Callable[[dict[str, str]], Function], micro: dict[str, str]
) -> Function:
    """The interactor with the very small model."""
    return start_interactor(micro)
