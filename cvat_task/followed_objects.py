"""Owns the objects that a run follows: which ones, from where, and how the next job gets them.

Works on CVAT's own JSON and knows nothing about servers, models or pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cvat_task.keyframes import Json, ascending, covering, is_outside, position, upright
from errors import BadRequestError
from shapes import ShapeType

SOURCE = "semi-auto"
SAME_OBJECT_IOU = 0.5  # of boxes; CVAT unites tracks of overlapping jobs from as much on


@dataclass
class Found:
    """Where an object is on one frame.

    Attributes:
        frame: The frame's number.
        points: CVAT's flat list; where the object is not visible, the last known ones.
        visible: Whether it was found.
    """

    frame: int
    points: list[float]
    visible: bool


@dataclass
class Followed:
    """One object on its way through a job. All of it is JSON: a journal can keep it.

    Attributes:
        name: For people.
        type: The shape type it is drawn with.
        as_track: Whether a track is written for it, else one shape per frame.
        like: The shape or track it began as, or the track that was written last.
        kind: Which list of the annotations `standing` is in.
        standing: Id of what stands for it on the server; None when nothing does, or one shape per
            frame that stays.
        keyframes: Of `like`, ascending; a shape has one.
        place: A keyframe with what it had beside its place when it was chosen or handed over.
        start: Its keyframe on the frame that was tracked last; None before it is seen in this job.
        last_seen: Where it was found last.
        group: The group its shapes share; 0 is none.
        alike: Shapes of its group, label and type on the first frame when that group was there
            before the run; 0 when there is nothing of an earlier run to replace.
        found: What is not written yet, in tracking order.
        recent: What was found on frames that the next job has too.
        lost: On how many frames it was not found.
    """

    name: str
    type: str
    as_track: bool
    like: Json
    kind: Literal["shapes", "tracks"]
    standing: int | None
    keyframes: list[Json]
    place: Json
    start: Json | None
    last_seen: Found
    group: int = 0
    alike: int = 0
    found: list[Found] = field(default_factory=list)
    recent: list[Found] = field(default_factory=list)
    lost: int = 0

    def note(self, frame: int, points: Sequence[float] | None) -> None:
        """Keep where it is on the next frame; None: not in the picture."""
        found = Found(frame, list(points or self.last_seen.points), points is not None)
        self.found.append(found)
        if found.visible:
            self.last_seen = found
        else:
            self.lost += 1

    @classmethod
    def from_json(cls, kept: Json) -> Followed:
        """Read what `dataclasses.asdict` made of one."""
        lists = {name: [Found(**one) for one in kept[name]] for name in ("found", "recent")}
        return cls(**{**kept, **lists, "last_seen": Found(**kept["last_seen"])})


@dataclass(frozen=True)
class Label:
    """A label of the job.

    Attributes:
        name: As annotators see it.
        mutable: Ids of its attributes that may change from frame to frame.
    """

    name: str
    mutable: frozenset[int]


def objects_on(annotations: Json, frame: int, *, wanted: Wanted) -> list[tuple[str, Json, Json]]:
    """Return the objects of a frame that can be followed: list name, object, its place there."""
    found = [
        ("shapes", shape, shape)
        for shape in annotations["shapes"]
        if shape["frame"] == frame and shape["type"] in set(ShapeType)
    ]
    for track in annotations["tracks"]:
        if track["shapes"] and track["shapes"][0]["type"] in set(ShapeType):
            place = position(track, frame)
            if place is not None:
                found.append(("tracks", track, place))
    return [(kind, one, place) for kind, one, place in found if wanted.has(kind, one)]


def first_frame(annotations: Json, frames: Sequence[int], *, wanted: Wanted) -> int | None:
    """Return the first of some frames that has an object asked for, or None."""
    places = {frame: place for place, frame in enumerate(frames)}
    found = [
        places[shape["frame"]]
        for shape in annotations["shapes"]
        if shape["frame"] in places
        and shape["type"] in set(ShapeType)
        and wanted.has("shapes", shape)
    ]
    for track in annotations["tracks"]:
        keyframes = ascending(track["shapes"])
        if keyframes and keyframes[0]["type"] in set(ShapeType) and wanted.has("tracks", track):
            there = (frame for frame in frames if not is_outside(keyframes, frame))
            found += [places[frame] for frame in itertools.islice(there, 1)]
    return frames[min(found)] if found else None


@dataclass(frozen=True)
class Wanted:
    """Which objects were asked for.

    Attributes:
        ids: Server ids, each as `12`, `shape:12` or `track:12`; None means all.
        label_ids: Ids of the labels asked for; None means all.
    """

    ids: frozenset[str] | None = None
    label_ids: frozenset[int] | None = None

    def has(self, kind: str, one: Json) -> bool:
        """Tell whether an object of the list `kind` is one of them."""
        names = {str(one["id"]), f"{kind[:-1]}:{one['id']}"}
        return (self.ids is None or bool(names & self.ids)) and (
            self.label_ids is None or one["label_id"] in self.label_ids
        )


def choose(
    annotations: Json,
    frame: int,
    labels: Mapping[int, Label],
    *,
    wanted: Wanted,
    tracks_allowed: bool,
) -> list[Followed]:
    """Return the objects of a frame, ready to be followed from there.

    Args:
        annotations: The job's.
        frame: Where to start.
        labels: The job's labels by id.
        wanted: Which objects were asked for.
        tracks_allowed: Whether the task takes tracks; those with honeypots do not.

    Raises:
        BadRequestError: An id names two objects.
    """
    objects = []
    there = objects_on(annotations, frame, wanted=wanted)
    for kind, one, place in there:
        if any(one["id"] == other["id"] and kind < name for name, other, _ in there):
            number = one["id"]
            if str(number) in (wanted.ids or ()):
                raise BadRequestError(
                    f"{number} is a shape and a track: write shape:{number} or track:{number}"
                )
        mutable = labels[one["label_id"]].mutable
        is_track = kind == "tracks"
        keyframes = ascending(one["shapes"]) if is_track else [_as_keyframe(one, mutable)]
        begin = place if is_track else keyframes[0]
        objects.append(
            Followed(
                name=f"{kind[:-1]}:{one['id']} {labels[one['label_id']].name}",
                type=begin["type"],
                as_track=is_track or (tracks_allowed and begin["type"] != ShapeType.MASK),
                like=one,
                kind="tracks" if is_track else "shapes",
                standing=one["id"],
                keyframes=keyframes,
                place=begin,
                start=begin,
                last_seen=(seen := Found(frame, upright(place), visible=True)),
                group=one["group"] or 0,
                recent=[seen],
                alike=0 if is_track else _count_alike(annotations, one, frame),
            )
        )
    return objects


def resume(one: Followed, annotations: Json, anchor: int) -> bool:
    """Take an object up again from what stands for it on the server, corrected or not.

    Args:
        one: As the journal kept it; changed.
        annotations: The job's, now.
        anchor: The frame that was written last.

    Returns:
        False when somebody has deleted it.
    """
    seen = one.last_seen
    if one.standing is not None:
        standing = next(
            (each for each in annotations[one.kind] if each["id"] == one.standing), None
        )
        if standing is None:
            return False
        if one.kind == "tracks":
            one.like, one.keyframes = standing, ascending(standing["shapes"])
            one.start = next((key for key in one.keyframes if key["frame"] == anchor), None)
            one.start = one.start or position(standing, anchor)
            place = position(standing, seen.frame)
            seen.points = seen.points if place is None else upright(place)
    elif not one.as_track:
        alike = [
            shape
            for shape in annotations["shapes"]
            if series(shape) == (one.group, one.like["label_id"], one.type)
            and shape["frame"] == seen.frame
        ]
        if alike:
            best = max(alike, key=lambda shape: overlap(one.type, shape["points"], seen.points))
            seen.points = upright(best)
    return True


def hand_over(one: Followed, annotations: Json, first: int, anchor: int) -> Followed | None:
    """Return an object as the next job begins with it.

    Args:
        one: As the job before ended with it; all that was found is written there.
        annotations: The next job's.
        first: The next job's first frame in tracking order.
        anchor: The frame that was tracked last, in both jobs when they overlap.

    Returns:
        The object, in the place of what an earlier run left for it in the next job; None when
        something else of its label and type stands there: somebody has drawn it already.
    """
    low, high = sorted((first, anchor))
    recent = [found for found in one.recent if low <= found.frame <= high]
    met = next((found for found in recent if found.visible), None)
    points, frame = (met.points, met.frame) if met else (one.last_seen.points, first)
    nearest = max(
        (
            (overlap(one.type, upright(place), points), kind, each)
            for kind, each, place in objects_on(annotations, frame, wanted=Wanted())
            if place["type"] == one.type and each["label_id"] == one.like["label_id"]
        ),
        key=lambda pair: pair[0],
        default=(0.0, "", {}),
    )
    heir = nearest[2] if nearest[0] >= SAME_OBJECT_IOU else None
    is_track = nearest[1] == "tracks"
    if heir and (heir["source"] != SOURCE or is_track != one.as_track):
        return None
    if heir and not is_track and not heir["group"]:
        return None

    last_place = position(one.like, one.last_seen.frame) if one.kind == "tracks" else None
    following = replace(
        one,
        keyframes=[],
        place=last_place or one.place,
        start=None,
        standing=None,
        alike=0,
        found=[],
        recent=[],
        lost=0,
    )
    following.kind = "tracks" if one.as_track else "shapes"
    if not one.as_track:
        following.found = recent
        if heir:
            following.group = heir["group"]
            following.alike = _count_alike(annotations, heir, frame)
        return following
    if recent:
        begun = one.like if one.kind == "tracks" else {"shapes": [one.place]}
        following.keyframes = _between(begun, low, high)
        following.start = covering(following.keyframes, anchor)
    if heir:
        beyond = [key for key in heir["shapes"] if not low <= key["frame"] <= high]
        following.keyframes = ascending([*beyond, *following.keyframes])
        following.like, following.standing = heir, heir["id"]
    return following


def _between(track: Json, low: int, high: int) -> list[Json]:
    """Return a track's keyframes from one frame to another, both among them where it is there."""
    inside = [key for key in ascending(track["shapes"]) if low <= key["frame"] <= high]
    for end in (low, high):
        place = position(track, end)
        if place and all(key["frame"] != end for key in inside):
            inside.append(place)
    keyframes = ascending(inside)
    while keyframes and keyframes[0]["outside"]:
        del keyframes[0]
    if keyframes:  # what may change holds from before
        keyframes[0] = position(track, keyframes[0]["frame"]) or keyframes[0]
    return keyframes


def _as_keyframe(shape: Json, mutable: frozenset[int]) -> Json:
    kept = ("type", "frame", "points", "occluded", "z_order")
    return {name: shape[name] for name in kept} | {
        "rotation": shape.get("rotation", 0),
        "outside": False,
        "attributes": [one for one in shape["attributes"] if one["spec_id"] in mutable],
    }


def _count_alike(annotations: Json, shape: Json, frame: int) -> int:
    if not shape["group"]:
        return 0
    return sum(
        series(each) == series(shape) and each["frame"] == frame for each in annotations["shapes"]
    )


def series(shape: Json) -> tuple[Any, ...]:
    """Return what the shapes of one object share: group, label and type."""
    return shape.get("group") or 0, shape["label_id"], shape.get("type")


def overlap(shape_type: str, points: Sequence[float], others: Sequence[float]) -> float:
    """Return the intersection over union of two shapes' boxes."""
    a, b = _box(shape_type, points), _box(shape_type, others)
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def _box(shape_type: str, points: Sequence[float]) -> tuple[float, float, float, float]:
    if shape_type == ShapeType.MASK:
        x1, y1, x2, y2 = points[-4:]
        return x1, y1, x2 + 1, y2 + 1
    if shape_type == ShapeType.ELLIPSE:
        x, y, right, top = points
        return 2 * x - right, top, right, 2 * y - top
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)
