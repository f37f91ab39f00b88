"""Take followed objects up again: after an interruption, and in the next job of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cvat_task.followed_object import (
    SOURCE,
    FollowedObject,
    ObjectProgress,
    ServerObject,
    without_keyframes,
)
from cvat_task.keyframes import Json, ascending, covering, keyframe_at, upright
from cvat_task.object_selection import ObjectFilter, objects_on
from cvat_task.shape_matching import SAME_OBJECT_IOU, box_iou, count_series, series_of


def resume(obj: FollowedObject, annotations: Json, done_frame: int) -> FollowedObject | None:
    """Return an object as it is on the server now, whether somebody has corrected it or not.

    Args:
        obj: As the journal kept it.
        annotations: The job's, now.
        done_frame: The frame that was written last.

    Returns:
        The object; None when somebody has deleted it.
    """
    spec, progress = obj.spec, obj.progress
    existing = progress.existing
    if existing is not None:
        content = existing.find_in(annotations)
        if content is None:
            return None
        return _resume_track(obj, content, done_frame) if progress.has_track else obj
    if spec.is_track:
        return obj
    series = (progress.group, spec.template["label_id"], spec.shape_type)
    seen = progress.last_seen
    shapes = [
        shape
        for shape in annotations["shapes"]
        if series_of(shape) == series and shape["frame"] == seen.frame
    ]
    if not shapes:
        return obj
    nearest = max(shapes, key=lambda shape: box_iou(spec.shape_type, shape["points"], seen.points))
    last_seen = replace(seen, points=upright(nearest))
    return replace(obj, progress=replace(progress, last_seen=last_seen))


def _resume_track(obj: FollowedObject, track: Json, done_frame: int) -> FollowedObject:
    """Return an object with its track as the server has it now."""
    seen = obj.progress.last_seen
    keyframes = ascending(track["shapes"])
    done_keyframe = next((key for key in keyframes if key["frame"] == done_frame), None)
    last_keyframe = keyframe_at(keyframes, seen.frame)
    progress = replace(
        obj.progress,
        existing=ServerObject("tracks", track["id"], track),
        keyframes=keyframes,
        done_keyframe=done_keyframe or keyframe_at(keyframes, done_frame),
        last_seen=replace(seen, points=upright(last_keyframe)) if last_keyframe else seen,
    )
    return FollowedObject(replace(obj.spec, template=without_keyframes(track)), progress)


def hand_over(
    obj: FollowedObject, annotations: Json, first: int, done_frame: int
) -> FollowedObject | None:
    """Return an object as the next job begins with it.

    Args:
        obj: As the job before ended with it; all that was found is written there.
        annotations: The next job's.
        first: The next job's first frame in tracking order.
        done_frame: The frame that was tracked last, in both jobs when they overlap.

    Returns:
        The object, in the place of what an earlier run has left for it in the next job; None if
        there is another object of its label and type: somebody has drawn it already.
    """
    spec, progress = obj.spec, obj.progress
    low, high = sorted((first, done_frame))
    shared = [position for position in progress.shared if low <= position.frame <= high]
    seen = next((position for position in shared if position.visible), None)
    points, frame = (seen.points, seen.frame) if seen else (progress.last_seen.points, first)
    successor = _same_object(obj, annotations, points, frame)
    if successor is not None:
        is_track = successor.list_name == "tracks"
        if successor.content["source"] != SOURCE or is_track != spec.is_track:
            return None
        if not is_track and not successor.content["group"]:
            return None

    following = ObjectProgress(
        existing=None,
        keyframes=[],
        done_keyframe=None,
        last_seen=progress.last_seen,
        group=progress.group,
        token=progress.token,
    )
    if not spec.is_track:
        earlier = 0
        if successor is not None:
            earlier = count_series(annotations, successor.content, frame)
            following = replace(following, group=successor.content["group"])
        spec = replace(spec, earlier_shapes_per_frame=earlier)
        return FollowedObject(spec, replace(following, unwritten=shared))

    last_keyframe = keyframe_at(progress.keyframes, progress.last_seen.frame)
    spec = replace(
        spec,
        initial_keyframe=last_keyframe or spec.initial_keyframe,
        earlier_shapes_per_frame=0,
    )
    keyframes = _cut_out(progress.keyframes, low, high) if shared else []
    done_keyframe = covering(keyframes, done_frame)
    if successor is not None:
        track = successor.content
        spec = replace(spec, template=without_keyframes(track))
        beyond = [key for key in track["shapes"] if not low <= key["frame"] <= high]
        keyframes = ascending([*beyond, *keyframes])
    following = replace(
        following, existing=successor, keyframes=keyframes, done_keyframe=done_keyframe
    )
    return FollowedObject(spec, following)


def _same_object(
    obj: FollowedObject, annotations: Json, points: Sequence[float], frame: int
) -> ServerObject | None:
    """Return the object of the same label and type that overlaps the points most, and enough."""
    candidates = [
        (box_iou(obj.spec.shape_type, upright(keyframe), points), candidate)
        for candidate, keyframe in objects_on(annotations, frame, wanted=ObjectFilter())
        if keyframe["type"] == obj.spec.shape_type
        and candidate.content["label_id"] == obj.spec.template["label_id"]
    ]
    iou, nearest = max(candidates, key=lambda pair: pair[0], default=(0.0, None))
    return nearest if iou >= SAME_OBJECT_IOU else None


def _cut_out(keyframes: Sequence[Json], low: int, high: int) -> list[Json]:
    """Return a track's keyframes between two frames, with one on either where it is visible."""
    inside = [key for key in ascending(keyframes) if low <= key["frame"] <= high]
    for end in (low, high):
        keyframe = keyframe_at(keyframes, end)
        if keyframe and all(key["frame"] != end for key in inside):
            inside.append(keyframe)
    inside = ascending(inside)
    while inside and inside[0]["outside"]:
        del inside[0]
    if inside:  # attributes that may change hold from before
        inside[0] = keyframe_at(keyframes, inside[0]["frame"]) or inside[0]
    return inside
