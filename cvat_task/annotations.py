"""Build the tracks and shapes that are written to CVAT, as the action in CVAT's UI builds them.

`cvat_ui/README.md`, "Use it", has the rules for annotators. Input and output are CVAT's own JSON.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cvat_task.followed_object import SOURCE, FollowedObject, ObjectProgress, TrackedPosition
from cvat_task.job import Label
from cvat_task.keyframes import Json, ascending, covering, is_outside, merge_attributes
from cvat_task.shape_matching import box_iou, series_of

LISTS = ("shapes", "tracks")  # the lists of a job's annotations that are followed and written


def empty() -> Json:
    """Return annotations with nothing in them."""
    return {"version": 0, "tags": [], "shapes": [], "tracks": []}


def largest_group(annotations: Json) -> int:
    """Return the largest group number in use; 0 when there are no groups."""
    names = ("tags", *LISTS)
    return max((obj["group"] or 0 for name in names for obj in annotations[name]), default=0)


# ------------------------------------------------------------------ results as tracks


def build_track(
    obj: FollowedObject,
    labels: Mapping[int, Label],
    *,
    keyframe_interval: int,
    next_frame: int | None,
) -> Json | None:
    """Return the object's track with what was found since it was written last.

    Args:
        obj: What was found replaces the keyframes from its first to its last frame.
        labels: The job's labels by id.
        keyframe_interval: Every how many frames a keyframe is written. There are more where the
            object is lost or found again, and where a keyframe of the earlier track changes
            something else than the position.
        next_frame: The job's first frame behind all that was tracked; None at its end.

    Returns:
        The track to create, or None while the object has not been seen in this job.
    """
    spec, progress = obj.spec, obj.progress
    start = progress.done_keyframe
    touched = [position.frame for position in progress.unwritten]
    if start is not None:
        touched.append(start["frame"])
    first, last = min(touched), max(touched)
    remaining = [key for key in progress.keyframes if not first <= key["frame"] <= last]
    thinned = _thin_out(obj, keyframe_interval, sorted(touched))
    made = [_as_keyframe(obj, position) for position in thinned]
    keyframes = ascending([*remaining, *_start_keyframe(progress), *made])
    keyframes = [{**key, "attributes": list(key["attributes"])} for key in keyframes]
    while keyframes and keyframes[0]["outside"]:  # a track begins where the object is seen
        del keyframes[0]
    if not keyframes:
        return None
    _carry_attributes(progress.keyframes or [spec.initial_keyframe], keyframes)

    end = covering(keyframes, last)
    if (
        next_frame is not None
        and end is not None
        and not end["outside"]
        and (not progress.has_track or is_outside(progress.keyframes, next_frame))
        and all(key["frame"] != next_frame for key in keyframes)
    ):
        keyframes = ascending(
            [*keyframes, {**end, "frame": next_frame, "outside": True, "attributes": []}]
        )
    mutable = labels[spec.template["label_id"]].mutable
    return {
        "frame": keyframes[0]["frame"],
        "label_id": spec.template["label_id"],
        "group": spec.template["group"] or 0,
        "source": SOURCE,
        "attributes": [
            attribute
            for attribute in spec.template["attributes"]
            if attribute["spec_id"] not in mutable
        ],
        "elements": [],
        "shapes": [
            {name: value for name, value in key.items() if name != "id"} for key in keyframes
        ],
    }


def _start_keyframe(progress: ObjectProgress) -> list[Json]:
    """Return the keyframe that tracking began with, if any.

    Between two keyframes it is interpolated and lists no attributes, as in CVAT's UI: a listed
    attribute would no longer follow a later change of an earlier keyframe.
    """
    start = progress.done_keyframe
    if start is None:
        return []
    existing = next((key for key in progress.keyframes if key["frame"] == start["frame"]), None)
    return [existing or start | {"attributes": []}]


def _thin_out(
    obj: FollowedObject, keyframe_interval: int, touched: Sequence[int]
) -> list[TrackedPosition]:
    """Return those of the unwritten positions that become keyframes.

    Args:
        obj: The object.
        keyframe_interval: See `build_track`.
        touched: Frames of the unwritten positions and of the keyframe before them, ascending. A
            change on a frame between them, which was skipped, counts on the next one.
    """
    start, positions = obj.progress.done_keyframe, obj.progress.unwritten
    changed = {
        next((frame for frame in touched if frame >= change), None)
        for change in _change_frames(obj.progress.keyframes)
        if change >= touched[0]
    }
    thinned = []
    for index, position in enumerate(positions):
        if index > 0:
            was_visible = positions[index - 1].visible
        else:
            was_visible = start is not None and not start["outside"]
        will_be_visible = positions[min(index + 1, len(positions) - 1)].visible
        if (
            (index + 1) % keyframe_interval == 0
            or index == len(positions) - 1
            or not was_visible == position.visible == will_be_visible
            or position.frame in changed
        ):
            thinned.append(position)
    return thinned


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


def _as_keyframe(obj: FollowedObject, position: TrackedPosition) -> Json:
    """Return a found position as a keyframe, with the flags that hold on its frame."""
    keyframes = obj.progress.keyframes or [obj.spec.initial_keyframe]
    flags = covering(keyframes, position.frame) or keyframes[0]
    return {
        "type": obj.spec.shape_type,
        "frame": position.frame,
        "points": position.points,
        "rotation": 0,
        "occluded": flags.get("occluded", False),
        "outside": not position.visible,
        "z_order": flags.get("z_order", 0),
        "attributes": [],
    }


def _carry_attributes(earlier: Sequence[Json], keyframes: Sequence[Json]) -> None:
    """Move the attributes of replaced keyframes to the next keyframe; changes `keyframes`.

    Attributes hold from their keyframe on, and those of the first keyframe from a new beginning.
    """
    for replaced in reversed(earlier):
        successor = next((key for key in keyframes if key["frame"] >= replaced["frame"]), None)
        if successor is not None:
            successor["attributes"] = merge_attributes(
                replaced["attributes"], successor["attributes"]
            )
    if earlier and keyframes[0]["frame"] < earlier[0]["frame"]:
        keyframes[0]["attributes"] = list(earlier[0]["attributes"])


# ------------------------------------------------------------------ results as one shape per frame


def build_shapes(obj: FollowedObject, occupied: Iterable[int]) -> list[Json]:
    """Return a shape for each frame the object was found on, in the object's group.

    Args:
        obj: The object; its group is already chosen.
        occupied: Frames to skip, because somebody's own shape of the object is there.
    """
    template, progress = obj.spec.template, obj.progress
    skipped = set(occupied)
    made = {"rotation": 0, "source": SOURCE, "group": progress.group}
    shapes = [
        without_ids(template) | made | {"frame": position.frame, "points": position.points}
        for position in progress.unwritten
        if position.visible and position.frame not in skipped
    ]
    if shapes and progress.existing is not None and not template["group"]:
        shapes.insert(0, without_ids(template) | {"group": progress.group})
    return shapes


def without_ids(obj: Json) -> Json:
    """Return a shape or track as CVAT takes it for a new one: without ids and empty fields."""
    return {
        name: [without_ids(part) for part in value] if name in {"shapes", "elements"} else value
        for name, value in obj.items()
        if name != "id" and value is not None
    }


def earlier_shapes(
    objects: Sequence[FollowedObject], shapes: Sequence[Json]
) -> tuple[list[Json], dict[int, set[int]]]:
    """Find what earlier runs left on the frames that were tracked now.

    Args:
        objects: Only those are regarded whose group existed before the run.
        shapes: The job's shapes, as they were when the run began.

    Returns:
        Shapes to delete, made by tracking; and by the index of each object the frames to skip
        because a person's shape is there.
    """
    members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, obj in enumerate(objects):
        if obj.spec.earlier_shapes_per_frame:
            series = obj.progress.group, obj.spec.template["label_id"], obj.spec.shape_type
            members[series].append(index)
    by_series_and_frame = defaultdict(list)
    for shape in shapes:
        if series_of(shape) in members:
            by_series_and_frame[series_of(shape), shape["frame"]].append(shape)
    deleted: list[Json] = []
    occupied: dict[int, set[int]] = defaultdict(set)
    for (series, frame), earlier in by_series_and_frame.items():
        found = {
            index: position.points
            for index in members[series]
            for position in objects[index].progress.unwritten
            if position.frame == frame
        }
        # More shapes than objects on a frame: some of them belong to other objects.
        per_frame = objects[members[series][0]].spec.earlier_shapes_per_frame
        is_complete = per_frame == len(found) >= len(earlier)
        for number, index in _match(earlier, found, is_complete=is_complete).items():
            if earlier[number]["source"] == SOURCE:
                deleted.append(earlier[number])
            else:
                occupied[index].add(frame)
    return deleted, occupied


def _match(
    earlier: Sequence[Json], found: Mapping[int, Sequence[float]], *, is_complete: bool
) -> dict[int, int]:
    """Match shapes to the objects whose new positions they overlap.

    Args:
        earlier: Shapes of one series on a frame.
        found: Points where the objects of that series were found, by index of the object.
        is_complete: Whether the shapes can belong to no other objects. Those that overlap nothing
            are then matched too.

    Returns:
        Indices of objects, by index of the shape.
    """
    pairs = sorted(
        (
            (box_iou(shape["type"], shape["points"], points), number, index)
            for number, shape in enumerate(earlier)
            for index, points in found.items()
        ),
        key=lambda pair: -pair[0],
    )
    matched: dict[int, int] = {}
    for iou, number, index in pairs:
        if iou > 0 and number not in matched and index not in matched.values():
            matched[number] = index
    if is_complete:
        free = [index for index in found if index not in matched.values()]
        rest = [number for number in range(len(earlier)) if number not in matched]
        matched |= dict(zip(rest, free, strict=False))
    return matched


# ------------------------------------------------------------------ comparison


def same(obj: Json, other: Json) -> bool:
    """Tell whether two shapes or tracks look the same, however the server completes them."""
    return _essence(obj) == _essence(other)


def _essence(obj: Json) -> Json:
    """Return what annotators see: without ids, numbers rounded as CVAT's UI does."""
    is_track = "shapes" in obj
    values: dict[int, str] = {}
    keyframes = []
    for key in ascending(obj["shapes"]) if is_track else [obj]:
        if is_track:
            values |= {attribute["spec_id"]: attribute["value"] for attribute in key["attributes"]}
        keyframes.append(
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
        "label_id": obj["label_id"],
        "group": obj.get("group") or 0,
        "source": obj["source"],
        "attributes": {attribute["spec_id"]: attribute["value"] for attribute in obj["attributes"]},
        "keyframes": keyframes,
    }
