from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pytest
import redis
from PIL import Image

from errors import BadRequestError, StateGoneError, StateMismatchError, TooLargeError
from object_requests import Continue, Start
from shapes import Shape, ShapeType, encode_cvat_rle
from state_store import RETRY_STEPS, RedisStateStore
from state_token import StateToken, new_id
from testbed.drawn_frames import SIZE_HW, blob_mask, block_mask, jpeg_frames
from testbed.functions import Function
from track_state import MEMORY_REACH
from tracker import Frame, TrackedObject, Tracker

CLIP = jpeg_frames(31)
BLOB = Start(Shape(ShapeType.MASK, encode_cvat_rle(blob_mask())))
BLOCK = Start(Shape(ShapeType.MASK, encode_cvat_rle(block_mask())))
BOX = Start(Shape(ShapeType.RECTANGLE, [220.0, 40.0, 271.0, 101.0]))


def frame(index: int) -> Frame:
    """Return a frame of the clip."""
    return Frame(f"clip {index}", SIZE_HW, lambda: Image.open(io.BytesIO(CLIP[index])))


def never() -> NoReturn:
    """Stand for a picture that must not be asked for."""
    pytest.fail("computed before everything was checked")


UNSEEN = Frame("never computed", SIZE_HW, never)


@pytest.fixture
def replica(function: Function, client: redis.Redis) -> Callable[[], Tracker]:
    """Start replicas: one model, one Redis, each with a cold cache."""
    store = RedisStateStore(client=client, state_ttl_s=1000, retry_window_s=100)
    model = function.context.user_data.service.tracker._model
    return lambda: Tracker(
        model=model,
        store=store,
        memory_cache_bytes=1 << 26,
        polygon_tolerance=1.0,
        request_limit_s=100,
    )


def run(tracker: Tracker, index: int, *items: Start | Continue | StateToken) -> list[TrackedObject]:
    """Track on one frame; a token means to continue it."""
    wanted = [Continue(item) if isinstance(item, StateToken) else item for item in items]
    return tracker.run(frame(index), wanted)


def follow(tracker: Tracker, token: StateToken, frames: Sequence[int]) -> list[TrackedObject]:
    """Continue one track over several frames."""
    answers = []
    for index in frames:
        (answer,) = run(tracker, index, token)
        token = answer.token
        answers.append(answer)
    return answers


def seen(answers: Sequence[TrackedObject]) -> list[Any]:
    """Return all of the answers but their tokens."""
    return [(one.shape and list(one.shape.points), one.lost, one.score) for one in answers]


def contents(client: redis.Redis, pattern: str = "*") -> dict[bytes, bytes | None]:
    """Return keys and values."""
    return {key: client.get(key) for key in client.keys(pattern)}  # type: ignore[misc]


@pytest.fixture(scope="module")
def undisturbed(function: Function) -> list[Any]:
    """What a run of twelve steps without any disturbance says of the blob."""
    tracker: Tracker = function.context.user_data.service.tracker
    answers = follow(tracker, run(tracker, 0, BLOB)[0].token, range(1, 13))
    assert sum(not one.lost for one in answers) > 6
    return seen(answers)


def test_bytes_per_track_stay_flat_and_the_last_steps_can_be_repeated(
    replica: Callable[[], Tracker], client: redis.Redis
) -> None:
    """However long the video; and the retry window reaches a fixed number of steps back."""
    tracker = replica()
    tokens = [run(tracker, 0, BLOB)[0].token]
    sizes = []
    for index in range(1, 31):
        (answer,) = run(tracker, index, tokens[-1])
        tokens.append(answer.token)
        kept = contents(client, f"sam2:{{{tokens[0].track}}}:*")
        sizes.append((len(kept), sum(len(value or b"") for value in kept.values())))

    assert {token.track for token in tokens} == {tokens[0].track}
    # states and frame memories in reach of the newest step and those before it, and the claims
    assert {count for count, _ in sizes[19:]} == {3 * RETRY_STEPS + 2 + MEMORY_REACH}
    settled = [size for _, size in sizes[19:]]
    assert max(settled) <= 1.005 * min(settled)
    cold = replica()
    for back in range(RETRY_STEPS + 1, 0, -1):  # the newest last: going on from it moves the window
        assert run(cold, 31 - back, tokens[-back])[0].token.step != tokens[-back].step
    for token in tokens[: -RETRY_STEPS - 1]:
        with pytest.raises(StateGoneError, match=r"^states\[0\] expired or is unknown: start"):
            tracker.run(UNSEEN, [Continue(token)])


@pytest.mark.parametrize("same_replica", [True, False])
def test_repeated_request_gives_the_same_and_both_branches_go_on(
    replica: Callable[[], Tracker], undisturbed: list[Any], *, same_replica: bool
) -> None:
    """A lost answer or a double click: no branch ever notices the others."""
    first = replica()
    second = first if same_replica else replica()
    answers = follow(first, run(first, 0, BLOB)[0].token, range(1, 6))
    parent = answers[3].token
    branches = [answers[4], *run(second, 5, parent), *run(first, 5, parent)]
    tokens = [branch.token for branch in branches]

    assert [seen([branch]) for branch in branches] == [undisturbed[4:5]] * 3
    assert len(set(tokens)) == 3
    for index in range(6, 13):
        found = [run(first, index, tokens[0]), run(second, index, tokens[1])]
        found.append(run(replica(), index, tokens[2]))
        assert [seen(one) for one in found] == [undisturbed[index - 1 : index]] * 3
        tokens = [one[0].token for one in found]


def test_same_token_twice_in_one_request_makes_two_tracks(
    replica: Callable[[], Tracker], undisturbed: list[Any]
) -> None:
    """An annotator may copy an object: both follow the same pixels from then on."""
    tracker = replica()
    token = follow(tracker, run(tracker, 0, BLOB)[0].token, [1, 2])[-1].token
    one, other = run(tracker, 3, token, token)

    assert seen([one]) == seen([other]) == undisturbed[2:3]
    assert one.token.track != other.token.track
    assert seen(follow(replica(), one.token, range(4, 13))) == undisturbed[3:]
    assert seen(follow(replica(), other.token, range(4, 13))) == undisturbed[3:]


def test_objects_of_different_ages_share_a_request(
    replica: Callable[[], Tracker], undisturbed: list[Any]
) -> None:
    """Old, young and new objects in any order: each gets what it gets alone."""
    tracker = replica()
    old = follow(tracker, run(tracker, 0, BLOB)[0].token, range(1, 9))[-1].token
    young = run(tracker, 8, BLOCK)[0].token
    alone = run(replica(), 9, young)
    started, younger, older = run(tracker, 9, BOX, young, old)

    assert seen([older]) == undisturbed[8:9]
    assert seen([younger]) == seen(alone)
    assert started.shape == BOX.shape
    again = run(tracker, 10, older.token, started.token, younger.token)
    assert seen(again[:1]) == undisturbed[9:10]
    assert [one.shape and one.shape.type for one in again[1:2]] == ["rectangle"]


def test_lost_frame_memory_is_written_again_by_who_has_it(
    replica: Callable[[], Tracker], client: redis.Redis, undisturbed: list[Any]
) -> None:
    """The store was flushed or ran full: the replica that holds the memories heals it."""
    tracker = replica()
    answers = follow(tracker, run(tracker, 0, BLOB)[0].token, range(1, 5))
    pattern = f"sam2:{{{answers[-1].token.track}}}:frame:*"
    before = contents(client, pattern)
    client.delete(*before)
    (healed,) = run(tracker, 5, answers[-1].token)

    assert before.keys() < contents(client, pattern).keys()
    assert seen(follow(replica(), healed.token, range(6, 13))) == undisturbed[5:]


def test_lost_frame_memory_that_nobody_has_ends_the_track(
    replica: Callable[[], Tracker], client: redis.Redis
) -> None:
    """A cold replica cannot go on: it says so before it computes or writes anything."""
    tracker = replica()
    token = follow(tracker, run(tracker, 0, BLOB)[0].token, [1, 2])[-1].token
    other = run(tracker, 2, BLOCK)[0].token
    client.delete(f"sam2:{{{token.track}}}:frame:{token.step}")
    before = contents(client)

    with pytest.raises(StateGoneError, match=r"^states\[1\] lost its frames: start the track agai"):
        replica().run(UNSEEN, [Continue(other), Continue(token)])
    assert contents(client) == before


def test_damaged_values_end_the_track(replica: Callable[[], Tracker], client: redis.Redis) -> None:
    """Bytes that somebody spoiled never reach the network."""
    token = run(replica(), 0, BLOB)[0].token
    for kind in ("frame", "step"):
        client.set(f"sam2:{{{token.track}}}:{kind}:{token.step}", b"spoiled")

        with pytest.raises(StateGoneError, match=r"^states\[0\]: the stored state .* is damaged"):
            replica().run(UNSEEN, [Continue(token)])


def test_frame_of_another_size_is_refused(replica: Callable[[], Tracker]) -> None:
    """A state of one video does not go on in another."""
    tracker = replica()
    token = run(tracker, 0, BLOB)[0].token

    with pytest.raises(StateMismatchError, match=r"^states\[0\] is of frames of 320 x 180 pixels, "
                                                 r"this one has 180 x 320: start"):  # fmt: skip
        tracker.run(Frame("turned", (320, 180), never), [Continue(token)])


def test_state_of_another_model_is_refused(
    replica: Callable[[], Tracker], function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the model was changed its old tracks are told so."""
    tracker = replica()
    token = run(tracker, 0, BLOB)[0].token
    model = function.context.user_data.service.tracker._model
    monkeypatch.setattr(model, "fingerprint", "other")

    with pytest.raises(StateMismatchError, match=r"^states\[0\]: state belongs to model"):
        tracker.run(UNSEEN, [Continue(token)])


def test_request_that_takes_too_long_writes_nothing(
    replica: Callable[[], Tracker], client: redis.Redis
) -> None:
    """It stops by itself before the platform ends the worker; the tokens stay usable."""
    tracker = replica()
    token = run(tracker, 0, BLOB)[0].token
    before = contents(client)
    tracker._request_limit_s = 0

    with pytest.raises(TooLargeError, match="2 objects take longer than 0 s: track fewer at a"):
        run(tracker, 1, token, BOX)
    assert contents(client) == before


@pytest.mark.parametrize(
    ("bad", "error", "reason"),
    [
        (Start(Shape(ShapeType.RECTANGLE, [900, 900, 950, 950])), BadRequestError,
         r"^shapes\[2\]: rectangle has no area"),
        (Start(Shape(ShapeType.POLYGON, [1, 1, 2])), BadRequestError, r"^shapes\[2\]: polygon"),
        (Start(Shape(ShapeType.MASK, [4, 0, 0, 1, 1])), BadRequestError, r"^shapes\[2\]: mask"),
        (Continue(StateToken(new_id(), new_id())), StateGoneError, r"^states\[2\] expired"),
    ],
)  # fmt: skip
def test_one_bad_item_fails_the_request_before_anything_happens(
    replica: Callable[[], Tracker],
    client: redis.Redis,
    bad: Start | Continue,
    error: type[Exception],
    reason: str,
) -> None:
    """No partial answers: the good items' tokens are as usable as before."""
    tracker = replica()
    token = run(tracker, 0, BLOB)[0].token
    before = contents(client)

    with pytest.raises(error, match=reason):
        tracker.run(UNSEEN, [Continue(token), BOX, bad])
    assert contents(client) == before


def test_rectangle_that_is_lost_keeps_its_last_box(
    replica: Callable[[], Tracker], function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVAT's own page cannot take null for a rectangle; a mask is null. Both may come back."""
    tracker = replica()
    box, mask = run(tracker, 0, BOX, BLOB)
    model = function.context.user_data.service.tracker._model
    with monkeypatch.context() as patch:
        patch.setattr(model, "full_size_mask", lambda *_: blob_mask() & ~blob_mask())
        lost = run(tracker, 1, box.token, mask.token)
    found = run(tracker, 2, lost[0].token, lost[1].token)

    assert [one.lost for one in lost] == [True, True]
    assert [one.shape for one in lost] == [BOX.shape, None]
    assert [one.token.track for one in found] == [box.token.track, mask.token.track]
