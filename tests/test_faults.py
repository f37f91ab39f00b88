from __future__ import annotations

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
    Fault,
    Stage,
    evict,
    kill_at_random,
    prompts,
    stage_in,
    try_fault,
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two replicas and a Redis of our own, to disturb."""
    with stage_in(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> list[list[Any]]:
    """The answers of a run that nobody disturbs."""
    caller = Caller()
    caller.start(stage.replicas[0])
    assert caller.follow(stage.replicas[:1]) is None
    assert sum(shape is not None for shapes in caller.answers for shape in shapes) > 22
    assert len({str(shapes) for shapes in caller.answers}) == 11
    return caller.answers


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_track_survives(fault: Fault, stage: Stage, undisturbed: list[list[Any]]) -> None:
    """The caller is told what to do, does it, and gets the masks of an undisturbed run."""
    try_fault(fault, stage, undisturbed[:9], at=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_tracks_that_redis_evicts_are_followed_exactly_or_not_at_all(
    policy: str, stage: Stage, undisturbed: list[list[Any]]
) -> None:
    """A server too small for all clips takes keys of its own choice; no mask is ever another."""
    seen = evict(stage, undisturbed[:6], policy)

    assert seen.keys > 20
    assert seen.answered > 0
    assert seen.refused > 0


def test_replicas_killed_at_random_moments_lose_nothing(
    stage: Stage, undisturbed: list[list[Any]]
) -> None:
    """Whatever a replica was doing, another one repeats the request to the same masks."""
    caller = Caller()
    caller.start(stage.replicas[0])
    kills = kill_at_random(stage, caller, 2, seed=0)

    assert len(kills) == 2
    assert caller.answers == undisturbed


def test_one_request_sent_to_two_replicas_at_once_is_answered_twice(
    stage: Stage, undisturbed: list[list[Any]]
) -> None:
    """Both answers are right, and both go on to the end by themselves, on either replica."""
    one, other = Caller(), Caller()
    one.start(stage.replicas[0])
    with ThreadPoolExecutor(2) as pool:
        while not one.done:
            asked = [pool.submit(replica.post, *one.request()) for replica in stage.replicas]
            replies = [future.result() for future in asked]
            assert [reply.status for reply in replies] == [200, 200]
            one.take(replies[0])
            other.take(replies[1])
            assert not set(one.states) & set(other.states)
            one, other = other, one

    assert one.answers == other.answers == undisturbed


def test_many_clients_get_the_masks_that_each_would_get_alone(
    stage: Stage, undisturbed: list[list[Any]]
) -> None:
    """Requests of several clips in progress are served by turns on both replicas."""
    callers = [Caller() for _ in range(4)]

    def follow(caller: Caller) -> Reply | None:
        caller.start(stage.replicas[0])
        return caller.follow(stage.replicas)

    with ThreadPoolExecutor(len(callers)) as pool:
        refusals = list(pool.map(follow, callers))

    assert refusals == [None] * len(callers)
    assert [caller.answers for caller in callers] == [undisturbed] * len(callers)


def test_hundred_objects_in_one_request_are_tracked(stage: Stage) -> None:
    """As many as an annotator may draw: all are answered, the first like those drawn alone."""
    many = (prompts() * 25)[:100]
    states = stage.replicas[0].track(FRAMES[0], many, [])["states"]
    alone = stage.replicas[1].track(FRAMES[1], [None] * 4, states[:4])["shapes"]
    answer = stage.replicas[1].track(FRAMES[1], [None] * 100, states)

    assert len(set(states)) == len(set(answer["states"])) == 100
    assert answer["shapes"] == alone * 25


def test_replicas_log_no_bug(stage: Stage) -> None:
    """Whatever happened above, no request failed for a reason that nobody thought of."""
    log = stage.log.read_text()

    assert "[warning] refused: {'status': 503, " in log
    assert "Traceback" not in log
    assert "[error] " not in log
