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
from state_store import RedisStateStore, StepWrite, connect, translated_errors
from state_token import StateToken
from testbed.functions import ROOT, Function
from testbed.redis_server import RedisServer
from tests.faults.machinery import FRAMES, prompts

SECURITY = ROOT / "docs" / "security.md"


@pytest.fixture(scope="module")
def tokens(micro_function: Function) -> list[str]:
    """The tokens of an object on the first frame."""
    states: list[str] = micro_function.track(FRAMES[0], prompts()[:1], [])["states"]
    return states


@pytest.fixture(scope="module")
def shapes(micro_function: Function, tokens: list[str]) -> list[Any]:
    """The object's shape on the second frame."""
    tracked: list[Any] = micro_function.track(FRAMES[1], [None], tokens)["shapes"]
    return tracked


@contextmanager
def failing(call: int, error: Exception) -> Iterator[None]:
    """Let one of a request's pipelines fail."""
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


ERRORS = [
    redis.ConnectionError("secret"),
    redis.TimeoutError("secret"),
    redis.AuthenticationError("secret"),
    redis.ResponseError("secret"),
    redis.InvalidResponse("secret"),
]


@pytest.mark.parametrize("call", [1, 2, 3], ids=["load", "claim", "save"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_of_the_store_is_a_503_and_the_tokens_stay_valid(
    micro_function: Function, tokens: list[str], shapes: list[Any], error: Exception, call: int
) -> None:
    """The message names the kind of error, without the server's words; a repetition succeeds."""
    with failing(call, error):
        status, answer = micro_function.call(
            {"image": FRAMES[1], "shapes": [None], "states": tokens}
        )

    assert status == 503
    assert answer["error"] == (
        f"the state store failed ({type(error).__name__}): nothing is lost, repeat the request"
    )
    assert micro_function.track(FRAMES[1], [None], tokens)["shapes"] == shapes


def test_every_error_of_the_client_is_translated() -> None:
    """Errors of redis-py, of the layers below it, and of its parser for malformed answers."""
    classes = [
        kind
        for kind in vars(redis.exceptions).values()
        if inspect.isclass(kind) and issubclass(kind, redis.RedisError)
    ]
    errors: list[Exception] = [kind("3999 secret:7000") for kind in classes]
    errors += [
        ConnectionResetError("secret"), BrokenPipeError("secret"), TimeoutError("secret"),
        socket.gaierror(-2, "secret"), ssl.SSLError("secret"), OSError(24, "secret"),
        ValueError("secret"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "secret"),
        IndexError("secret"), RecursionError("secret"),
    ]  # fmt: skip

    assert len(classes) > 25
    for error in errors:
        with pytest.raises(StateStoreUnavailableError) as raised, translated_errors():
            raise error
        assert f"failed ({type(error).__name__}): nothing is lost" in str(raised.value)
        assert "secret" not in str(raised.value)


WRITE = StepWrite(token=StateToken("t", "a"), state=b"s", memories={"a": b"m"})
CALLS: dict[str, Callable[[RedisStateStore], object]] = {
    "load": lambda store: store.load_states([StateToken("t", "a")]),
    "save": lambda store: store.save([WRITE]),
}


@contextmanager
def scripted_server(answer: Callable[[bytes], bytes]) -> Iterator[RedisStateStore]:
    """Serve one client with an answer for each command's name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    while data := connection.recv(65536):
                        if data == b"end":
                            return
                        names = re.findall(rb"\*\d+\r\n\$\d+\r\n([A-Z]+)\r\n", data)
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
def test_answer_of_the_wrong_type_is_an_error(
    call: Callable[[RedisStateStore], object], reply: bytes
) -> None:
    """A list is no value, and a step counts as written only if EXEC has an answer per command."""
    fits = (call is CALLS["load"] and reply in {b"+OK\r\n", b"$-1\r\n"}) or (
        call is CALLS["save"] and reply == b"*2\r\n+OK\r\n+OK\r\n"
    )
    replies = {b"GET": reply, b"EXEC": reply, b"PING": b"+PONG\r\n"}
    with scripted_server(lambda name: replies.get(name, b"+OK\r\n")) as store:
        if fits:
            call(store)
            return
        with pytest.raises(StateStoreUnavailableError, match=r"failed \(InvalidResponse\)"):
            call(store)


def test_malformed_answer_is_not_transient() -> None:
    """A server that is not Redis ends the start-up at once."""
    with (
        scripted_server(lambda _: b"$zz\r\n") as store,
        pytest.raises(StateStoreUnavailableError) as failed,
    ):
        store.ping()

    assert not failed.value.transient


def test_rights_that_the_documentation_names_are_enough(
    start_function: Callable[[dict[str, str]], Function], micro: dict[str, str], tmp_path: Path
) -> None:
    """An ACL user with only these commands on these keys can track."""
    rights = re.search(r"`(~sam2:\*)` and the commands ([A-Z, ]+) are enough", SECURITY.read_text())
    assert rights is not None
    server = RedisServer(tmp_path)
    with server.client() as client:
        commands = [f"+{name.lower()}" for name in rights[2].split(", ")]
        client.execute_command(
            "ACL", "SETUSER", "tracker", "on", ">hush", rights[1], "-@all", *commands
        )
    user = {"CVAT_FUNCTIONS_REDIS_USERNAME": "tracker", "CVAT_FUNCTIONS_REDIS_PASSWORD": "hush"}
    function = start_function(micro | server.environment | user)
    states = function.track(FRAMES[0], prompts(), [])["states"]
    for frame in FRAMES[1:8]:
        states = function.track(frame, [None] * len(states), states)["states"]
    server.stop()

    assert len(states) == 4
