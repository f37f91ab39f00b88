"""Read the initial shapes of a clip's objects from a JSON or *CVAT for video 1.1* XML file."""

from __future__ import annotations

import json
from pathlib import Path

from clips.cvat_xml import read_cvat_xml
from clips.initial_shape import InitialShape
from errors import BadRequestError
from shapes import Shape, ShapeType


def read_initial_shapes(path: Path) -> list[InitialShape]:
    """Read a *CVAT for video 1.1* XML, or a JSON list of label, type, points and frame.

    Raises:
        BadRequestError: The file is neither; the message says where it goes wrong.
    """
    try:
        if path.suffix.lower() == ".xml":
            return read_cvat_xml(path)
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadRequestError(f"{path} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise BadRequestError(f"{path} is not JSON: {err}") from err
    if not isinstance(entries, list) or not entries:
        raise BadRequestError(f"{path} must hold a list of label, type, points and frame")
    initial_shapes = []
    for index, entry in enumerate(entries):
        try:
            shape = Shape(ShapeType(entry["type"]), entry["points"])
            frame = int(entry.get("frame", 0))
            initial_shapes.append(InitialShape(str(entry["label"]), shape, frame))
        except (KeyError, TypeError, ValueError) as err:
            raise BadRequestError(
                f"{path}, entry {index}: {err!r}; expected label, type "
                f"({', '.join(ShapeType)}), points and frame"
            ) from err
    return initial_shapes
