"""Store tracks in Redis or in this process: keys, lifetimes, transactions. Values are opaque bytes.

    key                          type    holds                  lives
    sam2:{<track>}:step:<step>   string  state after a frame    state TTL from its last use; retry
                                                                window once a newer step exists;
                                                                deleted RETRY_STEPS steps later
    sam2:{<track>}:next:<step>   string  "1": was continued     state TTL; deleted with its step
    sam2:{<track>}:frame:<step>  string  one frame memory       as long as a step that attends to it

Values never change, so they need no locks and cached copies are never stale. The keys of one step
are written in one MULTI; the `{}` puts all keys of a track into one slot of a Redis Cluster (whose
redirections need a proxy). Only plain commands are used (GET, SET, EXPIRE, DEL, MULTI, EXEC, PING),
which Valkey, KeyDB and Kvrocks serve too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import cachetools
import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from errors import StateStoreUnavailableError
from settings import RedisSettings, Settings
from state_token import StateToken

# How many steps back a request may repeat or branch. Each costs one frame memory per track.
RETRY_STEPS = 3
EMBEDDED_STORE_BYTES = 4 << 30
# Redis buffers the answers of a pipeline, counts them as used memory and evicts keys to stay below
# maxmemory. Large values are therefore read in chunks of about this size.
READ_CHUNK_BYTES = 4 << 20
# Assumed sizes until the first values are read. A state has up to 17 KB, a frame memory 0.5 MB at
# 1024 px.
STATE_BYTES = 64 << 10
MEMORY_BYTES = 1 << 20


@dataclass(frozen=True)
class StepWrite:
    """One step to write, and what happens to the track's older keys.

    Attributes:
        token: The new step.
        state: Its encoded state.
        memories: Encoded frame memories to write, by id.
        renewed: Ids of older frame memories that the new step attends to.
        superseded_steps: Steps whose life is cut to the retry window.
        superseded_memories: Frame memories out of the new step's reach; cut likewise.
        dropped_steps: Steps to delete.
        dropped_memories: Frame memories to delete.
    """

    token: StateToken
    state: bytes
    memories: Mapping[str, bytes]
    renewed: Sequence[str] = ()
    superseded_steps: Sequence[str] = ()
    superseded_memories: Sequence[str] = ()
    dropped_steps: Sequence[str] = ()
    dropped_memories: Sequence[str] = ()


class StateStore(Protocol):
    """Stores tracks. Every method but `close` may raise StateStoreUnavailableError."""

    def ping(self) -> None:
        """Return if the store answers."""

    def load_states(self, tokens: Sequence[StateToken]) -> list[bytes | None]:
        """Return encoded states, None for each that is missing."""

    def load_memories(self, keys: Sequence[tuple[str, str]]) -> list[bytes | None]:
        """Return the encoded frame memories of (track, id) pairs, None for each that is missing."""

    def claim(self, tokens: Sequence[StateToken]) -> list[bool]:
        """Mark steps as continued; False for each that was continued before.

        Only the first continuation of a step may write to the track's own keys, because it lets
        older keys expire. Every other continuation starts a new track.
        """

    def save(self, writes: Sequence[StepWrite]) -> list[list[str]]:
        """Write steps, each all or nothing.

        Returns:
            For each write the ids in `renewed` that are missing in the store.
        """

    def restore(self, memories: Mapping[tuple[str, str], bytes]) -> None:
        """Write missing frame memories of (track, id) pairs again."""

    def close(self) -> None:
        """Close the connections."""


class RedisStateStore:
    """Tracks in a Redis server, shared by all replicas.

    Args:
        client: Connection pool to the server, answering bytes.
        state_ttl_s: Life of a track from its last use, in seconds.
        retry_window_s: Life of a superseded step, in seconds.
    """

    def __init__(self, *, client: redis.Redis, state_ttl_s: int, retry_window_s: int) -> None:
        self._client = client
        self._state_ttl_s = state_ttl_s
        self._commands = partial(_commands, ttl_s=state_ttl_s, retry_s=retry_window_s)

    def ping(self) -> None:
        with translated_errors():
            self._client.ping()

    def load_states(self, tokens: Sequence[StateToken]) -> list[bytes | None]:
        keys = [_step_key(token.track, token.step) for token in tokens]
        return self._get(keys, expected_bytes=STATE_BYTES)

    def load_memories(self, keys: Sequence[tuple[str, str]]) -> list[bytes | None]:
        return self._get(
            [_memory_key(track, frame) for track, frame in keys], expected_bytes=MEMORY_BYTES
        )

    def claim(self, tokens: Sequence[StateToken]) -> list[bool]:
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for token in tokens:
                key = _next_key(token.track, token.step)
                pipeline.set(key, b"1", nx=True, ex=self._state_ttl_s)
            return [bool(was_set) for was_set in pipeline.execute()]

    def save(self, writes: Sequence[StepWrite]) -> list[list[str]]:
        transactions = [self._commands(write) for write in writes]
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for commands in transactions:
                # One MULTI per track, all in one round trip: a step never appears without its
                # frame memory, even if this process or the connection fails in between.
                for command in (("MULTI",), *commands, ("EXEC",)):
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            replies = iter(pipeline.execute())
            results = [_exec_replies(replies, len(commands)) for commands in transactions]
        return [_missing(write, result) for write, result in zip(writes, results, strict=True)]

    def restore(self, memories: Mapping[tuple[str, str], bytes]) -> None:
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for (track, frame), data in memories.items():
                pipeline.set(_memory_key(track, frame), data, ex=self._state_ttl_s)
            pipeline.execute()

    def close(self) -> None:
        self._client.close()

    def _get(self, keys: list[str], *, expected_bytes: int) -> list[bytes | None]:
        """Return the values of keys, read in chunks of about `READ_CHUNK_BYTES`.

        Values of one kind have similar sizes: the largest so far sets how many keys a chunk has.

        Args:
            keys: All of one kind.
            expected_bytes: Assumed size of a value until one was read.
        """
        values: list[bytes | None] = []
        with translated_errors():
            while len(values) < len(keys):
                largest = max((len(value) for value in values if value), default=expected_bytes)
                count = max(1, READ_CHUNK_BYTES // largest)
                pipeline = self._client.pipeline(transaction=False)
                # not MGET: the keys of several tracks lie in several slots of a Redis Cluster
                for key in keys[len(values) : len(values) + count]:
                    pipeline.get(key)
                chunk = pipeline.execute()
                if not {type(value) for value in chunk} <= {bytes, type(None)}:
                    raise redis.InvalidResponse("GET was answered by something else than bytes")
                values += chunk
        return values


class MemoryStateStore:
    """Tracks in this process, for one worker of one replica; they end with it.

    Args:
        state_ttl_s: Life of a track from its last use, in seconds.
        retry_window_s: Life of a superseded step, in seconds.
        max_bytes: Above this, the least recently used values are dropped.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        *,
        state_ttl_s: int,
        retry_window_s: int,
        max_bytes: int = EMBEDDED_STORE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state_ttl_s = state_ttl_s
        self._commands = partial(_commands, ttl_s=state_ttl_s, retry_s=retry_window_s)
        self._values: cachetools.TLRUCache[str, tuple[bytes, int]] = cachetools.TLRUCache(
            max_bytes,
            ttu=lambda _key, value, now: now + value[1],
            timer=clock,
            getsizeof=lambda value: len(value[0]),
        )

    def ping(self) -> None:
        """Return at once: this process always answers."""

    def load_states(self, tokens: Sequence[StateToken]) -> list[bytes | None]:
        return [self._get(_step_key(token.track, token.step)) for token in tokens]

    def load_memories(self, keys: Sequence[tuple[str, str]]) -> list[bytes | None]:
        return [self._get(_memory_key(track, frame)) for track, frame in keys]

    def claim(self, tokens: Sequence[StateToken]) -> list[bool]:
        claimed = []
        for token in tokens:
            key = _next_key(token.track, token.step)
            claimed.append(key not in self._values)
            self._run("SET", key, b"1", "EX", self._state_ttl_s)
        return claimed

    def save(self, writes: Sequence[StepWrite]) -> list[list[str]]:
        return [
            _missing(write, [self._run(*command) for command in self._commands(write)])
            for write in writes
        ]

    def restore(self, memories: Mapping[tuple[str, str], bytes]) -> None:
        for (track, frame), data in memories.items():
            self._run("SET", _memory_key(track, frame), data, "EX", self._state_ttl_s)

    def close(self) -> None:
        self._values.clear()

    def _get(self, key: str) -> bytes | None:
        value = self._values.get(key)
        return None if value is None else value[0]

    def _run(self, name: str, key: str, *arguments: object) -> int:
        """Do what Redis does for the commands that `_commands` returns."""
        match name, arguments:
            case "SET", (bytes() as data, "EX", int() as ttl_s):
                self._values[key] = (data, ttl_s)
            case "EXPIRE", (int() as ttl_s,):
                value = self._values.get(key)
                if value is None:
                    return 0
                self._values[key] = (value[0], ttl_s)
            case "DEL", more_keys:
                for dropped in (key, *more_keys):
                    self._values.pop(str(dropped), None)
            case _:
                raise NotImplementedError(name)
        return 1


def open_store(settings: Settings) -> StateStore:
    """Return a store on the Redis server that the settings name, or in this process without one."""
    ttl_s, retry_s = settings.state_ttl_s, settings.retry_window_s
    if settings.redis is None:
        return MemoryStateStore(state_ttl_s=ttl_s, retry_window_s=retry_s)
    client = connect(settings.redis)
    return RedisStateStore(client=client, state_ttl_s=ttl_s, retry_window_s=retry_s)


def connect(settings: RedisSettings) -> redis.Redis:
    """Return a client for the server. It connects on first use and retries failed commands.

    Retries are safe: every command that this module sends may be sent twice.
    """
    return redis.Redis(
        host=settings.host,
        port=settings.port,
        db=settings.db,
        username=settings.username,
        password=None if settings.password is None else settings.password.value,
        ssl=settings.ssl,
        ssl_ca_certs=settings.ssl_ca_certs,
        socket_timeout=settings.timeout_s,
        socket_connect_timeout=settings.timeout_s,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=1, base=0.05), retries=3),
        protocol=2,  # Kvrocks before 2.11 and Redis before 6 do not speak RESP3
    )


def _step_key(track: str, step: str) -> str:
    return f"sam2:{{{track}}}:step:{step}"


def _next_key(track: str, step: str) -> str:
    return f"sam2:{{{track}}}:next:{step}"


def _memory_key(track: str, frame: str) -> str:
    return f"sam2:{{{track}}}:frame:{frame}"


def _commands(write: StepWrite, *, ttl_s: int, retry_s: int) -> list[tuple[Any, ...]]:
    """Return the Redis commands of one write; those for `renewed` come first."""
    track, step = write.token.track, write.token.step
    shortened = [_step_key(track, old) for old in write.superseded_steps]
    shortened += [_memory_key(track, frame) for frame in write.superseded_memories]
    dropped = [_step_key(track, old) for old in write.dropped_steps]
    dropped += [_next_key(track, old) for old in write.dropped_steps]
    dropped += [_memory_key(track, frame) for frame in write.dropped_memories]
    commands: list[tuple[Any, ...]] = []
    commands += [("EXPIRE", _memory_key(track, frame), ttl_s) for frame in write.renewed]
    commands += [
        ("SET", _memory_key(track, frame), data, "EX", ttl_s)
        for frame, data in write.memories.items()
    ]
    commands += [("SET", _step_key(track, step), write.state, "EX", ttl_s)]
    commands += [("EXPIRE", key, retry_s) for key in shortened]
    if dropped:
        commands += [("DEL", *dropped)]
    return commands


def _missing(write: StepWrite, replies: Sequence[Any]) -> list[str]:
    """Return the ids in `renewed` whose EXPIRE, first among a write's commands, found no key."""
    return [id_ for id_, renewed in zip(write.renewed, replies, strict=False) if not renewed]


def _exec_replies(replies: Iterator[Any], count: int) -> list[Any]:
    """Consume the replies to MULTI, `count` commands and EXEC; return those inside EXEC's."""
    *_, results = islice(replies, count + 2)
    if not isinstance(results, list) or len(results) != count:
        raise redis.InvalidResponse("EXEC was not answered by one reply for each command")
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn every error of the Redis client into StateStoreUnavailableError."""
    try:
        yield
    except (redis.RedisError, OSError, ValueError, LookupError, RecursionError) as err:
        # redis-py raises the last three for answers that no Redis server gives. A server repeats
        # the arguments of an unknown command in its error; those of AUTH are the password.
        err.args = tuple(str(text).partition(", with args")[0] for text in err.args)
        # The caller is told the kind of error only; the log also gets the server's message.
        unavailable = StateStoreUnavailableError(
            f"the state store failed ({type(err).__name__}): nothing is lost, repeat the request"
        )
        unreachable = isinstance(err, redis.ConnectionError | redis.TimeoutError)
        unavailable.transient = unreachable and not isinstance(err, redis.AuthenticationError)
        raise unavailable from err
