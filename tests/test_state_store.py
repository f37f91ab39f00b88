from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from copy import deepcopy
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
    """Start a Redis server for one test, to reconfigure or stop."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def store_on(server: RedisServer, *, timeout_s: float = 0.5, password: str = "") -> RedisStateStore:
    """Return a store on a server, connected as in production."""
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
    """Values are returned in the order of the request; missing values are None."""
    track, other = new_id(), new_id()
    state_store.ping()
    missing = state_store.save(
        [
            write_of(track, "a", memories={"a": b"\x00\xff\r\n", "b": b""}),
            write_of(other, "a", state=b"\x80"),
        ]
    )

    assert missing == [[], []]
    assert states(state_store, track, "b", "a") == [None, b"state a"]
    assert states(state_store, other, "a") == [b"\x80"]
    assert memories(state_store, track, "a", "x", "b", "a") == [
        b"\x00\xff\r\n",
        None,
        b"",
        b"\x00\xff\r\n",
    ]
    assert memories(state_store, other, "a", "b") == [b"memory a", None]


def test_empty_requests_are_accepted(state_store: StateStore) -> None:
    """Requests that only start tracks load and claim nothing."""
    assert state_store.load_states([]) == []
    assert state_store.load_memories([]) == []
    assert state_store.claim([]) == []
    assert state_store.save([]) == []
    state_store.restore({})


def test_only_the_first_claim_of_a_step_succeeds(state_store: StateStore) -> None:
    """Also within one request; other steps and tracks are independent."""
    track = new_id()
    a, b, elsewhere = StateToken(track, "a"), StateToken(track, "b"), StateToken(new_id(), "a")

    assert state_store.claim([a, a]) == [True, False]
    assert state_store.claim([a, b, elsewhere]) == [False, True, True]
    assert state_store.claim([b, elsewhere]) == [False, False]


def test_missing_memories_are_reported_and_restored(state_store: StateStore) -> None:
    """A renewal of a missing key is reported, so that a replica with the memory writes it again."""
    track = new_id()
    state_store.save([write_of(track, "a")])
    missing = state_store.save(
        [
            write_of(track, "b", renewed=["x", "a", "y"]),
            write_of(new_id(), "b"),
            write_of(track, "c", renewed=["a", "b"], dropped_steps=["a"], superseded_steps=["q"]),
        ]
    )
    assert missing == [["x", "y"], [], []]

    state_store.restore({(track, "x"): b"memory x", (track, "y"): b"memory y"})

    assert memories(state_store, track, "x", "y") == [b"memory x", b"memory y"]
    assert state_store.save([write_of(track, "d", renewed=["x", "y"])]) == [[]]


def test_dropped_steps_and_memories_are_deleted_with_their_claims(state_store: StateStore) -> None:
    """Steps beyond the retry window take no memory."""
    track = new_id()
    state_store.save([write_of(track, "a"), write_of(track, "b")])
    state_store.claim([StateToken(track, "a")])
    state_store.save([write_of(track, "c", dropped_steps=["a"], dropped_memories=["b"])])

    assert states(state_store, track, "a", "b", "c") == [None, b"state b", b"state c"]
    assert memories(state_store, track, "a", "b", "c") == [b"memory a", None, b"memory c"]
    assert state_store.claim([StateToken(track, "a")]) == [True]


@pytest.fixture(params=["memory", "redis"])
def store_and_ttl(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[StateStore, Callable[[str, float], bool]]]:
    """A store, and a function that tells whether a key has so many seconds left, nearly."""
    if request.param == "memory":
        now = [0.0]
        embedded = MemoryStateStore(
            state_ttl_s=STATE_TTL_S, retry_window_s=RETRY_S, clock=lambda: now[0]
        )

        def expires_in_memory(key: str, seconds: float) -> bool:
            copy = deepcopy(embedded._values)  # which drops expired values when it is read
            now[0] = seconds - 1
            before = embedded._get(key) is not None
            now[0] = seconds + 1
            after = embedded._get(key) is not None
            now[0] = 0.0
            embedded._values = copy
            return before and not after

        yield embedded, expires_in_memory
        return
    client = request.getfixturevalue("redis_server").client()

    def expires(key: str, seconds: float) -> bool:
        return seconds - 30 < int(str(client.pttl(key))) / 1000 <= seconds

    yield RedisStateStore(client=client, state_ttl_s=STATE_TTL_S, retry_window_s=RETRY_S), expires
    client.close()


EXPIRIES = {
    "step:new": STATE_TTL_S,
    "frame:new": STATE_TTL_S,
    "frame:restored": STATE_TTL_S,
    "frame:renewed": STATE_TTL_S,
    "frame:superseded": RETRY_S,
    "step:parent": RETRY_S,
    "next:parent": STATE_TTL_S,
    "step:untouched": STATE_TTL_S,
}


def test_keys_expire_as_the_key_map_says(
    store_and_ttl: tuple[StateStore, Callable[[str, float], bool]],
) -> None:
    """Every key expires after the state TTL, or after the retry window once superseded."""
    store, expires = store_and_ttl
    track = new_id()
    store.save([write_of(track, "parent"), write_of(track, "untouched")])
    store.save([write_of(track, "x", memories={"renewed": b"r", "superseded": b"s"})])
    store.save([write_of(track, "y", superseded_memories=["renewed"])])
    store.claim([StateToken(track, "parent")])
    store.save(
        [
            write_of(
                track,
                "new",
                renewed=["renewed"],
                superseded_steps=["parent"],
                superseded_memories=["superseded"],
            )
        ]
    )
    store.restore({(track, "restored"): b"r"})

    for key, seconds in EXPIRIES.items():
        assert expires(f"sam2:{{{track}}}:{key}", seconds), key


def test_embedded_store_drops_the_least_recently_used() -> None:
    """Its size is bounded; a track in use stays."""
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
    """Without a host tracks are stored in the process, with a host in that server's database."""
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


def test_full_server_writes_no_part_of_a_step(own_server: RedisServer) -> None:
    """Out of memory in the middle of a step: neither its state nor its memory is written."""
    store, client = store_on(own_server), own_server.client()
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


def test_failure_inside_a_transaction_is_raised(own_server: RedisServer) -> None:
    """The errors of commands in a transaction come as part of EXEC's answer."""
    store, client = store_on(own_server), own_server.client()
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
    """Redis counts answers that it has not sent yet as used memory, and evicts keys for them.

    Here 20 of 30 MB are tracks, so the answers to a single pipeline for all would evict some. This
    process needs no more memory than for the values and a few chunks.
    """
    store, client = store_on(own_server, timeout_s=5), own_server.client()
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

    assert client.info("stats")["evicted_keys"] == 0
    assert states_read == [state] * len(tracks)
    assert memories_read == [values[id_] for _ in tracks for id_ in ids]
    assert peak < 50 * 7 * 56_000 + 3 * READ_CHUNK_BYTES
    store.close()
    client.close()


@pytest.mark.parametrize("size", [0, 1, READ_CHUNK_BYTES // 2, READ_CHUNK_BYTES + 1])
def test_values_of_any_size_are_read_in_order(redis_server: RedisServer, size: int) -> None:
    """However many fit into a chunk, and with missing values in between."""
    store = store_on(redis_server, timeout_s=5)
    track = new_id()
    store.save([write_of(track, "a", memories={str(i): bytes([i]) * size for i in range(9)})])
    asked = ["x", *map(str, range(9)), "y", "0"] * 2

    read = memories(store, track, *asked)

    assert read == [bytes([int(i)]) * size if i.isdigit() else None for i in asked]
    store.close()


CALLS: dict[str, Callable[[StateStore], object]] = {
    "ping": lambda store: store.ping(),
    "load_states": lambda store: store.load_states([StateToken("t", "a")]),
    "load_memories": lambda store: store.load_memories([("t", "a")]),
    "claim": lambda store: store.claim([StateToken("t", "a")]),
    "save": lambda store: store.save([write_of("t", "a")]),
    "restore": lambda store: store.restore({("t", "a"): b""}),
}


def test_stopped_server_is_unavailable_until_it_is_back(own_server: RedisServer) -> None:
    """Every method retries a few times and raises; later it works again."""
    store = store_on(own_server)
    store.ping()
    own_server.stop()

    for call in CALLS.values():
        with pytest.raises(StateStoreUnavailableError, match=r"\(ConnectionError\): nothing is l"):
            call(store)
    own_server.start()
    for call in CALLS.values():
        call(store)
    store.close()


def test_silent_server_is_unavailable(own_server: RedisServer) -> None:
    """A server that accepts connections and never answers fails after the timeout and retries."""
    store = store_on(own_server, timeout_s=0.2)
    client = own_server.client()
    store.ping()
    client.execute_command("CLIENT", "PAUSE", "60000", "ALL")  # type: ignore[no-untyped-call]

    with pytest.raises(StateStoreUnavailableError, match=r"\(TimeoutError\)"):
        store.load_states([StateToken("t", "a")])
    store.close()
    client.close()


def test_wrong_password_is_an_error_without_the_password(own_server: RedisServer) -> None:
    """The message names the kind of failure; it and its cause do not contain the password."""
    client = own_server.client()
    client.config_set("requirepass", "right")
    client.close()
    refused, let_in = store_on(own_server, password="hush"), store_on(own_server, password="right")

    with pytest.raises(StateStoreUnavailableError, match=r"\(AuthenticationError\)") as failure:
        refused.ping()
    assert "hush" not in f"{failure.value!r} {failure.value.__cause__!r}"
    let_in.ping()
    refused.close()
    let_in.close()


def test_client_speaks_the_older_protocol() -> None:
    """Kvrocks in older CVAT releases speaks RESP2 only."""
    client = connect(RedisSettings(host="127.0.0.1"))

    assert client.connection_pool.connection_kwargs["protocol"] == 2
