"""Owns where tracks are kept and for how long; moves opaque bytes and knows nothing of tensors.

    key                          type    holds                  lives
    sam2:{<track>}:step:<step>   string  state after a frame    state TTL from its last use; retry
                                                                window once a newer step exists;
                                                                deleted RETRY_STEPS steps later
    sam2:{<track>}:next:<step>   string  "1": was continued     state TTL; deleted with its step
    sam2:{<track>}:frame:<step>  string  one frame memory       as long as a step that attends to it

Values never change, so nothing is locked and nothing can be stale. A track's keys appear together,
in one MULTI; the `{}` would keep them in one slot of a Redis Cluster, whose redirections need a
proxy. Only plain commands are used (GET, SET, EXPIRE, DEL, MULTI, EXEC, PING), which Valkey,
KeyDB and Kvrocks serve too.
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

# How many steps back a repeated or branching request may go. Each costs one frame memory per track.
RETRY_STEPS = 3
EMBEDDED_STORE_BYTES = 4 << 30


@dataclass(frozen=True)
class StepWrite:
    """One step to be written, and what becomes of the track's older keys.

    Attributes:
        token: The new step.
        state: Its encoded state.
        memories: Encoded frame memories to write, by id.
        renewed: Ids of older frame memories that the new step attends to.
        superseded_steps: Steps that from now on live for the retry window only.
        superseded_memories: Likewise, frame memories that slid out of reach.
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
    """Where tracks are kept. All methods raise StateStoreUnavailableError when it is away."""

    def ping(self) -> None:
        """Return if the store answers."""

    def load_states(self, tokens: Sequence[StateToken]) -> list[bytes | None]:
        """Return the encoded states, None for those that are gone."""

    def load_memories(self, keys: Sequence[tuple[str, str]]) -> list[bytes | None]:
        """Return the encoded frame memories of (track, id) pairs, None for those that are gone."""

    def claim(self, tokens: Sequence[StateToken]) -> list[bool]:
        """Mark steps as continued; False for each that somebody continued before.

        Only the first continuation may go on in the track's own keys, because it lets older ones
        expire. Any other makes a track of its own.
        """

    def save(self, writes: Sequence[StepWrite]) -> list[list[str]]:
        """Write steps, each all or nothing.

        Returns:
            For each write the ids in `renewed` that the store has lost.
        """

    def restore(self, memories: Mapping[tuple[str, str], bytes]) -> None:
        """Write lost frame memories of (track, id) pairs again."""

    def close(self) -> None:
        """Let go of connections."""


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
        return self._get([_step_key(token.track, token.step) for token in tokens])

    def load_memories(self, keys: Sequence[tuple[str, str]]) -> list[bytes | None]:
        return self._get([_memory_key(track, frame) for track, frame in keys])

    def claim(self, tokens: Sequence[StateToken]) -> list[bool]:
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for token in tokens:
                key = _next_key(token.track, token.step)
                pipeline.set(key, b"1", nx=True, ex=self._state_ttl_s)
            return [bool(first) for first in pipeline.execute()]

    def save(self, writes: Sequence[StepWrite]) -> list[list[str]]:
        transactions = [self._commands(write) for write in writes]
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for commands in transactions:
                # One MULTI a track, all in one round trip: a step never appears without its
                # frame memory, whatever happens to this process or the connection.
                for command in (("MULTI",), *commands, ("EXEC",)):
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            replies = iter(pipeline.execute())
            done = [_done(replies, len(commands)) for commands in transactions]
        return [_lost(write, replies) for write, replies in zip(writes, done, strict=True)]

    def restore(self, memories: Mapping[tuple[str, str], bytes]) -> None:
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for (track, frame), data in memories.items():
                pipeline.set(_memory_key(track, frame), data, ex=self._state_ttl_s)
            pipeline.execute()

    def close(self) -> None:
        self._client.close()

    def _get(self, keys: list[str]) -> list[bytes | None]:
        if not keys:
            return []
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:  # not MGET: the keys of several tracks lie in several cluster slots
                pipeline.get(key)
            values = list(pipeline.execute())
            if not {type(value) for value in values} <= {bytes, type(None)}:
                raise redis.InvalidResponse("GET was answered by something else than bytes")
        return values


class MemoryStateStore:
    """Tracks in this process, for one worker of one replica; they end with it.

    Args:
        state_ttl_s: Life of a track from its last use, in seconds.
        retry_window_s: Life of a superseded step, in seconds.
        max_bytes: Above this, the tracks that were not used for longest are dropped.
        clock: Seconds that only go forward.
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
        """Return: it is always there."""

    def load_states(self, tokens: Sequence[StateToken]) -> list[bytes | None]:
        return [self._get(_step_key(token.track, token.step)) for token in tokens]

    def load_memories(self, keys: Sequence[tuple[str, str]]) -> list[bytes | None]:
        return [self._get(_memory_key(track, frame)) for track, frame in keys]

    def claim(self, tokens: Sequence[StateToken]) -> list[bool]:
        first = []
        for token in tokens:
            key = _next_key(token.track, token.step)
            first.append(key not in self._values)
            self._run("SET", key, b"1", "EX", self._state_ttl_s)
        return first

    def save(self, writes: Sequence[StepWrite]) -> list[list[str]]:
        return [
            _lost(write, [self._run(*command) for command in self._commands(write)])
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
        """Do what Redis does for the few commands of `_commands`."""
        match name, arguments:
            case "SET", (bytes() as data, "EX", int() as ttl_s):
                self._values[key] = (data, ttl_s)
            case "EXPIRE", (int() as ttl_s,):
                value = self._values.get(key)
                if value is None:
                    return 0
                self._values[key] = (value[0], ttl_s)
            case "DEL", others:
                for dropped in (key, *others):
                    self._values.pop(str(dropped), None)
            case _:
                raise NotImplementedError(name)
        return 1


def open_store(settings: Settings) -> StateStore:
    """Return the store that the settings name: a Redis server, or the embedded one without host."""
    ttl_s, retry_s = settings.state_ttl_s, settings.retry_window_s
    if settings.redis is None:
        return MemoryStateStore(state_ttl_s=ttl_s, retry_window_s=retry_s)
    client = connect(settings.redis)
    return RedisStateStore(client=client, state_ttl_s=ttl_s, retry_window_s=retry_s)


def connect(settings: RedisSettings) -> redis.Redis:
    """Return a client for the server; connects on first use and repeats what failed in between.

    Every command this module sends may be sent twice, so a lost answer is simply asked for again.
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
    """List the Redis commands of one write; those for `renewed` come first."""
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


def _lost(write: StepWrite, replies: Sequence[Any]) -> list[str]:
    """Return the ids whose renewal, first among a write's commands, found nothing to renew."""
    return [id_ for id_, kept in zip(write.renewed, replies, strict=False) if not kept]


def _done(replies: Iterator[Any], count: int) -> list[Any]:
    """Take the replies to one transaction of so many commands; return those of its EXEC."""
    *_, done = islice(replies, count + 2)
    if not isinstance(done, list) or len(done) != count:
        raise redis.InvalidResponse("EXEC was not answered by one reply for each command")
    for reply in done:
        if isinstance(reply, Exception):
            raise reply
    return done


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise StateStoreUnavailableError for whatever the Redis client raises inside."""
    try:
        yield
    except (redis.RedisError, OSError, ValueError, LookupError, RecursionError) as err:
        # All but the first are what redis-py makes of answers that no Redis server gives.
        # Servers repeat the arguments of a command that they do not know; AUTH's is the password.
        err.args = tuple(str(word).partition(", with args")[0] for word in err.args)
        # The kind is enough for a caller; the log gets the server's words as well.
        unavailable = StateStoreUnavailableError(
            f"the state store failed ({type(err).__name__}): nothing is lost, repeat the request"
        )
        unreachable = isinstance(err, redis.ConnectionError | redis.TimeoutError)
        unavailable.may_pass = unreachable and not isinstance(err, redis.AuthenticationError)
        raise unavailable from err
