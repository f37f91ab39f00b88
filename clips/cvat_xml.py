"""Read and write *CVAT for video 1.1* XML: initial shapes in, tracks out.

Source of the element and attribute names: CVAT, `cvat/apps/dataset_manager/formats/cvat.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, tostring  # only to write

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from clips.initial_shape import InitialShape
from errors import BadRequestError
from shapes import Shape, ShapeType

_TYPES = {
    "box": ShapeType.RECTANGLE,
    "polygon": ShapeType.POLYGON,
    "ellipse": ShapeType.ELLIPSE,
    "mask": ShapeType.MASK,
}


def read_cvat_xml(path: Path) -> list[InitialShape]:
    """Read the first visible shape of every track.

    Raises:
        BadRequestError: The file is not a *CVAT for video* file.
    """
    initial_shapes = []
    group_starts: dict[str, int] = {}
    try:
        root = defusedxml.ElementTree.fromstring(path.read_bytes())
        for track in root.iter("track"):
            shapes = [shape for shape in track if shape.tag in _TYPES]
            visible = [shape for shape in shapes if shape.get("outside", "0") == "0"]
            if not visible:
                continue
            frame, group = int(visible[0].attrib["frame"]), track.get("group_id", "0")
            is_grouped_mask = visible[0].tag == "mask" and group != "0"
            if is_grouped_mask and group_starts.setdefault(group, frame) < frame:
                continue  # a mask's later frames are tracks of the same group, see `_Track.add`
            shape = Shape(_TYPES[visible[0].tag], _read_points(visible[0]))
            initial_shapes.append(InitialShape(track.attrib["label"], shape, frame))
    except (ParseError, DefusedXmlException, KeyError, ValueError) as err:
        raise BadRequestError(f"{path} is not a CVAT for video 1.1 file: {err!r}") from err
    if not initial_shapes:
        raise BadRequestError(f"{path} has no track with a mask, polygon, box or ellipse")
    return initial_shapes


class CvatXmlWriter:
    """Writes tracks frame by frame; only frame numbers are held in memory.

    Args:
        path: The file to write.
        labels: One per track.
        frame_count: Frames of the clip: a track that ends earlier is closed by a keyframe
            with `outside`.
    """

    def __init__(self, path: Path, labels: Sequence[str], frame_count: int) -> None:
        self._path = path
        self._frame_count = frame_count
        self._tracks = [_Track(index, label) for index, label in enumerate(labels)]

    def add(self, track: int, frame: int, shape: Shape, *, outside: bool = False) -> None:
        """Add a keyframe. A track's frames must come in ascending or in descending order."""
        self._tracks[track].add(frame, shape, outside=outside)

    def close(self) -> None:
        """Write the file."""
        with self._path.open("w", encoding="utf-8") as file:
            file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n')
            file.write("<version>1.1</version>\n")
            for track in self._tracks:
                file.writelines(track.finish(self._frame_count))
            file.write("</annotations>\n")


class _Track:
    """One track's elements, in a temporary file until the end."""

    def __init__(self, index: int, label: str) -> None:
        self._attributes = {"id": str(index), "label": label, "source": "semi-auto"}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by finish
        self._frames: list[int] = []
        self._offsets: list[int] = []  # of the frames' lines in the file
        self._latest: tuple[int, Shape, bool] | None = None  # of the greatest frame

    def add(self, frame: int, shape: Shape, *, outside: bool) -> None:
        if self._latest is None or frame > self._latest[0]:
            self._latest = (frame, shape, outside)
        element = _shape_element(frame, shape, outside=outside)
        if shape.type is ShapeType.MASK:
            # CVAT has no mask tracks: it imports only the first mask of a track. So every frame
            # gets a track element of its own, and they share a group.
            if outside:
                return
            group = str(int(self._attributes["id"]) + 1)
            track = Element("track", self._attributes | {"group_id": group})
            track.append(element)
            element = track
        self._frames.append(frame)
        self._offsets.append(self._file.tell())
        self._file.write(tostring(element) + b"\n")

    def finish(self, frame_count: int) -> Iterator[str]:
        """Yield the track's lines, ascending by frame, and delete the temporary file."""
        if self._latest is None:
            return
        frame, shape, outside = self._latest
        is_mask = shape.type is ShapeType.MASK
        if not is_mask:
            yield tostring(Element("track", self._attributes), encoding="unicode")[:-3] + ">\n"
        for _, offset in sorted(zip(self._frames, self._offsets, strict=True)):
            self._file.seek(offset)
            yield self._file.readline().decode()
        self._file.close()
        if not is_mask:
            if frame + 1 < frame_count and not outside:
                end = _shape_element(frame + 1, shape, outside=True)
                yield tostring(end, encoding="unicode") + "\n"
            yield "</track>\n"


def _shape_element(frame: int, shape: Shape, *, outside: bool) -> Element:
    points = list(shape.points)
    match shape.type:
        case ShapeType.RECTANGLE:
            names = ("xtl", "ytl", "xbr", "ybr")
            geometry = {name: f"{value:.2f}" for name, value in zip(names, points, strict=True)}
            tag = "box"
        case ShapeType.POLYGON:
            pairs = zip(points[0::2], points[1::2], strict=True)
            geometry = {"points": ";".join(f"{x:.2f},{y:.2f}" for x, y in pairs)}
            tag = "polygon"
        case ShapeType.ELLIPSE:
            x, y, right, top = points
            values = {"cx": x, "cy": y, "rx": right - x, "ry": y - top}
            geometry = {name: f"{value:.2f}" for name, value in values.items()}
            tag = "ellipse"
        case ShapeType.MASK:
            *runs, left, top, right, bottom = (int(value) for value in points)
            box = {"left": left, "top": top, "width": right - left + 1, "height": bottom - top + 1}
            geometry = {"rle": ", ".join(map(str, runs))}
            geometry |= {name: str(value) for name, value in box.items()}
            tag = "mask"
    flags = {"frame": str(frame), "keyframe": "1", "outside": str(int(outside)), "occluded": "0"}
    return Element(tag, flags | geometry | {"z_order": "0"})


def _read_points(element: Element) -> list[float]:
    def numbers(*names: str) -> list[float]:
        return [float(element.attrib[name]) for name in names]

    match element.tag:
        case "box":
            return numbers("xtl", "ytl", "xbr", "ybr")
        case "polygon":
            pairs = element.attrib["points"].split(";")
            return [float(value) for pair in pairs for value in pair.split(",")]
        case "ellipse":
            x, y, radius_x, radius_y = numbers("cx", "cy", "rx", "ry")
            return [x, y, x + radius_x, y - radius_y]
        case _:
            runs = [float(run) for run in element.attrib["rle"].split(",")]
            left, top, width, height = numbers("left", "top", "width", "height")
            return [*runs, left, top, left + width - 1, top + height - 1]
