from __future__ import annotations

import ast
import asyncio
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import local_server
import main
from testbed.functions import ROOT, Function, micro_environment
from testbed.redis_server import RedisServer
from tests.faults.machinery import FRAMES, Stage, prompts, stage_in


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the weights of a very small model."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def start_micro(
    start_function: Callable[[dict[str, str]], Function], weights: Path
) -> Callable[[dict[str, str]], Function]:
    """Start the function in this process with that model and further variables."""
    environment = micro_environment(weights)
    return lambda further: start_function(environment | further)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that nobody else is connected to."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def connections(server: RedisServer) -> int:
    """Return how many clients a server has, this one left out."""
    with server.client() as client:
        return len(client.client_list()) - 1


def test_termination_callback_closes_the_connections_and_ends(
    start_micro: Callable[[dict[str, str]], Function], own_redis: RedisServer
) -> None:
    """Nuclio calls it between two events, when the running one is answered; the process ends."""
    started = start_micro(own_redis.environment)
    started.track(FRAMES[0], prompts(), [])
    before = connections(own_redis)
    with pytest.raises(SystemExit, match=r"^0$"):  # any other status is a panic to the processor
        started.context.platform._on_signal("termination")

    assert before == 1
    assert connections(own_redis) == 0


def test_termination_callback_ends_the_interactor(interactor: Function) -> None:
    """It holds no connections, and its processor does not wait for it."""
    with pytest.raises(SystemExit, match=r"^0$"):
        interactor.context.platform._on_signal("termination")


def test_local_server_closes_the_connections_when_it_stops(
    start_micro: Callable[[dict[str, str]], Function], own_redis: RedisServer
) -> None:
    """After the last request; the callback is the same as Nuclio's."""
    context = start_micro(own_redis.environment).context
    with TestClient(local_server.create_app(context, main.handler, ThreadPoolExecutor(1))) as http:
        assert http.get("/healthz").status_code == 200
        assert connections(own_redis) == 1

    assert connections(own_redis) == 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two replicas and a Redis of our own, to stop."""
    with stage_in(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


def test_sigterm_lets_the_running_requests_finish(stage: Stage) -> None:
    """One computes, one waits for its turn: both are answered; new ones find no one; it ends."""
    replica, other = stage.replicas
    many = prompts() * 10
    before = stage.proxy.passed["up"]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(replica.post, FRAMES[0], many, []) for _ in range(2)]
        time.sleep(0.1)
        assert stage.proxy.passed["up"] == before  # nothing is written yet
        replica.process.send_signal(signal.SIGTERM)
        replies = [future.result() for future in running]
    status = replica.process.wait(60)

    assert [reply.status for reply in replies] == [200, 200]
    assert status == -signal.SIGTERM  # as a process that was asked to end
    assert replica.post(FRAMES[0], many, []).status == 0
    states = replies[1].body["states"]
    assert other.post(FRAMES[1], [None] * len(states), states).status == 200


def test_sigterm_ends_an_idle_replica(stage: Stage) -> None:
    """Open connections that ask nothing do not keep it."""
    replica = stage.replicas[1]
    replica.wait()  # and keeps the connection
    replica.process.send_signal(signal.SIGTERM)

    assert replica.process.wait(60) == -signal.SIGTERM
    assert "Traceback" not in stage.log.read_text()


def test_body_that_never_comes_does_not_block_the_others(
    start_micro: Callable[[dict[str, str]], Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that stop in the middle of a request are given up, and others are served."""
    monkeypatch.setattr(local_server, "BODY_TIMEOUT_S", 0.5)
    app = local_server.create_app(start_micro({}).context, main.handler, ThreadPoolExecutor(1))

    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"image": "'
        await asyncio.sleep(3600)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            lost = [
                asyncio.create_task(http.post("/", content=stalled()))
                for _ in range(local_server.CONCURRENT_BODIES)
            ]
            await asyncio.sleep(0)
            body = {"image": FRAMES[0], "shapes": prompts(), "states": []}
            return [await http.post("/", json=body), *[await one for one in lost]]

    served, *refused = asyncio.run(ask())

    assert served.status_code == 200
    assert {one.status_code for one in refused} == {400}
    assert "the body did not arrive within 0.5 s" in refused[0].json()["error"]


class Bomb:
    """What a pickle may do to whoever opens it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("the bomb went off",)


CHECKPOINTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not hold weights"),
    "text": (b"<html>404 Not Found</html>", "does not hold weights"),
    "pickle of code": (pickle.dumps({"model": Bomb()}), "does not hold weights"),
    "other pickle": (pickle.dumps({"model": 7}), "does not hold weights"),
}


@pytest.mark.parametrize("content", [*CHECKPOINTS, "cut off", "damaged"])
def test_broken_checkpoint_ends_the_start_with_one_clear_line(
    start_micro: Callable[[dict[str, str]], Function],
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    """It is named, no code of it is run, and the advice of libraries stays out of the way."""
    whole = (weights / "micro-0.pt").read_bytes()
    broken = tmp_path / "broken.pt"
    if content in CHECKPOINTS:
        broken.write_bytes(CHECKPOINTS[content][0])
    elif content == "cut off":
        broken.write_bytes(whole[: len(whole) // 2])
    else:
        broken.write_bytes(whole[:-2000] + bytes(2000))
    with pytest.raises(SystemExit, match=r"^1$"):
        start_micro({"SAM2_CHECKPOINT": str(broken)})
    (line,) = capsys.readouterr().out.splitlines()
    reason = ast.literal_eval(line.partition("cannot start: ")[2])["reason"]

    assert reason.startswith(f"{broken} does not hold weights for ")
    assert "went off" not in line
    assert "weights_only" not in reason
    assert "\n" not in reason


def test_unreachable_store_ends_the_process_with_one_clear_line(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that refuses us is not waited for; exit status 1, and the port never opens."""
    monkeypatch.setenv("CVAT_FUNCTIONS_REDIS_HOST", "no-such-host.invalid")
    script = "import main; main.STORE_WAIT_S = 0; import local_server; local_server.main([])"
    for name, value in micro_environment(weights).items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert re.search(r"\[error\] cannot start: .*the state store failed \(ConnectionError\)", line)


def test_password_that_the_server_repeats_is_not_logged(
    start_micro: Callable[[dict[str, str]], Function],
    own_redis: RedisServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that does not know AUTH answers with its arguments."""
    monkeypatch.setattr(main, "STORE_WAIT_S", 0.0)
    own_redis.stop()
    own_redis.start("--rename-command", "AUTH", "")
    with own_redis.client() as client, pytest.raises(Exception, match="hush-word"):
        client.execute_command("AUTH", "hush-word")
    for user in ({}, {"CVAT_FUNCTIONS_REDIS_USERNAME": "somebody"}):
        with pytest.raises(SystemExit):
            start_micro(
                own_redis.environment | {"CVAT_FUNCTIONS_REDIS_PASSWORD": "hush-word"} | user
            )
    output = "".join(capsys.readouterr())

    assert output.count("cannot start") == 2
    assert "unknown command" in output
    assert "hush-word" not in output
