"""Two replicas on one Redis: each serves any frame, and killing one loses nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from shapes import encode_cvat_rle
from testbed.drawn_frames import base64_text, blob_mask, block_mask, jpeg_frames
from testbed.forked_replica import ForkedReplica
from testbed.functions import Function, Replica
from testbed.redis_server import RedisServer

FRAMES = 12
KILLED_AT = 6


@pytest.fixture
def start_replicas(
    redis_server: RedisServer, model_environment: dict[str, str]
) -> Iterator[Callable[[int], list[Replica]]]:
    """Start replicas on the test model and one Redis."""
    started: list[Replica] = []
    environment = os.environ | model_environment | redis_server.environment

    def start(count: int) -> list[Replica]:
        new: list[Replica] = [ForkedReplica(environment) for _ in range(count)]
        started.extend(new)
        for replica in new:
            replica.wait()
        return new

    yield start
    for replica in started:
        replica.kill()


def prompts() -> list[dict[str, Any]]:
    """Two masks."""
    return [
        {"type": "mask", "points": encode_cvat_rle(mask)} for mask in (blob_mask(), block_mask())
    ]


@pytest.fixture(scope="module")
def undisturbed(function: Function) -> list[list[Any]]:
    """The answers of one process without disturbances."""
    frames = [base64_text(frame) for frame in jpeg_frames(FRAMES)]
    states = function.track(frames[0], prompts(), [])["states"]
    answers = []
    for frame in frames[1:]:
        answer = function.track(frame, [None] * len(states), states)
        states = answer["states"]
        answers.append(answer["shapes"])
    return answers


def test_a_killed_replica_costs_one_repeated_request(
    start_replicas: Callable[[int], list[Replica]],
    undisturbed: list[list[Any]],
    redis_server: RedisServer,
) -> None:
    """Requests alternate; one replica dies with a request in flight; the other repeats it."""
    replicas = start_replicas(2)
    frames = [base64_text(frame) for frame in jpeg_frames(FRAMES)]
    states = replicas[0].track(frames[0], prompts(), [])["states"]
    answers = []
    for number, frame in enumerate(frames[1:], start=1):
        if number == KILLED_AT:
            with in_flight(replicas[0], frame, states, redis_server):
                replicas[0].process.kill()
            replicas.pop(0).kill()
        replica = replicas[number % len(replicas)]
        answer = replica.track(frame, [None] * len(states), states)
        states = answer["states"]
        answers.append(answer["shapes"])

    assert answers == undisturbed


def test_a_new_replica_continues_any_track(
    start_replicas: Callable[[int], list[Replica]], undisturbed: list[list[Any]]
) -> None:
    """A replica with an empty cache reads all of a track from Redis."""
    frames = [base64_text(frame) for frame in jpeg_frames(FRAMES)]
    (first,) = start_replicas(1)
    states = first.track(frames[0], prompts(), [])["states"]
    for frame in frames[1:-1]:
        states = first.track(frame, [None] * len(states), states)["states"]
    first.kill()
    (second,) = start_replicas(1)
    answer = second.track(frames[-1], [None] * len(states), states)

    assert answer["shapes"] == undisturbed[-1]


@contextmanager
def in_flight(
    replica: Replica, image: str, states: Sequence[str], redis_server: RedisServer
) -> Iterator[None]:
    """Send a request and enter the block once its states were read: it is being computed then."""
    body = {"image": image, "shapes": [None] * len(states), "states": list(states)}
    request = replica.client.build_request("POST", "/", json=body)
    content = request.read()
    host, port = replica.client.base_url.host, replica.client.base_url.port
    head = (
        f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, port or 80)) as connection:
        before = reads(redis_server)
        connection.sendall(head.encode() + content)
        while reads(redis_server) == before:
            time.sleep(0.001)
        yield
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # closed without an answer


def reads(redis_server: RedisServer) -> int:
    """Return how many GETs the server has served."""
    with redis_server.client() as client:
        return int(client.info("commandstats")["cmdstat_get"]["calls"])
