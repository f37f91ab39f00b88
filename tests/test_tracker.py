from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest
import redis
import torch
from PIL import Image

from errors import BadRequestError, StateGoneError, StateMismatchError, TooLargeError
from model_handler import ModelHandler
from model_loader import load_model
from object_requests import Continue, Start
from settings import Settings
from shapes import Shape, ShapeType, encode_cvat_rle
from state_store import RETRY_STEPS, MemoryStateStore, RedisStateStore
from state_token import StateToken, new_id
from testbed.drawn_frames import SIZE_HW, blob_mask, block_mask, jpeg_frames
from testbed.functions import Function
from track_state import MEMORY_REACH
from tracker import Frame, Report, TrackedObject, Tracker, build_tracker

MICRO = Settings(model_id="micro", device="cpu", image_size=128)
CLIP = jpeg_frames(31)
BLOB = Start(Shape(ShapeType.MASK, encode_cvat_rle(blob_mask())))
BLOCK = Start(Shape(ShapeType.MASK, encode_cvat_rle(block_mask())))
BOX = Start(Shape(ShapeType.RECTANGLE, [220.0, 40.0, 271.0, 101.0]))


def frame(index: int) -> Frame:
    """Return a frame of the clip."""
    return Frame(f"clip {index}", SIZE_HW, lambda: Image.open(io.BytesIO(CLIP[index])))


def never() -> NoReturn:
    """Fail where an image must not be read."""
    pytest.fail("computed before everything was checked")


UNREAD = Frame("never computed", SIZE_HW, never)


@pytest.fixture
def replica(function: Function, client: redis.Redis) -> Callable[[], Tracker]:
    """Start replicas on one model and one Redis, each with an empty cache."""
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


def without_tokens(answers: Sequence[TrackedObject]) -> list[Any]:
    """Return all of the answers but their tokens."""
    return [(obj.shape and list(obj.shape.points), obj.lost, obj.score) for obj in answers]


def contents(client: redis.Redis, pattern: str = "*") -> dict[bytes, bytes | None]:
    """Return keys and values."""
    return {key: client.get(key) for key in client.keys(pattern)}  # type: ignore[misc]


@pytest.fixture(scope="module")
def undisturbed(function: Function) -> list[Any]:
    """The blob's answers over twelve steps without any disturbance."""
    tracker: Tracker = function.context.user_data.service.tracker
    answers = follow(tracker, run(tracker, 0, BLOB)[0].token, range(1, 13))
    assert sum(not obj.lost for obj in answers) > 6
    return without_tokens(answers)


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
        stored = contents(client, f"sam2:{{{tokens[0].track}}}:*")
        sizes.append((len(stored), sum(len(value or b"") for value in stored.values())))

    assert {token.track for token in tokens} == {tokens[0].track}
    # states and frame memories in reach of the newest step and those before it, and the claims
    assert {count for count, _ in sizes[19:]} == {3 * RETRY_STEPS + 2 + MEMORY_REACH}
    settled = [size for _, size in sizes[19:]]
    assert max(settled) <= 1.005 * min(settled)
    cold = replica()
    for back in range(RETRY_STEPS + 1, 0, -1):  # the newest last: to continue it moves the window
        assert run(cold, 31 - back, tokens[-back])[0].token.step != tokens[-back].step
    for token in tokens[: -RETRY_STEPS - 1]:
        with pytest.raises(StateGoneError, match=r"^states\[0\] expired or is unknown: start"):
            tracker.run(UNREAD, [Continue(token)])


@pytest.mark.parametrize("same_replica", [True, False])
def test_repeated_request_gives_the_same_and_both_branches_continue(
    replica: Callable[[], Tracker], undisturbed: list[Any], *, same_replica: bool
) -> None:
    """A lost answer or a double click: no branch ever notices the others."""
    first = replica()
    second = first if same_replica else replica()
    answers = follow(first, run(first, 0, BLOB)[0].token, range(1, 6))
    parent = answers[3].token
    branches = [answers[4], *run(second, 5, parent), *run(first, 5, parent)]
    tokens = [branch.token for branch in branches]

    assert [without_tokens([branch]) for branch in branches] == [undisturbed[4:5]] * 3
    assert len(set(tokens)) == 3
    for index in range(6, 13):
        steps = [run(first, index, tokens[0]), run(second, index, tokens[1])]
        steps.append(run(replica(), index, tokens[2]))
        assert [without_tokens(step) for step in steps] == [undisturbed[index - 1 : index]] * 3
        tokens = [step[0].token for step in steps]


def test_same_token_twice_in_one_request_makes_two_tracks(
    replica: Callable[[], Tracker], undisturbed: list[Any]
) -> None:
    """An annotator may copy an object: both tracks give the same from then on."""
    tracker = replica()
    token = follow(tracker, run(tracker, 0, BLOB)[0].token, [1, 2])[-1].token
    first, second = run(tracker, 3, token, token)

    assert without_tokens([first]) == without_tokens([second]) == undisturbed[2:3]
    assert first.token.track != second.token.track
    assert without_tokens(follow(replica(), first.token, range(4, 13))) == undisturbed[3:]
    assert without_tokens(follow(replica(), second.token, range(4, 13))) == undisturbed[3:]


def test_objects_of_different_ages_share_a_request(
    replica: Callable[[], Tracker], undisturbed: list[Any]
) -> None:
    """Old, young and new objects in any order: each gets what it gets alone."""
    tracker = replica()
    old = follow(tracker, run(tracker, 0, BLOB)[0].token, range(1, 9))[-1].token
    young = run(tracker, 8, BLOCK)[0].token
    alone = run(replica(), 9, young)
    started, younger, older = run(tracker, 9, BOX, young, old)

    assert without_tokens([older]) == undisturbed[8:9]
    assert without_tokens([younger]) == without_tokens(alone)
    assert started.shape == BOX.shape
    again = run(tracker, 10, older.token, started.token, younger.token)
    assert without_tokens(again[:1]) == undisturbed[9:10]
    assert [obj.shape and obj.shape.type for obj in again[1:2]] == ["rectangle"]


def test_lost_frame_memory_is_written_again_by_a_replica_that_caches_it(
    replica: Callable[[], Tracker], client: redis.Redis, undisturbed: list[Any]
) -> None:
    """The store was flushed or ran full: the replica's next step restores what the track needs."""
    tracker = replica()
    answers = follow(tracker, run(tracker, 0, BLOB)[0].token, range(1, 5))
    pattern = f"sam2:{{{answers[-1].token.track}}}:frame:*"
    before = contents(client, pattern)
    client.delete(*before)
    (restored,) = run(tracker, 5, answers[-1].token)

    assert before.keys() < contents(client, pattern).keys()
    assert without_tokens(follow(replica(), restored.token, range(6, 13))) == undisturbed[5:]


def test_lost_frame_memory_that_no_replica_caches_ends_the_track(
    replica: Callable[[], Tracker], client: redis.Redis
) -> None:
    """A replica with an empty cache refuses before it computes or writes anything."""
    tracker = replica()
    token = follow(tracker, run(tracker, 0, BLOB)[0].token, [1, 2])[-1].token
    other = run(tracker, 2, BLOCK)[0].token
    client.delete(f"sam2:{{{token.track}}}:frame:{token.step}")
    before = contents(client)

    with pytest.raises(StateGoneError, match=r"^states\[1\] lost its frame memories: start "):
        replica().run(UNREAD, [Continue(other), Continue(token)])
    assert contents(client) == before


def test_damaged_values_end_the_track(replica: Callable[[], Tracker], client: redis.Redis) -> None:
    """Damaged bytes never reach the network."""
    token = run(replica(), 0, BLOB)[0].token
    for kind in ("frame", "step"):
        client.set(f"sam2:{{{token.track}}}:{kind}:{token.step}", b"damaged")

        with pytest.raises(StateGoneError, match=r"^states\[0\]: the stored state .* is damaged"):
            replica().run(UNREAD, [Continue(token)])


def test_frame_of_another_size_is_refused(replica: Callable[[], Tracker]) -> None:
    """A track of one video cannot continue in another."""
    tracker = replica()
    token = run(tracker, 0, BLOB)[0].token

    with pytest.raises(StateMismatchError, match=r"^states\[0\] is of frames of 320 x 180 pixels, "
                                                 r"this frame has 180 x 320: start"):  # fmt: skip
        tracker.run(Frame("turned", (320, 180), never), [Continue(token)])


def test_state_of_another_model_is_refused(
    replica: Callable[[], Tracker], function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of the model its old tracks have to start again."""
    tracker = replica()
    token = run(tracker, 0, BLOB)[0].token
    model = function.context.user_data.service.tracker._model
    monkeypatch.setattr(model, "fingerprint", "other")

    with pytest.raises(StateMismatchError, match=r"^states\[0\]: state belongs to model"):
        tracker.run(UNREAD, [Continue(token)])


def test_request_that_takes_too_long_writes_nothing(
    replica: Callable[[], Tracker], client: redis.Redis
) -> None:
    """It stops before the platform kills the worker; the tokens stay usable."""
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
        (Start(Shape(ShapeType.MASK, [0, 99, 9, 9, 9, 107])), BadRequestError, "mask is too small"),
        (Start(Shape(ShapeType.RECTANGLE, [9, 9, 11, 10])), BadRequestError, "is too small for"),
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
        tracker.run(UNREAD, [Continue(token), BOX, bad])
    assert contents(client) == before


def test_rectangle_that_is_lost_keeps_its_last_box(
    replica: Callable[[], Tracker], function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVAT's own UI cannot take null for a rectangle; a mask is null. Both can be found again."""
    tracker = replica()
    box, mask = run(tracker, 0, BOX, BLOB)
    model = function.context.user_data.service.tracker._model
    with monkeypatch.context() as patch:
        patch.setattr(model, "full_size_mask", lambda *_: blob_mask() & ~blob_mask())
        lost = run(tracker, 1, box.token, mask.token)
    found = run(tracker, 2, lost[0].token, lost[1].token)

    assert [obj.lost for obj in lost] == [True, True]
    assert [obj.shape for obj in lost] == [BOX.shape, None]
    assert [obj.token.track for obj in found] == [box.token.track, mask.token.track]


def test_warm_up_may_take_longer_than_a_request() -> None:
    """A limit below the time of one encoding refuses requests, not the start."""
    tracker = build_tracker(replace(MICRO, request_limit_s=1e-9), memory_store())

    with pytest.raises(TooLargeError, match="1 objects take longer than 0 s"):
        tracker.run(frame(0), [BOX])


# Memory of the device

FOUR = [BLOB, BLOCK, BOX, Start(Shape(ShapeType.RECTANGLE, [20.0, 30.0, 90.0, 120.0]))]


def memory_store() -> MemoryStateStore:
    """Return an embedded store."""
    return MemoryStateStore(state_ttl_s=1000, retry_window_s=100)


def micro_tracker(batch_objects: int) -> tuple[Tracker, ModelHandler]:
    """Return a tracker with the bundled model, and the model."""
    model = load_model(replace(MICRO, batch_objects=batch_objects))
    tracker = Tracker(
        model=model,
        store=memory_store(),
        memory_cache_bytes=1 << 26,
        polygon_tolerance=1.0,
        request_limit_s=100,
    )
    return tracker, model


class SmallDevice:
    """A device whose memory has room for few objects.

    Attributes:
        objects: How many fit.
        batches: Sizes of all batches of steps tried.
        still_held: When memory was freed, how many failed attempts' tensors were still referenced.
    """

    def __init__(self, objects: int) -> None:
        self.objects = objects
        self.batches: list[int] = []
        self.still_held: list[int] = []
        self._allocated: list[weakref.ref[torch.Tensor]] = []

    @contextmanager
    def used_by(self, model: ModelHandler) -> Iterator[None]:
        """Let a model run out of this device's memory."""
        network = model._model
        with pytest.MonkeyPatch.context() as patch:
            track_step = network.track_step

            def limited(**inputs: Any) -> Any:
                count = inputs["current_vision_feats"][-1].shape[1]
                if not inputs["is_init_cond_frame"]:
                    self.batches.append(count)
                self.allocate(count)
                return track_step(**inputs)

            patch.setattr(network, "track_step", limited)
            patch.setattr(torch.cuda, "empty_cache", lambda: self.still_held.append(self.held()))
            yield

    def allocate(self, objects: int) -> None:
        """Raise as CUDA does, with an allocated tensor in the frame of the exception."""
        if objects > self.objects:
            tensor = torch.zeros(8)
            self._allocated.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def held(self) -> int:
        """Return how many failed attempts' tensors are still referenced."""
        return sum(tensor() is not None for tensor in self._allocated)


def test_batch_that_does_not_fit_is_halved_for_good() -> None:
    """The masks are those of the smaller batches; caches and the failed batch are freed first."""
    tracker, model = micro_tracker(batch_objects=4)
    small_tracker, _ = micro_tracker(batch_objects=2)
    device, report = SmallDevice(objects=2), Report()
    started = tracker.run(frame(0), FOUR)
    small = small_tracker.run(frame(0), FOUR)
    with device.used_by(model):
        for index in (1, 2):
            tokens = [Continue(obj.token) for obj in started]
            started = tracker.run(frame(index), tokens, report, keep_masks=True)
            tokens = [Continue(obj.token) for obj in small]
            small = small_tracker.run(frame(index), tokens, keep_masks=True)
            for obj, expected in zip(started, small, strict=True):
                assert obj.mask is not None
                assert expected.mask is not None
                assert np.array_equal(obj.mask, expected.mask)

    assert device.batches == [4, 2, 2, 2, 2]
    assert device.still_held == [0]
    assert report.out_of_memory == 1
    assert model.batch_objects == 2
    assert sum(not obj.lost for obj in started) > 1


def test_caches_are_freed_before_a_smaller_batch_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded frames and frame memories of earlier requests."""
    tracker, model = micro_tracker(batch_objects=4)
    started = tracker.run(frame(0), FOUR)
    cached: list[tuple[int, int]] = []

    def note() -> None:
        cached.append((len(model._features), len(tracker._storage._memories)))

    note()
    with SmallDevice(objects=2).used_by(model):
        monkeypatch.setattr(torch.cuda, "empty_cache", note)
        tracker.run(frame(1), [Continue(obj.token) for obj in started])

    assert cached == [(1, 4), (0, 0)]


@pytest.mark.parametrize("items", [[BLOB], [BOX], []], ids=["mask", "box", "step"])
def test_object_that_does_not_fit_is_refused_and_nothing_is_lost(items: list[Start]) -> None:
    """The message says what helps; the memory of both attempts is free, the token still works."""
    tracker, model = micro_tracker(batch_objects=4)
    (known,) = tracker.run(frame(0), [BLOCK])
    device, report = SmallDevice(objects=0), Report()
    with (
        device.used_by(model),
        pytest.raises(TooLargeError, match=r"^cpu has too little memory for \d objects on this "
                      r"frame: .* SAM2_IMAGE_SIZE, SAM2_FEATURE_CACHE_FRAMES or SAM2_MEMORY_CACHE_"
                      r"MB, .*; nothing is lost$") as refusal,
    ):  # fmt: skip
        tracker.run(frame(1), items or [Continue(known.token)], report)

    assert refusal.value.__context__ is None
    assert device.held() == 0
    assert device.still_held == [0, 0]
    assert report.out_of_memory == 2
    assert tracker.run(frame(1), [Continue(known.token)])


def test_frame_that_does_not_fit_is_tried_again_without_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The encoder has no batch to halve: the request is refused only if that does not help."""
    tracker, model = micro_tracker(batch_objects=4)
    forward_image = model._model.forward_image
    device, failures = SmallDevice(objects=0), 1

    def encode(image: torch.Tensor) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            device.allocate(1)
        return forward_image(image)

    monkeypatch.setattr(model._model, "forward_image", encode)
    assert tracker.run(frame(0), [BOX])
    assert model.batch_objects == 4
    failures = 2

    with pytest.raises(TooLargeError, match="too little memory"):
        tracker.run(frame(1), [BOX])
    assert device.held() == 0


# Times


class Recorder(Report):
    """A report that notes the order of things."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    @contextmanager
    def timed(self, stage: str, device: torch.device | None = None) -> Iterator[None]:
        """See `Report.timed`."""
        with super().timed(stage, device):
            yield
            self._events.append(f"work of {stage}")
        self._events.append(f"end of {stage}")


class OnDevice:
    """A model on the CPU that says it is on another device."""

    def __init__(self, model: ModelHandler, device: str) -> None:
        self._inner = model
        self.device = torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_stages_of_the_model_are_timed_to_the_end_of_their_work(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """On CUDA a call returns when its work is only launched; on a CPU there is nothing to wait."""
    tracker, model = micro_tracker(batch_objects=1)
    tracker._model = OnDevice(model, device)  # type: ignore[assignment]
    events: list[str] = []
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: events.append(f"synchronize {device}")
    )
    (started,) = tracker.run(frame(0), [BOX])
    events.clear()
    tracker.run(frame(1), [Continue(started.token)], Recorder(events))

    wait = [] if device == "cpu" else ["synchronize cuda:1"]
    assert events == [
        event
        for stage in ("shapes", "store", "resize", "encode", "model", "shapes", "store")
        for event in (
            f"work of {stage}",
            *(wait if stage in {"encode", "model"} else []),
            f"end of {stage}",
        )
    ]
