from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from PIL import Image

from errors import StateGoneError
from object_requests import Continue, Start
from shapes import Shape, ShapeType
from state_store import RedisStateStore
from state_token import StateToken
from testbed.drawn_frames import SIZE_HW, jpeg_frames
from testbed.functions import Function, micro_environment
from tests.faults.machinery import prompts
from track_state import decode_state
from tracker import Frame, Tracker

CLIP = jpeg_frames(12)
STARTS = [Start(Shape(ShapeType(one["type"]), one["points"])) for one in prompts()]


@pytest.fixture(scope="module")
def replica(
    start_function: Callable[[dict[str, str]], Function],
    tmp_path_factory: pytest.TempPathFactory,
    client: redis.Redis,
) -> Callable[..., Tracker]:
    """Start replicas: one very small model, one Redis, each with a cold cache."""
    started = start_function(micro_environment(tmp_path_factory.mktemp("weights")))
    model = started.context.user_data.service.tracker._model

    def start(retry_window_s: int = 100) -> Tracker:
        return Tracker(
            model=model,
            store=RedisStateStore(client=client, state_ttl_s=100, retry_window_s=retry_window_s),
            memory_cache_bytes=1 << 26,
            polygon_tolerance=1.0,
            request_limit_s=100,
        )

    return start


def frame(index: int) -> Frame:
    """Return a frame of the clip."""
    return Frame(f"clip {index}", SIZE_HW, lambda: Image.open(io.BytesIO(CLIP[index])))


@dataclass(frozen=True)
class Held:
    """A token that a caller has kept: which object it is, and the last frame it was found on."""

    which: int
    index: int
    token: StateToken


@pytest.fixture(scope="module")
def undisturbed(replica: Callable[..., Tracker]) -> list[list[Any]]:
    """Where each object is on each frame, in order and without disturbance."""
    tracker = replica()
    found = tracker.run(frame(0), STARTS)
    answers = [[one.shape for one in found]]
    for index in range(1, len(CLIP)):
        found = tracker.run(frame(index), [Continue(one.token) for one in found])
        answers.append([one.shape for one in found])
    return answers


@pytest.mark.parametrize("seed", range(3))
def test_requests_in_any_order_get_the_undisturbed_masks(
    replica: Callable[..., Tracker], client: redis.Redis, undisturbed: list[list[Any]], seed: int
) -> None:
    """Any tokens held, of any tracks, repeated, twice in one request, on any replica.

    Some tokens are too old by then, and some of their keys are evicted: what cannot be continued
    is refused by its place in the request, and only if something of it is truly gone.
    """
    rng = random.Random(seed)
    trackers = [replica(), replica()]
    held = [
        Held(which, 0, one.token) for which, one in enumerate(trackers[0].run(frame(0), STARTS))
    ]
    refused = 0
    for _ in range(40):
        if rng.random() < 0.1:
            trackers[rng.randrange(2)] = replica()
        if rng.random() < 0.15:
            keys: list[bytes] = client.keys(f"sam2:{{{rng.choice(held).token.track}}}:*")  # type: ignore[assignment]
            client.delete(*rng.sample(sorted(keys), min(len(keys), 2)))
        index = rng.choice(held).index
        together = [one for one in held if one.index == index]
        chosen = rng.choices(together, k=rng.randint(1, 5))
        tracker = rng.choice(trackers)
        try:
            found = tracker.run(frame(index + 1), [Continue(one.token) for one in chosen])
        except StateGoneError as err:
            place = int(str(err).removeprefix("states[").partition("]")[0])
            assert is_gone(client, tracker, chosen[place].token)
            held = [one for one in held if one.token != chosen[place].token]
            refused += 1
            if not held:
                held = [Held(0, 0, tracker.run(frame(0), STARTS[:1])[0].token)]
            continue
        assert [one.shape for one in found] == [undisturbed[index + 1][one.which] for one in chosen]
        assert len({one.token for one in found}) == len(found)
        pairs = zip(chosen, found, strict=True)
        kept = [old.token for old, new in pairs if new.token.track == old.token.track]
        assert len(set(kept)) == len(kept)  # only one continuation may let a track's keys expire
        if index + 2 < len(CLIP):
            held += [
                Held(old.which, index + 1, new.token)
                for old, new in zip(chosen, found, strict=True)
            ]
    assert refused > 0
    assert max(one.index for one in held) > 3


def is_gone(client: redis.Redis, tracker: Tracker, token: StateToken) -> bool:
    """Tell whether a step, or a frame memory it needs, is really not in the store."""
    data = client.get(f"sam2:{{{token.track}}}:step:{token.step}")
    if data is None:
        return True
    assert isinstance(data, bytes)
    model = tracker._model
    state = decode_state(
        data,
        step_id=token.step,
        fingerprint=model.fingerprint,
        obj_ptr_size=model.obj_ptr_size,
    )
    names = [f"sam2:{{{token.track}}}:frame:{id_}" for id_ in state.memory_ids]
    return client.exists(*names) < len(names)


def test_old_token_works_within_the_retry_window_and_says_so_after_it(
    replica: Callable[..., Tracker], client: redis.Redis, undisturbed: list[list[Any]]
) -> None:
    """A repeated request has its time; then the newest token goes on and the old one is gone."""
    tracker = replica(retry_window_s=2)
    (old,) = tracker.run(frame(0), STARTS[:1])
    (new,) = tracker.run(frame(1), [Continue(old.token)])
    (again,) = tracker.run(frame(1), [Continue(old.token)])
    key = f"sam2:{{{old.token.track}}}:step:{old.token.step}"
    assert 0 < int(str(client.pttl(key))) <= 2000
    while client.exists(key):
        time.sleep(0.05)

    with pytest.raises(StateGoneError, match=r"^states\[0\] expired or is unknown: start the trac"):
        tracker.run(frame(1), [Continue(old.token)])
    for one in (new, again):
        (found,) = replica().run(frame(2), [Continue(one.token)])
        assert one.shape == undisturbed[1][0]
        assert found.shape == undisturbed[2][0]
