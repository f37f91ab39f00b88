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
from testbed.functions import Function
from tests.faults.machinery import prompts
from track_state import decode_state
from tracker import Frame, Tracker

CLIP = jpeg_frames(12)
STARTS = [Start(Shape(ShapeType(prompt["type"]), prompt["points"])) for prompt in prompts()]


@pytest.fixture(scope="module")
def replica(embedded_function: Function, client: redis.Redis) -> Callable[..., Tracker]:
    """Start replicas with a common model and Redis, each with an empty cache."""
    model = embedded_function.context.user_data.service.tracker._model

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
class HeldToken:
    """A caller's token.

    Attributes:
        obj: Number of the object.
        index: Number of the frame that the object was tracked on last.
        token: The token.
    """

    obj: int
    index: int
    token: StateToken


@pytest.fixture(scope="module")
def undisturbed(replica: Callable[..., Tracker]) -> list[list[Any]]:
    """The shape of each object on each frame, in order and without faults."""
    tracker = replica()
    tracked = tracker.run(frame(0), STARTS)
    answers = [[obj.shape for obj in tracked]]
    for index in range(1, len(CLIP)):
        tracked = tracker.run(frame(index), [Continue(obj.token) for obj in tracked])
        answers.append([obj.shape for obj in tracked])
    return answers


@pytest.mark.parametrize("seed", range(2))
def test_requests_in_any_order_get_the_undisturbed_masks(
    replica: Callable[..., Tracker], client: redis.Redis, undisturbed: list[list[Any]], seed: int
) -> None:
    """Any tokens of any tracks, repeated, twice in one request, on any replica.

    Some tokens are too old, and some of their keys are deleted. A request is refused only if a key
    of the named token is missing.
    """
    rng = random.Random(seed)
    trackers = [replica(), replica()]
    started = trackers[0].run(frame(0), STARTS)
    held = [HeldToken(number, 0, obj.token) for number, obj in enumerate(started)]
    refused = 0
    for _ in range(40):
        if rng.random() < 0.1:
            trackers[rng.randrange(2)] = replica()
        if rng.random() < 0.15:
            keys: list[bytes] = client.keys(f"sam2:{{{rng.choice(held).token.track}}}:*")  # type: ignore[assignment]
            client.delete(*rng.sample(sorted(keys), min(len(keys), 2)))
        index = rng.choice(held).index
        chosen = rng.choices([old for old in held if old.index == index], k=rng.randint(1, 5))
        tracker = rng.choice(trackers)
        try:
            tracked = tracker.run(frame(index + 1), [Continue(old.token) for old in chosen])
        except StateGoneError as err:
            position = int(str(err).removeprefix("states[").partition("]")[0])
            token = chosen[position].token
            assert is_missing(client, tracker, token)
            held = [old for old in held if old.token != token]
            refused += 1
            if not held:
                held = [HeldToken(0, 0, tracker.run(frame(0), STARTS[:1])[0].token)]
            continue
        assert [new.shape for new in tracked] == [undisturbed[index + 1][old.obj] for old in chosen]
        assert len({new.token for new in tracked}) == len(tracked)
        pairs = list(zip(chosen, tracked, strict=True))
        same_track = [old.token for old, new in pairs if new.token.track == old.token.track]
        # only one continuation may let a track's keys expire
        assert len(set(same_track)) == len(same_track)
        if index + 2 < len(CLIP):
            held += [HeldToken(old.obj, index + 1, new.token) for old, new in pairs]
    assert refused > 0
    assert max(old.index for old in held) > 3


def is_missing(client: redis.Redis, tracker: Tracker, token: StateToken) -> bool:
    """Tell whether a step, or a frame memory that it needs, is missing in the store."""
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
    """A request can be repeated for some time; then only the newest token can be continued."""
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
    for second in (new, again):
        (third,) = replica().run(frame(2), [Continue(second.token)])
        assert second.shape == undisturbed[1][0]
        assert third.shape == undisturbed[2][0]
