"""Owns what is written to CVAT for a followed object, as the action in CVAT's UI writes it.

`cvat_ui/README.md`, "Use it", has the rules for annotators. Works on CVAT's own JSON and knows
nothing about servers, models or pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cvat_task.followed_objects import SOURCE, Followed, Found, Label, overlap, series
from cvat_task.keyframes import Json, ascending, covering, is_outside, merge_attributes

LISTS = ("shapes", "tracks")  # what of a job's annotations is followed and written


def empty() -> Json:
    """Return annotations with nothing in them."""
    return {"version": 0, "tags": [], "shapes": [], "tracks": []}


def largest_group(annotations: Json) -> int:
    """Return the largest group number in use; 0 when there are no groups."""
    names = ("tags", *LISTS)
    return max((one["group"] or 0 for name in names for one in annotations[name]), default=0)


# ------------------------------------------------------------------ results as tracks


def build_track(
    one: Followed, labels: Mapping[int, Label], *, every: int, next_frame: int | None
) -> Json | None:
    """Return the object's track with what was found since the last one was written.

    Args:
        one: What was found replaces the keyframes from its first to its last frame.
        labels: The job's labels by id.
        every: Keep every so many-th keyframe; where the object is lost or found, and where the
            earlier track changes something else than its place, there are more.
        next_frame: The job's first frame behind all that was tracked; None at its end.

    Returns:
        The track to create, or None while the object has not been seen in this job.
    """
    touched = [found.frame for found in one.found]
    if one.start is not None:
        touched.append(one.start["frame"])
    first, last = min(touched), max(touched)
    kept = [key for key in one.keyframes if not first <= key["frame"] <= last]
    made = [_found_keyframe(one, found) for found in _thin_out(one, every, sorted(touched))]
    keyframes = ascending([*kept, *_start_keyframe(one), *made])
    keyframes = [{**key, "attributes": list(key["attributes"])} for key in keyframes]
    while keyframes and keyframes[0]["outside"]:  # a track begins where the object is seen
        del keyframes[0]
    if not keyframes:
        return None
    _carry_attributes(one.keyframes or [one.place], keyframes)

    end = covering(keyframes, last)
    ended = one.kind == "shapes" or one.standing is None
    if (
        next_frame is not None
        and end is not None
        and not end["outside"]
        and (ended or is_outside(one.keyframes, next_frame))
        and all(key["frame"] != next_frame for key in keyframes)
    ):
        keyframes = ascending(
            [*keyframes, {**end, "frame": next_frame, "outside": True, "attributes": []}]
        )
    mutable = labels[one.like["label_id"]].mutable
    return {
        "frame": keyframes[0]["frame"],
        "label_id": one.like["label_id"],
        "group": one.like["group"] or 0,
        "source": SOURCE,
        "attributes": [
            attribute for attribute in one.like["attributes"] if attribute["spec_id"] not in mutable
        ],
        "elements": [],
        "shapes": [
            {name: value for name, value in key.items() if name != "id"} for key in keyframes
        ],
    }


def _start_keyframe(one: Followed) -> list[Json]:
    """Return the keyframe that tracking began with, if any.

    Between two keyframes it is interpolated and lists no attributes, as in CVAT's UI: a listed
    attribute would no longer follow a later change of an earlier keyframe.
    """
    if one.start is None:
        return []
    frame = one.start["frame"]
    existing = next((key for key in one.keyframes if key["frame"] == frame), None)
    return [existing or one.start | {"attributes": []}]


def _thin_out(one: Followed, every: int, touched: Sequence[int]) -> list[Found]:
    kept = []
    start_seen = one.start is not None and not one.start["outside"]
    changed = {
        next((frame for frame in touched if frame >= change), None)
        for change in _change_frames(one.keyframes)
        if change >= touched[0]
    }
    for index, found in enumerate(one.found):
        before = one.found[index - 1].visible if index else start_seen
        after = one.found[min(index + 1, len(one.found) - 1)].visible
        if (
            (index + 1) % every == 0
            or index == len(one.found) - 1
            or not before == found.visible == after
            or found.frame in changed
        ):
            kept.append(found)
    return kept


def _change_frames(keyframes: Sequence[Json]) -> list[int]:
    """Return the frames where an attribute, `occluded` or `z_order` changes.

    A listed attribute changes if its value differs from the value in force, the last listed before.
    """
    frames = []
    in_force: dict[int, str] = {}
    for index, key in enumerate(keyframes):
        values = {attribute["spec_id"]: attribute["value"] for attribute in key["attributes"]}
        before = keyframes[index - 1]
        if index > 0 and (
            not values.items() <= in_force.items()
            or any(before[name] != key[name] for name in ("occluded", "z_order"))
        ):
            frames.append(key["frame"])
        in_force |= values
    return frames


def _found_keyframe(one: Followed, found: Found) -> Json:
    like = covering(one.keyframes, found.frame) or (one.keyframes or [one.place])[0]
    return {
        "type": one.type,
        "frame": found.frame,
        "points": found.points,
        "rotation": 0,
        "occluded": like.get("occluded", False),
        "outside": not found.visible,
        "z_order": like.get("z_order", 0),
        "attributes": [],
    }


def _carry_attributes(earlier: Sequence[Json], keyframes: Sequence[Json]) -> None:
    """Hand the attributes of keyframes that are gone on to the next one; changes `keyframes`.

    Attributes hold from their keyframe on, and what the object began with from its new beginning.
    """
    for gone in reversed(earlier):
        heir = next((key for key in keyframes if key["frame"] >= gone["frame"]), None)
        if heir is not None:
            heir["attributes"] = merge_attributes(gone["attributes"], heir["attributes"])
    if earlier and keyframes[0]["frame"] < earlier[0]["frame"]:
        keyframes[0]["attributes"] = list(earlier[0]["attributes"])


# ------------------------------------------------------------------ results as one shape per frame


def build_shapes(one: Followed, occupied: Iterable[int]) -> list[Json]:
    """Return a shape for each frame the object was found on, in the object's group.

    Args:
        one: The object; its group is already chosen.
        occupied: Frames to leave alone, because somebody's own shape of the object is there.
    """
    taken = set(occupied)
    made = {"rotation": 0, "source": SOURCE, "group": one.group}
    shapes = [
        copy_of(one.like) | made | {"frame": found.frame, "points": found.points}
        for found in one.found
        if found.visible and found.frame not in taken
    ]
    if shapes and one.standing is not None and not one.like["group"]:
        shapes.insert(0, copy_of(one.like) | {"group": one.group})
    return shapes


def copy_of(one: Json) -> Json:
    """Return a shape or track as CVAT takes it for a new one: without ids and empty fields."""
    return {
        name: [copy_of(key) for key in value] if name in {"shapes", "elements"} else value
        for name, value in one.items()
        if name != "id" and value is not None
    }


def earlier_shapes(
    objects: Sequence[Followed], shapes: Sequence[Json]
) -> tuple[list[Json], dict[int, set[int]]]:
    """Find what earlier runs left on the frames that were tracked now.

    Args:
        objects: Those whose group was there before the run count.
        shapes: The job's shapes, as they stood when the run began.

    Returns:
        Shapes to delete, made by tracking, and for the index of each object the frames to leave
        alone because a person's shape is there.
    """
    members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, one in enumerate(objects):
        if one.alike:
            members[one.group, one.like["label_id"], one.type].append(index)
    there = defaultdict(list)
    for shape in shapes:
        if series(shape) in members:
            there[series(shape), shape["frame"]].append(shape)
    deleted: list[Json] = []
    occupied: dict[int, set[int]] = defaultdict(set)
    for (key, frame), earlier in there.items():
        places = {
            index: found.points
            for index in members[key]
            for found in objects[index].found
            if found.frame == frame
        }
        # More shapes than objects on a frame: some are not an earlier run's of these.
        is_all = objects[members[key][0]].alike == len(places) >= len(earlier)
        for position_, index in _match(earlier, places, is_all=is_all).items():
            if earlier[position_]["source"] == SOURCE:
                deleted.append(earlier[position_])
            else:
                occupied[index].add(frame)
    return deleted, occupied


def _match(
    earlier: Sequence[Json], places: Mapping[int, Sequence[float]], *, is_all: bool
) -> dict[int, int]:
    """Return for shapes, by position, the object each belongs to: that whose new one it overlaps.

    Shapes of alike objects that are not followed now stay, unless `is_all` says there are none.
    """
    pairs = sorted(
        (
            (overlap(shape["type"], shape["points"], points), position_, index)
            for position_, shape in enumerate(earlier)
            for index, points in places.items()
        ),
        key=lambda pair: -pair[0],
    )
    matched: dict[int, int] = {}
    for share, position_, index in pairs:
        if share > 0 and position_ not in matched and index not in matched.values():
            matched[position_] = index
    if is_all:
        free = [index for index in places if index not in matched.values()]
        rest = [position_ for position_ in range(len(earlier)) if position_ not in matched]
        matched |= dict(zip(rest, free, strict=False))
    return matched


# ------------------------------------------------------------------ the same object or not


def same(one: Json, other: Json) -> bool:
    """Tell whether two shapes or tracks say the same, however the server completes them."""
    return _essence(one) == _essence(other)


def _essence(one: Json) -> Json:
    """Return what annotators see: ids dropped, numbers as CVAT's UI rounds them."""
    keyframes = ascending(one["shapes"]) if "shapes" in one else [one]
    values: dict[int, str] = {}
    seen = []
    for key in keyframes:
        if "shapes" in one:
            values |= {attribute["spec_id"]: attribute["value"] for attribute in key["attributes"]}
        seen.append(
            {
                "frame": key["frame"],
                "type": key["type"],
                "points": [round(float(value), 2) for value in key["points"]],
                "rotation": round(float(key.get("rotation") or 0), 2),
                "attributes": dict(values),
            }
            | {name: bool(key.get(name)) for name in ("outside", "occluded")}
            | {"z_order": key.get("z_order", 0)}
        )
    return {
        "label_id": one["label_id"],
        "group": one.get("group") or 0,
        "source": one["source"],
        "attributes": {each["spec_id"]: each["value"] for each in one["attributes"]},
        "keyframes": seen,
    }
