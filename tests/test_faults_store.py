from __future__ import annotations

import inspect
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.client import Pipeline

from errors import StateStoreUnavailableError
from settings import RedisSettings
from state_store import RedisStateStore, StepWrite, connect
from state_token import StateToken
from testbed.functions import ROOT, Function, micro_environment
from testbed.redis_server import RedisServer
from tests.faults.machinery import FRAMES, prompts

SECURITY = ROOT / "docs" / "security.md"


@pytest.fixture(scope="module")
def micro(
    start_function: Callable[[dict[str, str]], Function],
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Function:
    """The function in this process, with a very small model, on a real server."""
    folder = tmp_path_factory.mktemp("weights")
    return start_function(micro_environment(folder) | redis_server.environment)


@pytest.fixture(scope="module")
def tokens(micro: Function) -> list[str]:
    """An object on the first frame."""
    states: list[str] = micro.track(FRAMES[0], prompts()[:1], [])["states"]
    return states


@pytest.fixture(scope="module")
def shapes(micro: Function, tokens: list[str]) -> list[Any]:
    """Where it is on the second frame."""
    found: list[Any] = micro.track(FRAMES[1], [None] * len(tokens), tokens)["shapes"]
    return found


def every_error() -> dict[str, Exception]:
    """Return one of each error that redis-py has, and of what comes through from below it."""
    classes = {redis.RedisError}
    for known in list(vars(redis.exceptions).values()):
        if inspect.isclass(known) and issubclass(known, redis.RedisError):
            classes.add(known)
    assert len(classes) > 25
    errors: list[Exception] = [made("3999 hush:7000") for made in sorted(classes, key=str)]
    errors += [
        ConnectionResetError("hush"), BrokenPipeError("hush"), TimeoutError("hush"),
        socket.gaierror(-2, "hush"), ssl.SSLError("hush"), OSError(24, "hush"),
        ValueError("hush"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "hush"),
        IndexError("hush"), RecursionError("hush"),
    ]  # fmt: skip
    return {type(error).__module__ + "." + type(error).__name__: error for error in errors}


@contextmanager
def failing(call: int, error: Exception) -> Iterator[None]:
    """Let one of a request's round trips to the store fail."""
    calls = []
    execute = Pipeline.execute

    def fail(pipeline: Pipeline, *arguments: Any, **options: Any) -> list[Any]:
        calls.append(pipeline)
        if len(calls) == call:
            raise error
        return execute(pipeline, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "execute", fail)
        yield
    assert len(calls) >= call


@pytest.mark.parametrize("call", [1, 2, 3], ids=["load", "claim", "save"])
@pytest.mark.parametrize("error", every_error().values(), ids=every_error())
def test_any_error_of_the_store_is_a_503_and_costs_nothing(
    micro: Function, tokens: list[str], shapes: list[Any], error: Exception, call: int
) -> None:
    """The kind is named, the server's words are not; the same tokens give the same masks."""
    request = {"image": FRAMES[1], "shapes": [None] * len(tokens), "states": tokens}
    with failing(call, error):
        status, answer = micro.call(request)

    assert status == 503
    assert answer["error"] == (
        f"the state store failed ({type(error).__name__}): nothing is lost, repeat the request"
    )
    assert micro.track(FRAMES[1], [None] * len(tokens), tokens)["shapes"] == shapes


WRITE = StepWrite(token=StateToken("t", "a"), state=b"s", memories={"a": b"m"})
CALLS: dict[str, Callable[[RedisStateStore], object]] = {
    "load": lambda store: store.load_states([StateToken("t", "a")]),
    "save": lambda store: store.save([WRITE]),
}


@contextmanager
def oracle(answer: Callable[[bytes], bytes]) -> Iterator[RedisStateStore]:
    """Serve one client, answering each command by its name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    while said := connection.recv(65536):
                        if said == b"end":
                            return
                        names = re.findall(rb"\*\d+\r\n\$\d+\r\n([A-Z]+)\r\n", said)
                        connection.sendall(b"".join(map(answer, names)))

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        client = connect(RedisSettings(host="127.0.0.1", port=port, timeout_s=1))
        yield RedisStateStore(client=client, state_ttl_s=10, retry_window_s=10)
        client.close()
        with socket.create_connection(("127.0.0.1", port)) as last:
            last.sendall(b"end")
        thread.join()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "reply", [b"+OK\r\n", b":7\r\n", b"*0\r\n", b"$-1\r\n", b"*2\r\n+OK\r\n+OK\r\n"]
)
def test_server_that_answers_beside_the_point_is_unavailable(
    call: Callable[[RedisStateStore], object], reply: bytes
) -> None:
    """A list is no value, and a step counts as written only when its transaction says so."""
    fits = (call is CALLS["load"] and reply in {b"+OK\r\n", b"$-1\r\n"}) or (
        call is CALLS["save"] and reply == b"*2\r\n+OK\r\n+OK\r\n"
    )
    replies = {b"GET": reply, b"EXEC": reply, b"PING": b"+PONG\r\n"}
    with oracle(lambda name: replies.get(name, b"+OK\r\n")) as store:
        if fits:
            call(store)
            return
        with pytest.raises(StateStoreUnavailableError, match=r"failed \(InvalidResponse\)"):
            call(store)


def test_unknown_answer_of_a_cold_start_ends_it_at_once() -> None:
    """What is not Redis does not become Redis by waiting."""
    with oracle(lambda _: b"$zz\r\n") as store, pytest.raises(StateStoreUnavailableError) as failed:
        store.ping()

    assert not failed.value.transient


def test_rights_that_the_documentation_names_are_enough(
    start_function: Callable[[dict[str, str]], Function], tmp_path: Path
) -> None:
    """An ACL user with these commands on these keys tracks, in a store of its own number too."""
    rights = re.search(r"`(~sam2:\*)` and the commands ([A-Z, ]+) are enough", SECURITY.read_text())
    assert rights is not None
    server = RedisServer(tmp_path)
    with server.client() as client:
        commands = [f"+{name.lower()}" for name in rights[2].split(", ")]
        client.execute_command(
            "ACL", "SETUSER", "tracker", "on", ">hush", rights[1], "-@all", *commands
        )
    user = {"CVAT_FUNCTIONS_REDIS_USERNAME": "tracker", "CVAT_FUNCTIONS_REDIS_PASSWORD": "hush"}
    function = start_function(micro_environment(tmp_path) | server.environment | user)
    states = function.track(FRAMES[0], prompts(), [])["states"]
    for frame in FRAMES[1:8]:
        states = function.track(frame, [None] * len(states), states)["states"]
    server.stop()

    assert len(states) == 4
