"""Find where a CVAT track is on a frame: at a keyframe, or interpolated as CVAT does.

Keyframes are CVAT's own JSON.

Source of the rules: CVAT, `cvat/apps/dataset_manager/annotation.py` (server) and
`cvat-core/src/annotations-objects.ts` (what annotators see); both agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]  # one object of CVAT's JSON
Points = npt.NDArray[np.float64]  # (N, 2), xy in pixels


def ascending(keyframes: Sequence[Json]) -> list[Json]:
    """Return keyframes in the order of their frames."""
    return sorted(keyframes, key=lambda keyframe: int(keyframe["frame"]))


def covering(keyframes: Sequence[Json], frame: int) -> Json | None:
    """Return the last of ascending keyframes up to a frame, or None before the first."""
    return next((keyframe for keyframe in reversed(keyframes) if keyframe["frame"] <= frame), None)


def is_outside(keyframes: Sequence[Json], frame: int) -> bool:
    """Tell whether a track is not in the picture on a frame; its keyframes are ascending."""
    last = covering(keyframes, frame)
    return last is None or bool(last["outside"])


def keyframe_at(keyframes: Sequence[Json], frame: int) -> Json | None:
    """Return a track's keyframe on a frame, interpolated between two; None where it is outside.

    It has all attributes that may change: each holds from its keyframe on.

    Args:
        keyframes: The track's, in any order.
        frame: The frame's number.
    """
    keyframes = ascending(keyframes)
    if is_outside(keyframes, frame):
        return None
    left = covering(keyframes, frame)
    assert left is not None
    attributes: list[Json] = []
    for keyframe in keyframes:
        if keyframe["frame"] <= frame:
            attributes = merge_attributes(attributes, keyframe["attributes"])
    right = next((keyframe for keyframe in keyframes if keyframe["frame"] > frame), None)
    result = {name: value for name, value in left.items() if name != "id"}
    result |= {"frame": frame, "attributes": attributes, "points": list(left["points"])}
    if left["frame"] == frame or right is None:
        return result
    share = (frame - left["frame"]) / (right["frame"] - left["frame"])
    if left["type"] == "polygon":
        result["points"] = _between_polygons(left["points"], right["points"], share)
    else:
        pairs = zip(left["points"], right["points"], strict=True)
        result["points"] = [a + (b - a) * share for a, b in pairs]
        turn = (right.get("rotation", 0) - left.get("rotation", 0) + 180) % 360 - 180
        result["rotation"] = (left.get("rotation", 0) + turn * share) % 360
    return result


def merge_attributes(earlier: Sequence[Json], later: Sequence[Json]) -> list[Json]:
    """Return the attributes of both lists, each once, with the value of the later list."""
    values = {attribute["spec_id"]: attribute["value"] for attribute in [*earlier, *later]}
    return [{"spec_id": spec_id, "value": value} for spec_id, value in values.items()]


def upright(keyframe: Json) -> list[float]:
    """Return the points of a keyframe without rotation; of a turned shape its upright extent."""
    points = list(keyframe["points"])
    angle = math.radians(keyframe.get("rotation") or 0)
    if not angle or keyframe["type"] not in {"rectangle", "ellipse"}:
        return points
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    if keyframe["type"] == "ellipse":
        x, y, right, top = points
        radius_x, radius_y = right - x, y - top
        width = math.hypot(radius_x * cos, radius_y * sin)
        return [x, y, x + width, y - math.hypot(radius_x * sin, radius_y * cos)]
    x1, y1, x2, y2 = points
    x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2
    half_width, half_height = width * cos + height * sin, width * sin + height * cos
    return [x - half_width, y - half_height, x + half_width, y + half_height]


def _between_polygons(left: Sequence[float], right: Sequence[float], share: float) -> list[float]:
    """Interpolate polygons: vertices pair up by their share of the way around.

    Args:
        left: Flat xy points on the keyframe before.
        right: Flat xy points on the keyframe after.
        share: 0 at the keyframe before, 1 at the one after.
    """
    a, b = _closed(left), _closed(right)
    along_a, along_b = _along(a), _along(b)
    pairs = [[_nearest(value, along_b)] for value in along_a]
    unmatched = set(range(len(b))) - {partners[0] for partners in pairs}
    for vertex in sorted(unmatched):
        pairs[_nearest(along_b[vertex], along_a)].append(vertex)
    pairs = [sorted(partners) for partners in pairs]
    first = np.cumsum([0, *(len(partners) for partners in pairs)])
    points = np.concatenate(
        [a[vertex] + (b[partners] - a[vertex]) * share for vertex, partners in enumerate(pairs)]
    )

    # Where several vertices of a ring have the same partner, points that lie close are left out.
    ring: list[Points] = []
    run: int | None = None  # first of successive vertices with the same single partner
    for vertex, partners in enumerate(pairs):
        if run is not None and partners != pairs[run]:
            ring += _thinned(points[first[run] : first[vertex]], a[run:vertex])
            run = None
        if len(partners) > 1:
            ring += _thinned(
                points[first[vertex] : first[vertex + 1]], b[partners[0] : partners[-1] + 1]
            )
        elif run is None:
            run = vertex
    if run is not None:
        ring += _thinned(points[first[run] :], a[run:])
    return np.array(ring[:-1]).ravel().tolist()  # without the vertex that closes the ring


def _thinned(points: Points, curve: Points) -> list[Points]:
    """Return both ends and the points between that lie far enough apart.

    The shortest distance is half the mean step of the curve that the points come from.
    """
    if len(points) == 1:
        return [points[0]]
    shortest = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum() / (2 * len(curve))
    thinned = [points[0]]
    for point in points[1:-1]:
        if np.linalg.norm(point - thinned[-1]) >= shortest:
            thinned.append(point)
    thinned.append(points[-1])
    if len(thinned) == 2 and np.linalg.norm(thinned[1] - thinned[0]) < shortest:
        return [(thinned[0] + thinned[1]) / 2]
    return thinned


def _closed(points: Sequence[float]) -> Points:
    ring = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return np.concatenate([ring, ring[:1]])


def _along(ring: Points) -> Points:
    """Return for each vertex its share of the way around, from 0 to 1."""
    lengths = np.cumsum([0.0, *np.linalg.norm(np.diff(ring, axis=0), axis=1)])
    return np.asarray(lengths / (lengths[-1] or 1.0))


def _nearest(value: float, others: Points) -> int:
    return int(np.abs(others - value).argmin())
