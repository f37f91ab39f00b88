from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testbed.functions import Reply
from tests.faults.machinery import (
    FAULTS,
    FRAMES,
    POLICIES,
    Caller,
    Deployment,
    Fault,
    deploy_in,
    evict,
    kill_at_random,
    prompts,
    try_fault,
)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two replicas and their own Redis."""
    with deploy_in(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> list[list[Any]]:
    """The answers of a run without faults."""
    caller = Caller()
    caller.start(deployment.replicas[0])
    assert caller.follow(deployment.replicas[:1]) is None
    assert sum(shape is not None for shapes in caller.answers for shape in shapes) > 22
    assert len({str(shapes) for shapes in caller.answers}) == 11
    return caller.answers


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_track_survives(fault: Fault, deployment: Deployment, undisturbed: list[list[Any]]) -> None:
    """The caller is told what to do, does it, and gets the masks of an undisturbed run."""
    try_fault(fault, deployment, undisturbed[:6], at=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_evicted_tracks_are_followed_exactly_or_refused(
    policy: str, deployment: Deployment, undisturbed: list[list[Any]]
) -> None:
    """A server too small for all clips evicts some keys; no mask ever differs."""
    seen = evict(deployment, undisturbed[:6], policy)

    assert seen.keys > 20
    assert seen.answered > 0
    assert seen.refused > 0


def test_replicas_killed_at_random_moments_lose_nothing(
    deployment: Deployment, undisturbed: list[list[Any]]
) -> None:
    """Another replica answers the repeated request with the same masks."""
    caller = Caller()
    caller.start(deployment.replicas[0])
    kills = kill_at_random(deployment, caller, 2, seed=0)

    assert len(kills) == 2
    assert caller.answers == undisturbed


def test_request_sent_to_two_replicas_at_once_is_answered_by_both(
    deployment: Deployment, undisturbed: list[list[Any]]
) -> None:
    """Both answers are right, and both tracks can be followed to the end, on either replica."""
    one, other = Caller(frames=6), Caller(frames=6)
    one.start(deployment.replicas[0])
    with ThreadPoolExecutor(2) as pool:
        while not one.done:
            pending = [pool.submit(replica.post, *one.request()) for replica in deployment.replicas]
            replies = [future.result() for future in pending]
            assert [reply.status for reply in replies] == [200, 200]
            one.take(replies[0])
            other.take(replies[1])
            assert not set(one.states) & set(other.states)
            one, other = other, one

    assert one.answers == other.answers == undisturbed[:5]


def test_many_clients_get_the_masks_that_each_would_get_alone(
    deployment: Deployment, undisturbed: list[list[Any]]
) -> None:
    """Requests of several clips are served by turns on both replicas."""
    callers = [Caller(frames=7) for _ in range(4)]

    def follow(caller: Caller) -> Reply | None:
        caller.start(deployment.replicas[0])
        return caller.follow(deployment.replicas)

    with ThreadPoolExecutor(len(callers)) as pool:
        refusals = list(pool.map(follow, callers))

    assert refusals == [None] * len(callers)
    assert [caller.answers for caller in callers] == [undisturbed[:6]] * len(callers)


def test_hundred_objects_in_one_request_are_tracked(deployment: Deployment) -> None:
    """All are answered, the first of them as in a request of their own."""
    many = (prompts() * 25)[:100]
    states = deployment.replicas[0].track(FRAMES[0], many, [])["states"]
    alone = deployment.replicas[1].track(FRAMES[1], [None] * 4, states[:4])["shapes"]
    answer = deployment.replicas[1].track(FRAMES[1], [None] * 100, states)

    assert len(set(states)) == len(set(answer["states"])) == 100
    assert answer["shapes"] == alone * 25


def test_sigterm_lets_the_running_requests_finish(deployment: Deployment) -> None:
    """The running request and a waiting one are answered; new ones are refused; it ends."""
    replica, other = deployment.replicas
    many = prompts() * 10
    before = deployment.proxy.passed["up"]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(replica.post, FRAMES[0], many, []) for _ in range(2)]
        time.sleep(0.1)
        assert deployment.proxy.passed["up"] == before  # nothing is written yet
        replica.process.send_signal(signal.SIGTERM)
        replies = [future.result() for future in running]
    status = replica.process.wait(60)

    assert [reply.status for reply in replies] == [200, 200]
    assert status == -signal.SIGTERM  # as a process that was asked to end
    assert replica.post(FRAMES[0], many, []).status == 0
    states = replies[1].body["states"]
    assert other.post(FRAMES[1], [None] * len(states), states).status == 200


def test_sigterm_ends_an_idle_replica(deployment: Deployment) -> None:
    """Idle connections do not delay the end."""
    replica = deployment.replicas[1]
    replica.wait()  # leaves a connection open
    replica.process.send_signal(signal.SIGTERM)

    assert replica.process.wait(60) == -signal.SIGTERM


def test_replicas_log_no_bug(deployment: Deployment) -> None:
    """No request of the tests above failed for an unexpected reason."""
    log = deployment.log.read_text()

    assert "[warning] refused: {'status': 503, " in log
    assert "Traceback" not in log
    assert "[error] " not in log
