"""A deployment of real processes, faults to inject, and a caller that follows a clip.

Tests inject a few faults of each kind; `soak.py` injects many and prints the results.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from shapes import ShapeType, encode_cvat_rle, mask_to_shape
from state_token import StateToken
from testbed.drawn_frames import base64_text, blob_mask, block_mask, jpeg_frames
from testbed.forked_replica import ForkedReplica
from testbed.functions import Replica, Reply, micro_environment
from testbed.redis_server import RedisServer

FRAMES = [base64_text(frame) for frame in jpeg_frames(40)]


def prompts() -> list[dict[str, Any]]:
    """Return four objects, one of each type."""
    polygon = mask_to_shape(block_mask(), ShapeType.POLYGON)
    assert polygon is not None
    return [
        {"type": "mask", "points": encode_cvat_rle(blob_mask())},
        {"type": "polygon", "points": list(polygon.points)},
        {"type": "rectangle", "points": [220, 40, 271, 101]},
        {"type": "ellipse", "points": [60, 90, 90, 60]},
    ]


class Proxy:
    """A TCP proxy in front of a server that can cut connections after a number of bytes.

    Attributes:
        port: Port that it listens on.
        passed: Bytes that went `up` to the server and `down` to the clients.
        garbage: Sent in answer to any data of a client, instead of asking the server.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed = {"up": 0, "down": 0}
        self.garbage: bytes | None = None
        self._left: dict[str, int] = {}
        self._for_good = False
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, way: Literal["up", "down"], count: int, *, for_good: bool = False) -> None:
        """Cut all connections after `count` more bytes; new connections too, if for good."""
        with self._lock:
            self._left, self._for_good = {way: count}, for_good

    def mend(self) -> None:
        """Let everything pass again, on new connections."""
        with self._lock:
            self._left, self._for_good, self.garbage = {}, False, None
            self._cut()

    def close(self) -> None:
        """Stop listening and cut all connections."""
        # A thread that waits in accept holds the port open until the next client.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        refused = suppress(ConnectionRefusedError)
        with client, refused, socket.create_connection(self._target) as server:
            with self._lock:
                self._open += [client, server]
            down = threading.Thread(target=self._pump, args=("down", server, client))
            down.start()
            self._pump("up", client, server)
            down.join()
            with self._lock:
                self._open = [end for end in self._open if end not in (client, server)]

    def _pump(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    if way == "up" and self.garbage is not None:
                        source.sendall(self.garbage)
                        continue
                    left = self._left.get(way, len(data))
                    sink.sendall(data[:left])
                    self.passed[way] += min(left, len(data))
                    if way in self._left:
                        self._left[way] = max(0, left - len(data))
                    if left < len(data):
                        self._left = {way: 0} if self._for_good else {}
                        self._cut()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Caller:
    """Follows objects through a clip and stores the answers, as CVAT's page does.

    Attributes:
        states: The newest tokens.
        answers: The shapes of each answered frame after the first.
        seconds: Duration of each answered request.
        frames: Number of frames to follow.
    """

    states: list[str] = field(default_factory=list)
    answers: list[list[Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    frames: int = 12

    @property
    def done(self) -> bool:
        """Whether the last frame is answered."""
        return len(self.answers) == self.frames - 1

    def start(self, replica: Replica) -> None:
        """Draw the objects on the first frame."""
        self.states = replica.track(FRAMES[0], prompts(), [])["states"]

    def request(self) -> tuple[str, list[None], list[str]]:
        """Return image, shapes and states of the next request."""
        return FRAMES[len(self.answers) + 1], [None] * len(self.states), self.states

    def ask(self, replica: Replica) -> Reply:
        """Ask for the next frame; store the answer if the request succeeded."""
        reply = replica.post(*self.request())
        self.take(reply)
        return reply

    def take(self, reply: Reply) -> None:
        """Store an answer."""
        if reply.status == 200:
            self.answers.append(reply.body["shapes"])
            self.seconds.append(reply.seconds)
            self.states = reply.body["states"]

    def follow(self, replicas: Sequence[Replica], *, until: int | None = None) -> Reply | None:
        """Continue on alternating replicas; return the first refusal, or None."""
        while len(self.answers) < (self.frames - 1 if until is None else until):
            reply = self.ask(replicas[len(self.answers) % len(replicas)])
            if reply.status != 200:
                return reply
        return None


class Deployment:
    """Two replicas that reach one Redis server through a proxy.

    Args:
        folder: For logs, weights and Redis's files.
        environment: Further variables of the replicas.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.redis = RedisServer(folder)
        self.redis.stop()
        self.start_redis(persistent=True)
        self.proxy = Proxy(self.redis.port)
        self.log = folder / "replicas.log"
        self._environment = (
            {name: value for name, value in os.environ.items() if not name.startswith("SAM2_")}
            | micro_environment(folder)
            | {
                "CVAT_FUNCTIONS_REDIS_HOST": "127.0.0.1",
                "CVAT_FUNCTIONS_REDIS_PORT": str(self.proxy.port),
                "CVAT_FUNCTIONS_REDIS_TIMEOUT": "0.3",
            }
            | (environment or {})
        )
        self.replicas = [self.start_replica(), self.start_replica()]

    def start_redis(self, *, persistent: bool) -> None:
        """Start Redis, which writes every command to disk, or nothing."""
        self.redis.start("--appendonly", "yes" if persistent else "no", "--appendfsync", "always")

    def start_replica(self, **environment: str) -> Replica:
        """Start a replica and return before it serves."""
        replica = Replica if "PYTHONPATH" in environment else ForkedReplica
        return replica(self._environment | environment, log=self.log)

    @contextmanager
    def third_replica(self, **environment: str) -> Iterator[Replica]:
        """Start a further replica with other variables, and kill it afterwards."""
        replica = self.start_replica(**environment)
        try:
            replica.wait()
            yield replica
        finally:
            replica.kill()

    def replace(self, index: int) -> None:
        """Kill one replica and start another."""
        self.replicas[index].kill()
        self.replicas[index] = self.start_replica()
        self.replicas[index].wait()

    def close(self) -> None:
        """Stop all processes."""
        for replica in self.replicas:
            replica.kill()
        self.proxy.close()
        self.redis.process.send_signal(signal.SIGCONT)
        self.redis.stop()


@contextmanager
def deploy_in(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Deployment]:
    """Start a deployment, and stop it afterwards."""
    deployment = Deployment(folder, environment)
    try:
        for replica in deployment.replicas:
            replica.wait()
        yield deployment
    finally:
        deployment.close()


@dataclass(frozen=True)
class Fault:
    """One fault and its expected outcome.

    Attributes:
        name: What fails.
        inject: Causes the fault during the caller's next request, repairs what an administrator
            can repair, and returns the reply to the request.
        status: Expected status of the reply.
        message: Expected message of the reply, as a regular expression.
        loses_tracks: Whether the tracks are lost, so that the caller is told to start them again.
    """

    name: str
    inject: Callable[[Deployment, Caller], Reply]
    status: int
    message: str = ""
    loses_tracks: bool = False


def killed_in_flight(deployment: Deployment, caller: Caller) -> Reply:
    """Kill a replica while it computes: it has read the states and answered nothing."""
    with deployment.third_replica() as replica, ThreadPoolExecutor(1) as pool:
        before = deployment.proxy.passed["down"]
        pending = pool.submit(replica.post, *caller.request())
        while deployment.proxy.passed["down"] == before and not pending.done():
            time.sleep(0.001)
        replica.process.kill()
        return pending.result()


def redis_restarted(deployment: Deployment, caller: Caller, *, persistent: bool) -> Reply:
    """Kill the server, ask, and start it again."""
    deployment.redis.stop()
    reply = caller.ask(deployment.replicas[0])
    deployment.start_redis(persistent=persistent)
    return reply


def redis_paused(deployment: Deployment, caller: Caller) -> Reply:
    """Stop the server for longer than a replica waits; it runs the queued commands later."""
    deployment.redis.process.send_signal(signal.SIGSTOP)
    reply = caller.ask(deployment.replicas[0])
    deployment.redis.process.send_signal(signal.SIGCONT)
    return reply


def redis_paused_briefly(deployment: Deployment, caller: Caller) -> Reply:
    """Stop the server for longer than one time-out, so that a retry of the replica succeeds."""
    deployment.redis.process.send_signal(signal.SIGSTOP)
    resume = threading.Timer(0.5, deployment.redis.process.send_signal, [signal.SIGCONT])
    resume.start()
    reply = caller.ask(deployment.replicas[0])
    resume.join()
    return reply


def connection_cut(
    deployment: Deployment, caller: Caller, *, way: Literal["up", "down"], share: float
) -> Reply:
    """Cut all connections once, at a share of the bytes that one request sends or reads."""
    before = deployment.proxy.passed[way]
    caller.follow(deployment.replicas[:1], until=len(caller.answers) + 1)
    usual = deployment.proxy.passed[way] - before
    deployment.proxy.cut_after(way, int(share * usual))
    reply = caller.ask(deployment.replicas[0])
    deployment.proxy.mend()
    return reply


def connection_lost(deployment: Deployment, caller: Caller) -> Reply:
    """Cut in the middle of the pipeline that writes the steps, and refuse further connections."""
    before = deployment.proxy.passed["up"]
    caller.follow(deployment.replicas[:1], until=len(caller.answers) + 1)
    deployment.proxy.cut_after("up", (deployment.proxy.passed["up"] - before) // 2, for_good=True)
    reply = caller.ask(deployment.replicas[0])
    deployment.proxy.mend()
    return reply


def redis_full(deployment: Deployment, caller: Caller) -> Reply:
    """Fill the server in steps, so that it refuses the first or a later write of a request."""
    replies = []
    with deployment.redis.client() as client:
        for room in (1 << 20, 30_000, 20_000, 10_000, 5_000, 0):
            used = int(client.info("memory")["used_memory"])
            client.config_set("maxmemory", str(used + room))
            replies.append(caller.ask(deployment.replicas[0]))
        client.config_set("maxmemory", "0")
    assert {reply.status for reply in replies} <= {200, 503}
    return replies[-1]


def redis_read_only(deployment: Deployment, caller: Caller) -> Reply:
    """Let the server refuse writes, as a server does that lost its replicas or its disk."""
    with deployment.redis.client() as client:
        client.config_set("min-replicas-to-write", "1")
        reply = caller.ask(deployment.replicas[0])
        client.config_set("min-replicas-to-write", "0")
    return reply


def garbage_answered(deployment: Deployment, caller: Caller, *, data: bytes) -> Reply:
    """Answer with other data instead of Redis."""
    deployment.proxy.mend()
    deployment.proxy.garbage = data
    reply = caller.ask(deployment.replicas[0])
    deployment.proxy.mend()
    return reply


def other_model(deployment: Deployment, caller: Caller) -> Reply:
    """Ask a replica with other weights."""
    with deployment.third_replica(**micro_environment(deployment.folder, seed=1)) as replica:
        return caller.ask(replica)


def wrong_clock(deployment: Deployment, caller: Caller, *, shift_s: int) -> Reply:
    """Ask a replica with a wrong clock, by turns with another replica until the clip ends."""
    folder = deployment.folder / f"clock{shift_s}"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "now, now_ns = time.time, time.time_ns\n"
        f"time.time = lambda: now() + {shift_s}\n"
        f"time.time_ns = lambda: now_ns() + {shift_s} * 10**9\n"
    )
    with deployment.third_replica(PYTHONPATH=str(folder)) as replica:
        reply = caller.ask(replica)
        assert caller.follow([replica, deployment.replicas[1]]) is None
    return reply


YEAR_S = 365 * 86400
GARBAGE = {
    "not Redis": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "binary": bytes(range(256)) * 4,
    "lengths that are none": b"$zz\r\n*-7\r\n:x\r\n",
    "nothing": b"",
    "lists without end": b"*1\r\n" * 100_000,
    "a giant announced": b"$536870912\r\nx",
    "empty answers": b"*0\r\n" * 100,
    "OK to everything": b"+OK\r\n" * 200,
    "numbers": b":1\r\n" * 200,
    "still loading": b"-LOADING Redis is loading the dataset in memory\r\n" * 200,
    "moved": b"-MOVED 3999 127.0.0.1:1\r\n" * 200,
    "no permission": b"-NOPERM this user has no permissions\r\n" * 200,
    "busy": b"-BUSY Redis is busy running a script\r\n" * 200,
    "disk full": b"-MISCONF Redis is configured to save snapshots\r\n" * 200,
    "wrong type": b"-WRONGTYPE Operation against a key\r\n" * 200,
}
WAYS: dict[Literal["up", "down"], str] = {"up": "sends", "down": "reads"}
FAULTS = [
    Fault("a replica is killed while it computes", killed_in_flight, 0, "RemoteProtocol|ReadError"),
    Fault("Redis is killed and keeps its data", partial(redis_restarted, persistent=True), 503,
          r"\(ConnectionError\): nothing is lost"),
    Fault("Redis is killed and loses its data", partial(redis_restarted, persistent=False), 503,
          r"\(ConnectionError\): nothing is lost", loses_tracks=True),
    Fault("Redis stands still past the time-out", redis_paused, 503, r"\(TimeoutError\): nothing"),
    Fault("Redis stands still for one time-out", redis_paused_briefly, 200),
    *[
        Fault(f"the connection is cut {share:.0%} into what a request {verb}",
              partial(connection_cut, way=way, share=share), 200)
        for way, verb in WAYS.items() for share in (0.05, 0.5, 0.95)
    ],
    Fault("the connection is cut for good in the middle of a write", connection_lost, 503,
          r"\(ConnectionError\): nothing is lost"),
    Fault("Redis is full (maxmemory)", redis_full, 503, r"\(OutOfMemoryError\): nothing is lost"),
    Fault("Redis takes no writes", redis_read_only, 503, r"\(\w+Error\): nothing is lost"),
    *[
        Fault(f"something else answers for Redis: {name}", partial(garbage_answered, data=data),
              503, r"\(\w+\): nothing is lost")
        for name, data in GARBAGE.items()
    ],
    Fault("a replica comes back with another model", other_model, 409,
          r"^states\[0\]: state belongs to model \w+, this function runs \w+: start"),
    Fault("a replica's clock is three years ahead", partial(wrong_clock, shift_s=3 * YEAR_S), 200),
    Fault("a replica's clock is three years behind",
          partial(wrong_clock, shift_s=-3 * YEAR_S), 200),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The result of one fault."""

    fault: Fault
    reply: Reply
    end: Literal["same masks", "start again"]


def try_fault(
    fault: Fault, deployment: Deployment, undisturbed: list[list[Any]], *, at: int = 5
) -> Outcome:
    """Follow the clip, inject a fault after `at` answers, continue, and compare the answers.

    Args:
        fault: The fault.
        deployment: Where to inject it.
        undisturbed: The answers without a fault.
        at: Number of answers before the fault.

    Raises:
        AssertionError: The reply or a later answer is not the expected one.
    """
    caller = Caller(frames=len(undisturbed) + 1)
    caller.start(deployment.replicas[0])
    assert caller.follow(deployment.replicas, until=at) is None
    reply = fault.inject(deployment, caller)
    assert reply.status == fault.status, (fault.name, reply)
    assert re.search(fault.message, reply.message), (fault.name, reply)
    refusal = caller.follow(deployment.replicas)
    assert caller.answers == undisturbed[: len(caller.answers)], fault.name
    if not fault.loses_tracks:
        assert refusal is None, (fault.name, refusal)
        return Outcome(fault, reply, "same masks")
    assert refusal is not None, fault.name
    assert refusal.status == 410, (fault.name, refusal)
    assert re.search(r"^states\[0\] .*: start the track again$", refusal.message), refusal
    again = Caller(frames=caller.frames)
    again.start(deployment.replicas[1])
    assert again.follow(deployment.replicas) is None
    assert again.answers == undisturbed
    return Outcome(fault, reply, "start again")


POLICIES = ["allkeys-lru", "allkeys-random"]
EVICTING = 300_000  # bytes: room for about one clip


@dataclass(frozen=True)
class Eviction:
    """The result of following clips on a Redis server that is too small for them.

    Attributes:
        keys: Number of evicted keys.
        answered: Number of answered requests.
        refused: Number of requests that were told to start the track again.
    """

    keys: int
    answered: int
    refused: int


def evict(deployment: Deployment, undisturbed: list[list[Any]], policy: str) -> Eviction:
    """Follow three clips by turns while Redis evicts keys, and then to the end without evictions.

    Raises:
        AssertionError: A caller got other masks, or another refusal than to start again.
    """

    def begin() -> Caller:
        caller = Caller(frames=len(undisturbed) + 1)
        caller.start(deployment.replicas[0])
        return caller

    answered = refused = 0
    with deployment.redis.client() as client:
        for key in client.scan_iter("sam2:*"):
            client.delete(key)
        before = int(client.info("stats")["evicted_keys"])
        room = int(client.info("memory")["used_memory"]) + EVICTING
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", str(room))
        callers = [begin() for _ in range(3)]
        for turn in range(len(undisturbed)):
            for index, caller in enumerate(callers):
                reply = caller.ask(deployment.replicas[(turn + index) % 2])
                assert caller.answers == undisturbed[: len(caller.answers)], policy
                if reply.status == 200:
                    answered += 1
                    continue
                assert reply.status == 410, reply
                assert re.search(r"^states\[\d\] .*: start the track again$", reply.message), reply
                refused += 1
                callers[index] = begin()
        evicted = int(client.info("stats")["evicted_keys"]) - before
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
    for caller in callers:
        refusal = caller.follow(deployment.replicas)
        assert refusal is None or refusal.status == 410, refusal
        assert caller.answers == undisturbed[: len(caller.answers)], policy
        assert caller.done or refusal is not None
    again = begin()
    assert again.follow(deployment.replicas) is None
    assert again.answers == undisturbed
    return Eviction(evicted, answered, refused)


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a replica.

    Attributes:
        moment_s: Seconds after the request was sent.
        hit: `before the write`, `before the answer` (the step was written), `after the answer`.
    """

    moment_s: float
    hit: str


def kill_at_random(deployment: Deployment, caller: Caller, kills: int, *, seed: int) -> list[Kill]:
    """Follow the clip to its end while replicas are killed at random moments of its requests.

    The kills are spread over the clip; a request that got no answer is repeated.

    Raises:
        AssertionError: A request was refused.
    """
    rng = random.Random(seed)
    done: list[Kill] = []
    while not caller.done:
        due = (len(caller.answers) + 1) * kills / (caller.frames - 1)
        if len(done) >= due:
            rng.shuffle(deployment.replicas)
            refusal = caller.follow(deployment.replicas, until=len(caller.answers) + 1)
            assert refusal is None, refusal
            continue
        index = rng.randrange(2)
        replica, token = deployment.replicas[index], StateToken.parse(caller.states[0])
        moment_s = rng.uniform(0, 1.1 * median(caller.seconds or [0.1]))
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(replica.post, *caller.request())
            time.sleep(moment_s)
            replica.process.kill()
            reply = pending.result()
        assert reply.status in {0, 200}, reply
        with deployment.redis.client() as client:
            written = client.exists(f"sam2:{{{token.track}}}:next:{token.step}")
        hit = "after the answer" if reply.status else "before the answer"
        done.append(Kill(moment_s, hit if written else "before the write"))
        caller.take(reply)
        deployment.replace(index)
    return done
