from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from errors import StateStoreUnavailableError
from settings import RedisSettings, Secret, Settings
from state_store import (
    READ_CHUNK_BYTES,
    MemoryStateStore,
    RedisStateStore,
    StateStore,
    StepWrite,
    connect,
    open_store,
)
from state_token import StateToken, new_id
from testbed.redis_server import RedisServer

STATE_TTL_S, RETRY_S = 1000, 100


def write_of(track: str, step: str, **changes: object) -> StepWrite:
    """Return a write of one step and its frame memory."""
    fields: dict[str, object] = {
        "token": StateToken(track, step),
        "state": f"state {step}".encode(),
        "memories": {step: f"memory {step}".encode()},
    }
    return StepWrite(**(fields | changes))  # type: ignore[arg-type]


def states(store: StateStore, track: str, *steps: str) -> list[bytes | None]:
    """Return the states of a track's steps."""
    return store.load_states([StateToken(track, step) for step in steps])


def memories(store: StateStore, track: str, *ids: str) -> list[bytes | None]:
    """Return a track's frame memories."""
    return store.load_memories([(track, id_) for id_ in ids])


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a Redis server that the test may spoil."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def reach(server: RedisServer, *, timeout_s: float = 0.5, password: str = "") -> RedisStateStore:
    """Return a store on a server, made as production makes it."""
    settings = RedisSettings(
        host="127.0.0.1",
        port=server.port,
        password=Secret(password) if password else None,
        timeout_s=timeout_s,
    )
    return RedisStateStore(
        client=connect(settings), state_ttl_s=STATE_TTL_S, retry_window_s=RETRY_S
    )


def test_step_and_memories_are_read_as_written(state_store: StateStore) -> None:
    """Bytes come back as they went, in the order asked for; what was not written is None."""
    track, other = new_id(), new_id()
    state_store.ping()
    lost = state_store.save(
        [
            write_of(track, "a", memories={"a": b"\x00\xff\r\n", "b": b""}),
            write_of(other, "a", state=b"\x80"),
        ]
    )

    assert lost == [[], []]
    assert states(state_store, track, "b", "a") == [None, b"state a"]
    assert states(state_store, other, "a") == [b"\x80"]
    assert memories(state_store, track, "a", "x", "b", "a") == [
        b"\x00\xff\r\n",
        None,
        b"",
        b"\x00\xff\r\n",
    ]
    assert memories(state_store, other, "a", "b") == [b"memory a", None]


def test_nothing_asked_is_nothing_answered(state_store: StateStore) -> None:
    """Requests that only start tracks load and claim nothing."""
    assert state_store.load_states([]) == []
    assert state_store.load_memories([]) == []
    assert state_store.claim([]) == []
    assert state_store.save([]) == []
    state_store.restore({})


def test_only_the_first_claim_of_a_step_wins(state_store: StateStore) -> None:
    """Also within one request; other steps and tracks do not matter."""
    track = new_id()
    a, b, elsewhere = StateToken(track, "a"), StateToken(track, "b"), StateToken(new_id(), "a")

    assert state_store.claim([a, a]) == [True, False]
    assert state_store.claim([a, b, elsewhere]) == [False, True, True]
    assert state_store.claim([b, elsewhere]) == [False, False]


def test_lost_memories_are_named_and_restored(state_store: StateStore) -> None:
    """A renewal that finds nothing is told, so that whoever has the memory writes it again."""
    track = new_id()
    state_store.save([write_of(track, "a")])
    lost = state_store.save(
        [
            write_of(track, "b", renewed=["x", "a", "y"]),
            write_of(new_id(), "b"),
            write_of(track, "c", renewed=["a", "b"], dropped_steps=["a"], superseded_steps=["q"]),
        ]
    )
    assert lost == [["x", "y"], [], []]

    state_store.restore({(track, "x"): b"memory x", (track, "y"): b"memory y"})

    assert memories(state_store, track, "x", "y") == [b"memory x", b"memory y"]
    assert state_store.save([write_of(track, "d", renewed=["x", "y"])]) == [[]]


def test_dropped_steps_and_memories_are_gone_with_their_claims(state_store: StateStore) -> None:
    """What is out of the retry window's reach takes no room."""
    track = new_id()
    state_store.save([write_of(track, "a"), write_of(track, "b")])
    state_store.claim([StateToken(track, "a")])
    state_store.save([write_of(track, "c", dropped_steps=["a"], dropped_memories=["b"])])

    assert states(state_store, track, "a", "b", "c") == [None, b"state b", b"state c"]
    assert memories(state_store, track, "a", "b", "c") == [b"memory a", None, b"memory c"]
    assert state_store.claim([StateToken(track, "a")]) == [True]


@pytest.fixture(params=["memory", "fakeredis", "redis"])
def lives(
    request: pytest.FixtureRequest,
) -> tuple[StateStore, Callable[[str, float], bool]]:
    """A store, and whether one of its keys has so many seconds left (to the nearest few)."""
    if request.param == "memory":
        now = [0.0]
        embedded = MemoryStateStore(
            state_ttl_s=STATE_TTL_S, retry_window_s=RETRY_S, clock=lambda: now[0]
        )

        def left_in_memory(key: str, seconds: float) -> bool:
            now[0] = seconds - 1
            before = embedded._get(key) is not None
            now[0] = seconds + 1
            after = embedded._get(key) is not None
            now[0] = 0.0
            return before and not after

        return embedded, left_in_memory
    if request.param == "fakeredis":
        import fakeredis

        client: redis.Redis = fakeredis.FakeRedis()
    else:
        client = request.getfixturevalue("redis_server").client()

    def left(key: str, seconds: float) -> bool:
        return seconds - 30 < int(str(client.pttl(key))) / 1000 <= seconds

    return RedisStateStore(client=client, state_ttl_s=STATE_TTL_S, retry_window_s=RETRY_S), left


@pytest.mark.parametrize(
    ("key", "seconds"),
    [
        ("step:new", STATE_TTL_S),
        ("frame:new", STATE_TTL_S),
        ("frame:restored", STATE_TTL_S),
        ("frame:kept", STATE_TTL_S),
        ("frame:slid", RETRY_S),
        ("step:parent", RETRY_S),
        ("next:parent", STATE_TTL_S),
        ("step:untouched", STATE_TTL_S),
    ],
)
def test_key_lives_as_the_key_map_says(
    lives: tuple[StateStore, Callable[[str, float], bool]], key: str, seconds: float
) -> None:
    """Every key has an end: the state TTL, or the retry window once superseded."""
    store, left = lives
    track = new_id()
    store.save([write_of(track, "parent"), write_of(track, "untouched")])
    store.save([write_of(track, "x", memories={"kept": b"k", "slid": b"s"})])
    store.save([write_of(track, "y", superseded_memories=["kept"])])  # to be renewed
    store.claim([StateToken(track, "parent")])
    store.save(
        [
            write_of(
                track,
                "new",
                renewed=["kept"],
                superseded_steps=["parent"],
                superseded_memories=["slid"],
            )
        ]
    )
    store.restore({(track, "restored"): b"r"})

    assert left(f"sam2:{{{track}}}:{key}", seconds)


def test_embedded_store_drops_what_was_used_longest_ago() -> None:
    """It is bounded: the oldest track makes room, the one in use stays."""
    store = MemoryStateStore(state_ttl_s=STATE_TTL_S, retry_window_s=RETRY_S, max_bytes=3000)
    for name in ("old", "used", "newer"):
        store.save([write_of(name, "a", state=b"s", memories={"a": bytes(900)})])
    assert memories(store, "used", "a") == [bytes(900)]
    assert states(store, "used", "a") == [b"s"]

    store.save([write_of("newest", "a", state=b"s", memories={"a": bytes(1500)})])

    assert memories(store, "old", "a") == [None]
    assert memories(store, "newer", "a") == [None]
    assert memories(store, "used", "a") == [bytes(900)]
    assert memories(store, "newest", "a") == [bytes(1500)]


def test_settings_choose_the_store(redis_server: RedisServer) -> None:
    """Without a host tracks live in the process; with one, in that server, by its numbers."""
    own = open_store(Settings())
    environment = redis_server.environment | {"CVAT_FUNCTIONS_REDIS_DB": "3"}
    shared = open_store(Settings.from_env(environment))
    track = new_id()
    shared.save([write_of(track, "a")])
    client = redis_server.client(db=3)

    assert isinstance(own, MemoryStateStore)
    assert isinstance(shared, RedisStateStore)
    assert client.get(f"sam2:{{{track}}}:step:a") == b"state a"
    assert 8 * 3600 - 60 < int(str(client.ttl(f"sam2:{{{track}}}:step:a"))) <= 8 * 3600
    client.close()
    shared.close()


def everything(client: redis.Redis) -> dict[bytes, bytes | None]:
    """Return all keys and values."""
    return {key: client.get(key) for key in client.keys("*")}  # type: ignore[misc]


def test_step_of_a_full_server_is_written_not_at_all(own_server: RedisServer) -> None:
    """Out of memory in the middle of a step: neither its state nor a memory appears."""
    store, client = reach(own_server), own_server.client()
    store.save([write_of("t", "a")])
    before = everything(client)
    client.config_set("maxmemory", "1")

    with pytest.raises(StateStoreUnavailableError, match=r"failed \(OutOfMemoryError\)"):
        store.save([write_of("t", "b", superseded_steps=["a"], dropped_memories=["a"])])
    with pytest.raises(StateStoreUnavailableError, match="nothing is lost, repeat the request"):
        store.claim([StateToken("t", "a")])
    assert everything(client) == before
    assert int(str(client.ttl("sam2:{t}:step:a"))) > RETRY_S
    client.config_set("maxmemory", "0")
    assert store.save([write_of("t", "b", renewed=["a"])]) == [[]]  # the connection still works
    store.close()
    client.close()


def test_failure_inside_a_transaction_is_told(own_server: RedisServer) -> None:
    """An EXEC whose commands failed is no success: its errors come as part of a list."""
    store, client = reach(own_server), own_server.client()
    client.execute_command(  # type: ignore[no-untyped-call]
        "ACL", "SETUSER", "default", "-del"
    )

    with pytest.raises(StateStoreUnavailableError):
        store.save([write_of("t", "b", dropped_steps=["a"])])
    assert everything(client) == {}
    store.close()
    client.close()


@pytest.mark.parametrize("policy", ["volatile-lru", "allkeys-lru"])
def test_cold_read_of_many_objects_evicts_nothing(own_server: RedisServer, policy: str) -> None:
    """Redis counts the answers that it has not sent yet as memory in use, and makes room for them.

    Here 20 of 30 MB are tracks: one answer of them all would cost some of them. A cold read also
    takes no more memory in this process than the values themselves, give or take a piece.
    """
    store, client = reach(own_server, timeout_s=5), own_server.client()
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", str(30 << 20))
    tracks = [str(number) for number in range(50)]
    ids = [str(number) for number in range(7)]
    values = {id_: id_.encode() * 56_000 for id_ in ids}
    state = b"s" * 17_000
    store.save([write_of(track, "a", state=state, memories=values) for track in tracks])

    tracemalloc.start()
    states_read = store.load_states([StateToken(track, "a") for track in tracks])
    memories_read = store.load_memories([(track, id_) for track in tracks for id_ in ids])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert states_read == [state] * len(tracks)
    assert memories_read == [values[id_] for _ in tracks for id_ in ids]
    assert client.info("stats")["evicted_keys"] == 0
    assert peak < 50 * 7 * 56_000 + 3 * READ_CHUNK_BYTES
    store.close()
    client.close()


@pytest.mark.parametrize("size", [0, 1, READ_CHUNK_BYTES // 2, READ_CHUNK_BYTES + 1])
def test_values_of_any_size_are_read_in_order(redis_server: RedisServer, size: int) -> None:
    """Whatever fits into a piece, and with missing values in between."""
    store = reach(redis_server, timeout_s=5)
    track = new_id()
    store.save([write_of(track, "a", memories={str(i): bytes([i]) * size for i in range(9)})])
    asked = ["x", *map(str, range(9)), "y", "0"] * 2

    read = memories(store, track, *asked)

    assert read == [bytes([int(i)]) * size if i.isdigit() else None for i in asked]
    store.close()


CALLS: list[Callable[[StateStore], object]] = [
    lambda store: store.ping(),
    lambda store: store.load_states([StateToken("t", "a")]),
    lambda store: store.load_memories([("t", "a")]),
    lambda store: store.claim([StateToken("t", "a")]),
    lambda store: store.save([write_of("t", "a")]),
    lambda store: store.restore({("t", "a"): b""}),
]
NAMES = ["ping", "load_states", "load_memories", "claim", "save", "restore"]


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_stopped_server_is_unavailable_soon(
    own_server: RedisServer, call: Callable[[StateStore], object]
) -> None:
    """A bounded number of retries, then an error that callers can be told; later it works again."""
    store = reach(own_server)
    store.ping()
    own_server.stop()
    begin = time.monotonic()

    with pytest.raises(StateStoreUnavailableError, match=r"\(ConnectionError\): nothing is lost"):
        call(store)
    assert time.monotonic() - begin < 5
    own_server.start()
    call(store)
    store.close()


def test_silent_server_is_unavailable_soon(own_server: RedisServer) -> None:
    """A server that accepts and never answers is given up after the timeout and its retries."""
    store = reach(own_server, timeout_s=0.2)
    client = own_server.client()
    store.ping()
    client.execute_command("CLIENT", "PAUSE", "60000", "ALL")  # type: ignore[no-untyped-call]
    begin = time.monotonic()

    with pytest.raises(StateStoreUnavailableError, match=r"\(TimeoutError\)"):
        store.load_states([StateToken("t", "a")])
    assert time.monotonic() - begin < 5
    store.close()
    client.close()


def test_wrong_password_is_unavailable_and_not_told(own_server: RedisServer) -> None:
    """The message names the kind of failure; the password stays out of it and its causes."""
    client = own_server.client()
    client.config_set("requirepass", "right")
    client.close()
    refused, let_in = reach(own_server, password="hush"), reach(own_server, password="right")
    begin = time.monotonic()

    with pytest.raises(StateStoreUnavailableError, match=r"\(AuthenticationError\)") as failure:
        refused.ping()
    assert time.monotonic() - begin < 5
    assert "hush" not in f"{failure.value!r} {failure.value.__cause__!r}"
    let_in.ping()
    refused.close()
    let_in.close()


def test_server_that_knows_no_newer_protocol_is_spoken_to_in_the_old_one() -> None:
    """Kvrocks in older CVAT releases answers RESP2 only."""
    client = connect(RedisSettings(host="127.0.0.1"))

    assert client.connection_pool.connection_kwargs["protocol"] == 2
