"""Real processes to disturb, ways to disturb them, and a caller who repeats what failed.

Tests try a few of each; `soak.py` tries many and prints what came of it.
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

ROOT = Path(__file__).parent.parent
MICRO_CONFIG = ROOT / "weights" / "micro" / "config.yaml"
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
    """A TCP proxy before a server that cuts its connections after so many bytes.

    Attributes:
        port: Where it listens.
        passed: Bytes that went `up` to the server and `down` to the clients.
        babble: Sent in answer to whatever a client says, instead of asking the server.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed = {"up": 0, "down": 0}
        self.babble: bytes | None = None
        self._left: dict[str, int] = {}
        self._for_good = False
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, way: Literal["up", "down"], count: int, *, for_good: bool = False) -> None:
        """Let so many more bytes pass and cut all connections; new ones too, if for good."""
        with self._lock:
            self._left, self._for_good = {way: count}, for_good

    def mend(self) -> None:
        """Let everything pass from now on, on new connections."""
        with self._lock:
            self._left, self._for_good, self.babble = {}, False, None
            self._cut()

    def close(self) -> None:
        """End."""
        # A thread that waits in accept keeps the port open until the next client.
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
                    if way == "up" and self.babble is not None:
                        source.sendall(self.babble)
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
    """Follows objects through the clip and holds what was answered, as CVAT's page does.

    Attributes:
        states: The newest tokens.
        answers: The shapes of each frame answered, the first frame's left out.
        seconds: How long each answer took.
        frames: How many frames there are to follow.
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
        """Ask for the next frame; keep the answer if it is one."""
        reply = replica.post(*self.request())
        self.take(reply)
        return reply

    def take(self, reply: Reply) -> None:
        """Keep an answer."""
        if reply.status == 200:
            self.answers.append(reply.body["shapes"])
            self.seconds.append(reply.seconds)
            self.states = reply.body["states"]

    def follow(self, replicas: Sequence[Replica], *, until: int | None = None) -> Reply | None:
        """Go on, on one replica after the other; return the first refusal, if there is one."""
        while len(self.answers) < (self.frames - 1 if until is None else until):
            reply = self.ask(replicas[len(self.answers) % len(replicas)])
            if reply.status != 200:
                return reply
        return None


class Stage:
    """Two replicas behind a proxy before one Redis server, all of which may be disturbed.

    Args:
        folder: For files of all kinds.
        environment: Further variables of the replicas.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.redis = RedisServer(folder)
        self.redis.stop()
        self.start_redis(keeps=True)
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

    def start_redis(self, *, keeps: bool) -> None:
        """Start Redis, which keeps every write on disk, or nothing."""
        self.redis.start("--appendonly", "yes" if keeps else "no", "--appendfsync", "always")

    def start_replica(self, **environment: str) -> Replica:
        """Start a process; it takes its time."""
        replica = Replica if "PYTHONPATH" in environment else ForkedReplica
        return replica(self._environment | environment, log=self.log)

    def replace(self, place: int, **environment: str) -> None:
        """End one replica by SIGKILL and start another in its place."""
        self.replicas[place].kill()
        self.replicas[place] = self.start_replica(**environment)
        self.replicas[place].wait()

    def close(self) -> None:
        """End everything."""
        for replica in self.replicas:
            replica.kill()
        self.proxy.close()
        self.redis.process.send_signal(signal.SIGCONT)
        self.redis.stop()


@contextmanager
def stage_in(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Stage]:
    """Set a stage, and clear it."""
    stage = Stage(folder, environment)
    try:
        for replica in stage.replicas:
            replica.wait()
        yield stage
    finally:
        stage.close()


@dataclass(frozen=True)
class Fault:
    """One way to disturb, and what has to come of it.

    Attributes:
        name: What happens.
        happen: Lets it happen during the caller's next request, puts things right again as far as
            an administrator can, and returns what the caller got.
        status: Of that reply.
        message: What the reply says, as a regular expression.
        gone: Whether the tracks are truly lost: the caller is told to start them again.
    """

    name: str
    happen: Callable[[Stage, Caller], Reply]
    status: int
    message: str = ""
    gone: bool = False


def killed_in_flight(stage: Stage, caller: Caller) -> Reply:
    """Kill the replica while it computes: its states were read, nothing was answered."""
    replica, before = stage.replicas[0], stage.proxy.passed["down"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(replica.post, *caller.request())
        while stage.proxy.passed["down"] == before and not asked.done():
            time.sleep(0.001)
        replica.process.kill()
        reply = asked.result()
    stage.replace(0)
    return reply


def redis_restarted(stage: Stage, caller: Caller, *, keeps: bool) -> Reply:
    """Kill the server, ask, and start it again."""
    stage.redis.stop()
    reply = caller.ask(stage.replicas[0])
    stage.start_redis(keeps=keeps)
    return reply


def redis_paused(stage: Stage, caller: Caller) -> Reply:
    """Stop the server for longer than a replica waits; it then does what piled up, late."""
    stage.redis.process.send_signal(signal.SIGSTOP)
    reply = caller.ask(stage.replicas[0])
    stage.redis.process.send_signal(signal.SIGCONT)
    return reply


def redis_paused_for_a_moment(stage: Stage, caller: Caller) -> Reply:
    """Stop the server past one time-out, so that the replica's own retry finds it back."""
    stage.redis.process.send_signal(signal.SIGSTOP)
    awake = threading.Timer(0.5, stage.redis.process.send_signal, [signal.SIGCONT])
    awake.start()
    reply = caller.ask(stage.replicas[0])
    awake.join()
    return reply


def connection_cut(
    stage: Stage, caller: Caller, *, way: Literal["up", "down"], share: float
) -> Reply:
    """Cut all connections once, at a share of what one request sends (up) or reads (down)."""
    before = stage.proxy.passed[way]
    caller.follow(stage.replicas[:1], until=len(caller.answers) + 1)
    usual = stage.proxy.passed[way] - before
    stage.proxy.cut_after(way, int(share * usual))
    reply = caller.ask(stage.replicas[0])
    stage.proxy.mend()
    return reply


def connection_gone(stage: Stage, caller: Caller) -> Reply:
    """Cut in the middle of the pipeline that writes the steps, and let no connection through."""
    before = stage.proxy.passed["up"]
    caller.follow(stage.replicas[:1], until=len(caller.answers) + 1)
    stage.proxy.cut_after("up", (stage.proxy.passed["up"] - before) // 2, for_good=True)
    reply = caller.ask(stage.replicas[0])
    stage.proxy.mend()
    return reply


def redis_full(stage: Stage, caller: Caller) -> Reply:
    """Fill the server bit by bit, so that it refuses now the first write and now a later one."""
    replies = []
    with stage.redis.client() as client:
        for room in (1 << 20, 30_000, 20_000, 10_000, 5_000, 0):
            used = int(client.info("memory")["used_memory"])
            client.config_set("maxmemory", str(used + room))
            replies.append(caller.ask(stage.replicas[0]))
        client.config_set("maxmemory", "0")
    assert {reply.status for reply in replies} <= {200, 503}
    return replies[-1]


def redis_refuses(stage: Stage, caller: Caller) -> Reply:
    """Let the server take no writes, as one does that lost its copies or its disk."""
    with stage.redis.client() as client:
        client.config_set("min-replicas-to-write", "1")
        reply = caller.ask(stage.replicas[0])
        client.config_set("min-replicas-to-write", "0")
    return reply


def babbling(stage: Stage, caller: Caller, *, words: bytes) -> Reply:
    """Let something else answer in the place of Redis."""
    stage.proxy.mend()
    stage.proxy.babble = words
    reply = caller.ask(stage.replicas[0])
    stage.proxy.mend()
    return reply


def other_model(stage: Stage, caller: Caller) -> Reply:
    """Restart one replica with other weights, ask it, and bring the old ones back."""
    stage.replace(0, **micro_environment(stage.folder, seed=1))
    reply = caller.ask(stage.replicas[0])
    stage.replace(0)
    return reply


def wrong_clock(stage: Stage, caller: Caller, *, shift_s: int) -> Reply:
    """Let one replica live in another year, to the end of the clip."""
    folder = stage.folder / f"clock{shift_s}"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "now, now_ns = time.time, time.time_ns\n"
        f"time.time = lambda: now() + {shift_s}\n"
        f"time.time_ns = lambda: now_ns() + {shift_s} * 10**9\n"
    )
    stage.replace(0, PYTHONPATH=str(folder))
    reply = caller.ask(stage.replicas[0])
    assert caller.follow(stage.replicas) is None
    stage.replace(0)
    return reply


YEAR_S = 365 * 86400
BABBLE = {
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
    Fault("Redis is killed and keeps its data", partial(redis_restarted, keeps=True), 503,
          r"\(ConnectionError\): nothing is lost"),
    Fault("Redis is killed and loses its data", partial(redis_restarted, keeps=False), 503,
          r"\(ConnectionError\): nothing is lost", gone=True),
    Fault("Redis stands still past the time-out", redis_paused, 503, r"\(TimeoutError\): nothing"),
    Fault("Redis stands still for one time-out", redis_paused_for_a_moment, 200),
    *[
        Fault(f"the connection is cut {share:.0%} into what a request {verb}",
              partial(connection_cut, way=way, share=share), 200)
        for way, verb in WAYS.items() for share in (0.05, 0.5, 0.95)
    ],
    Fault("the connection is cut for good in the middle of a write", connection_gone, 503,
          r"\(ConnectionError\): nothing is lost"),
    Fault("Redis is full (maxmemory)", redis_full, 503, r"\(OutOfMemoryError\): nothing is lost"),
    Fault("Redis takes no writes", redis_refuses, 503, r"\(\w+Error\): nothing is lost"),
    *[
        Fault(f"something else answers for Redis: {name}", partial(babbling, words=words), 503,
              r"\(\w+\): nothing is lost")
        for name, words in BABBLE.items()
    ],
    Fault("a replica comes back with another model", other_model, 409,
          r"^states\[0\]: state belongs to model \w+, this function runs \w+: start"),
    Fault("a replica's clock is three years ahead", partial(wrong_clock, shift_s=3 * YEAR_S), 200),
    Fault("a replica's clock is three years behind",
          partial(wrong_clock, shift_s=-3 * YEAR_S), 200),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    fault: Fault
    reply: Reply
    end: Literal["same masks", "start again"]


def try_fault(fault: Fault, stage: Stage, undisturbed: list[list[Any]], *, at: int = 5) -> Outcome:
    """Follow the clip, disturb it, go on, and hold the answers to those of an undisturbed run.

    Raises:
        AssertionError: The caller got something else than the fault says, or other masks.
    """
    caller = Caller(frames=len(undisturbed) + 1)
    caller.start(stage.replicas[0])
    assert caller.follow(stage.replicas, until=at) is None
    reply = fault.happen(stage, caller)
    assert reply.status == fault.status, (fault.name, reply)
    assert re.search(fault.message, reply.message), (fault.name, reply)
    refusal = caller.follow(stage.replicas)
    assert caller.answers == undisturbed[: len(caller.answers)], fault.name
    if not fault.gone:
        assert refusal is None, (fault.name, refusal)
        return Outcome(fault, reply, "same masks")
    assert refusal is not None, fault.name
    assert refusal.status == 410, (fault.name, refusal)
    assert re.search(r"^states\[0\] .*: start the track again$", refusal.message), refusal
    again = Caller(frames=caller.frames)
    again.start(stage.replicas[1])
    assert again.follow(stage.replicas) is None
    assert again.answers == undisturbed
    return Outcome(fault, reply, "start again")


POLICIES = ["allkeys-lru", "allkeys-random"]
EVICTING = 300_000  # bytes: room for about one clip


@dataclass(frozen=True)
class Eviction:
    """What came of following clips on a Redis that is too small for them.

    Attributes:
        keys: How many keys it evicted.
        answered: How many requests were answered meanwhile.
        refused: How many were told to start the track again.
    """

    keys: int
    answered: int
    refused: int


def evict(stage: Stage, undisturbed: list[list[Any]], policy: str) -> Eviction:
    """Follow three clips by turns while Redis evicts keys of its own choice, and then to the end.

    Raises:
        AssertionError: Somebody got other masks, or another refusal than to start again.
    """

    def begin() -> Caller:
        caller = Caller(frames=len(undisturbed) + 1)
        caller.start(stage.replicas[0])
        return caller

    answered = refused = 0
    with stage.redis.client() as client:
        for key in client.scan_iter("sam2:*"):
            client.delete(key)
        before = int(client.info("stats")["evicted_keys"])
        room = int(client.info("memory")["used_memory"]) + EVICTING
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", str(room))
        callers = [begin() for _ in range(3)]
        for turn in range(len(undisturbed)):
            for place, caller in enumerate(callers):
                reply = caller.ask(stage.replicas[(turn + place) % 2])
                assert caller.answers == undisturbed[: len(caller.answers)], policy
                if reply.status == 200:
                    answered += 1
                    continue
                assert reply.status == 410, reply
                assert re.search(r"^states\[\d\] .*: start the track again$", reply.message), reply
                refused += 1
                callers[place] = begin()
        evicted = int(client.info("stats")["evicted_keys"]) - before
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
    for caller in callers:
        refusal = caller.follow(stage.replicas)
        assert refusal is None or refusal.status == 410, refusal
        assert caller.answers == undisturbed[: len(caller.answers)], policy
        assert caller.done or refusal is not None
    again = begin()
    assert again.follow(stage.replicas) is None
    assert again.answers == undisturbed
    return Eviction(evicted, answered, refused)


@dataclass(frozen=True)
class Kill:
    """One SIGKILL and where it hit.

    Attributes:
        moment_s: After the request was sent.
        hit: `before the write`, `before the answer` (the step was written), `after the answer`.
    """

    moment_s: float
    hit: str


def kill_at_random(stage: Stage, caller: Caller, kills: int, *, seed: int) -> list[Kill]:
    """Follow the clip to its end while replicas are killed at random moments of its requests.

    The kills are spread over the clip; a frame that is hit is asked for again, as often as it
    takes. Whatever is refused in between fails the run.
    """
    rng = random.Random(seed)
    done: list[Kill] = []
    while not caller.done:
        due = (len(caller.answers) + 1) * kills / (caller.frames - 1)
        if len(done) >= due:
            rng.shuffle(stage.replicas)
            refusal = caller.follow(stage.replicas, until=len(caller.answers) + 1)
            assert refusal is None, refusal
            continue
        place = rng.randrange(2)
        replica, token = stage.replicas[place], StateToken.parse(caller.states[0])
        moment_s = rng.uniform(0, 1.1 * median(caller.seconds or [0.1]))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(replica.post, *caller.request())
            time.sleep(moment_s)
            replica.process.kill()
            reply = asked.result()
        assert reply.status in {0, 200}, reply
        with stage.redis.client() as client:
            written = client.exists(f"sam2:{{{token.track}}}:next:{token.step}")
        hit = "after the answer" if reply.status else "before the answer"
        done.append(Kill(moment_s, hit if written else "before the write"))
        caller.take(reply)
        stage.replace(place)
    return done
