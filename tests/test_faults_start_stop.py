from __future__ import annotations

import ast
import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import local_server
import main
from testbed.functions import Function
from testbed.redis_server import RedisServer
from tests.faults.machinery import FRAMES, prompts


@pytest.fixture(scope="module")
def start(
    start_function: Callable[[dict[str, str]], Function], micro: dict[str, str]
) -> Callable[[dict[str, str]], Function]:
    """Start the tracker in this process with a very small model and further variables."""
    return lambda environment: start_function(micro | environment)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server without other clients."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def connections(server: RedisServer) -> int:
    """Return the number of other clients of a server."""
    with server.client() as client:
        return len(client.client_list()) - 1


def test_termination_callback_closes_the_connections_and_ends(
    start: Callable[[dict[str, str]], Function], own_redis: RedisServer
) -> None:
    """Nuclio calls it between two events, after the running event was answered."""
    started = start(own_redis.environment)
    started.track(FRAMES[0], prompts(), [])
    before = connections(own_redis)
    with pytest.raises(
        SystemExit, match=r"^0$"
    ):  # the processor takes any other status for a failure
        started.context.platform._on_signal("termination")

    assert before == 1
    assert connections(own_redis) == 0


def test_termination_callback_ends_the_interactor(micro_interactor: Function) -> None:
    """It has no connections, but its processor must not wait for it either."""
    with pytest.raises(SystemExit, match=r"^0$"):
        micro_interactor.context.platform._on_signal("termination")


def test_local_server_closes_the_connections_when_it_stops(
    start: Callable[[dict[str, str]], Function], own_redis: RedisServer
) -> None:
    """It calls the same callback as Nuclio, after the last request."""
    context = start(own_redis.environment).context
    with TestClient(local_server.create_app(context, main.handler, ThreadPoolExecutor(1))) as http:
        assert http.get("/healthz").status_code == 200
        assert connections(own_redis) == 1

    assert connections(own_redis) == 0


def test_stalled_bodies_do_not_block_other_requests(
    embedded_function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that stop in the middle of a request get 400, and others are served."""
    monkeypatch.setattr(local_server, "BODY_TIMEOUT_S", 0.5)
    app = local_server.create_app(embedded_function.context, main.handler, ThreadPoolExecutor(1))

    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"image": "'
        await asyncio.sleep(3600)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            stalled_posts = [
                asyncio.create_task(http.post("/", content=stalled()))
                for _ in range(local_server.CONCURRENT_BODIES)
            ]
            await asyncio.sleep(0)
            body = {"image": FRAMES[0], "shapes": prompts(), "states": []}
            return [await http.post("/", json=body), *[await post for post in stalled_posts]]

    served, *refused = asyncio.run(ask())

    assert served.status_code == 200
    assert {response.status_code for response in refused} == {400}
    assert "the body did not arrive within 0.5 s" in refused[0].json()["error"]


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("the bomb went off",)


CHECKPOINTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not hold weights"),
    "text": (b"<html>404 Not Found</html>", "does not hold weights"),
    "pickle of code": (pickle.dumps({"model": Bomb()}), "does not hold weights"),
    "other pickle": (pickle.dumps({"model": 7}), "does not hold weights"),
}


@pytest.mark.parametrize("content", [*CHECKPOINTS, "cut off", "damaged"])
def test_broken_checkpoint_ends_the_start_with_one_line(
    start: Callable[[dict[str, str]], Function],
    micro: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    """The line names the file; no code of it runs, and no advice of libraries is passed on."""
    whole = Path(micro["SAM2_CHECKPOINT"]).read_bytes()
    broken = tmp_path / "broken.pt"
    if content in CHECKPOINTS:
        broken.write_bytes(CHECKPOINTS[content][0])
    elif content == "cut off":
        broken.write_bytes(whole[: len(whole) // 2])
    else:
        broken.write_bytes(whole[:-2000] + bytes(2000))
    with pytest.raises(SystemExit, match=r"^1$"):
        start({"SAM2_CHECKPOINT": str(broken)})
    (line,) = capsys.readouterr().out.splitlines()
    reason = ast.literal_eval(line.partition("cannot start: ")[2])["reason"]

    assert reason.startswith(f"{broken} does not hold weights for ")
    assert "went off" not in line
    assert "weights_only" not in reason
    assert "\n" not in reason


def test_password_that_the_server_repeats_is_not_logged(
    start: Callable[[dict[str, str]], Function],
    own_redis: RedisServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server without the AUTH command repeats its arguments in the error message."""
    monkeypatch.setattr(main, "STORE_WAIT_S", 0.0)
    own_redis.stop()
    own_redis.start("--rename-command", "AUTH", "")
    with own_redis.client() as client, pytest.raises(Exception, match="hush-word"):
        client.execute_command("AUTH", "hush-word")
    for user in ({}, {"CVAT_FUNCTIONS_REDIS_USERNAME": "somebody"}):
        with pytest.raises(SystemExit):
            start(own_redis.environment | {"CVAT_FUNCTIONS_REDIS_PASSWORD": "hush-word"} | user)
    output = "".join(capsys.readouterr())

    assert output.count("cannot start") == 2
    assert "unknown command" in output
    assert "hush-word" not in output
