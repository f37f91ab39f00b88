"""Select the objects of a frame that a run follows, from a job's annotations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cvat_task.followed_object import (
    FollowedObject,
    ObjectProgress,
    ObjectSpec,
    ServerObject,
    TrackedPosition,
    without_keyframes,
)
from cvat_task.job import Label
from cvat_task.keyframes import Json, ascending, is_outside, keyframe_at, upright
from cvat_task.shape_matching import count_series
from errors import BadRequestError
from shapes import ShapeType

SHAPE_TYPES = frozenset(ShapeType)


@dataclass(frozen=True)
class ObjectFilter:
    """Which objects were asked for.

    Attributes:
        ids: Server ids, each as `12`, `shape:12` or `track:12`; None means all.
        label_ids: Ids of the labels asked for; None means all.
    """

    ids: frozenset[str] | None = None
    label_ids: frozenset[int] | None = None

    def includes(self, obj: ServerObject) -> bool:
        """Tell whether an object was asked for."""
        return (self.ids is None or bool({str(obj.id), obj.reference} & self.ids)) and (
            self.label_ids is None or obj.content["label_id"] in self.label_ids
        )


def objects_on(
    annotations: Json, frame: int, *, wanted: ObjectFilter
) -> list[tuple[ServerObject, Json]]:
    """Return the objects of a frame that can be followed, each with its keyframe there.

    The keyframe of a shape is the shape itself.
    """
    found = [
        (ServerObject("shapes", shape["id"], shape), shape)
        for shape in annotations["shapes"]
        if shape["frame"] == frame and shape["type"] in SHAPE_TYPES
    ]
    for track in annotations["tracks"]:
        if track["shapes"] and track["shapes"][0]["type"] in SHAPE_TYPES:
            keyframe = keyframe_at(track["shapes"], frame)
            if keyframe is not None:
                found.append((ServerObject("tracks", track["id"], track), keyframe))
    return [(obj, keyframe) for obj, keyframe in found if wanted.includes(obj)]


def first_frame(annotations: Json, frames: Sequence[int], *, wanted: ObjectFilter) -> int | None:
    """Return the first of some frames that has an object asked for, or None."""
    indices = {frame: index for index, frame in enumerate(frames)}
    found = [
        indices[shape["frame"]]
        for shape in annotations["shapes"]
        if shape["frame"] in indices
        and shape["type"] in SHAPE_TYPES
        and wanted.includes(ServerObject("shapes", shape["id"], shape))
    ]
    for track in annotations["tracks"]:
        keyframes = ascending(track["shapes"])
        if (
            keyframes
            and keyframes[0]["type"] in SHAPE_TYPES
            and wanted.includes(ServerObject("tracks", track["id"], track))
        ):
            visible = (frame for frame in frames if not is_outside(keyframes, frame))
            found += [indices[frame] for frame in itertools.islice(visible, 1)]
    return frames[min(found)] if found else None


def select_objects(
    annotations: Json,
    frame: int,
    labels: Mapping[int, Label],
    *,
    wanted: ObjectFilter,
    tracks_allowed: bool,
) -> list[FollowedObject]:
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
    candidates = objects_on(annotations, frame, wanted=wanted)
    shape_ids = {obj.id for obj, _ in candidates if obj.list_name == "shapes"}
    for obj, _ in candidates:
        is_ambiguous = obj.list_name == "tracks" and obj.id in shape_ids
        if is_ambiguous and str(obj.id) in (wanted.ids or ()):
            raise BadRequestError(
                f"{obj.id} is a shape and a track: write shape:{obj.id} or track:{obj.id}"
            )
    return [
        _followed(obj, keyframe, annotations, labels, tracks_allowed=tracks_allowed)
        for obj, keyframe in candidates
    ]


def _followed(
    obj: ServerObject,
    keyframe: Json,
    annotations: Json,
    labels: Mapping[int, Label],
    *,
    tracks_allowed: bool,
) -> FollowedObject:
    """Return an object as it is followed from its keyframe on."""
    content, frame = obj.content, keyframe["frame"]
    label = labels[content["label_id"]]
    if obj.list_name == "tracks":
        template = without_keyframes(content)
        keyframes, initial, earlier = ascending(content["shapes"]), keyframe, 0
    else:
        initial = _shape_as_keyframe(content, label.mutable)
        template, keyframes = content, [initial]
        earlier = count_series(annotations, content, frame)
    seen = TrackedPosition(frame, upright(keyframe), visible=True)
    spec = ObjectSpec(
        name=f"{obj.reference} {label.name}",
        shape_type=initial["type"],
        is_track=obj.list_name == "tracks"
        or (tracks_allowed and initial["type"] != ShapeType.MASK),
        template=template,
        initial_keyframe=initial,
        earlier_shapes_per_frame=earlier,
    )
    progress = ObjectProgress(
        existing=obj,
        keyframes=keyframes,
        done_keyframe=initial,
        last_seen=seen,
        group=content["group"] or 0,
        shared=[seen],
    )
    return FollowedObject(spec, progress)


def _shape_as_keyframe(shape: Json, mutable: frozenset[int]) -> Json:
    copied = ("type", "frame", "points", "occluded", "z_order")
    return {name: shape[name] for name in copied} | {
        "rotation": shape.get("rotation", 0),
        "outside": False,
        "attributes": [
            attribute for attribute in shape["attributes"] if attribute["spec_id"] in mutable
        ],
    }
