"""The shape that tracking of one object in a clip begins with."""

from __future__ import annotations

from dataclasses import dataclass

from shapes import Shape


@dataclass(frozen=True)
class InitialShape:
    """The first shape of an object in a clip.

    Attributes:
        label: Name of the object's class.
        shape: What the annotator drew.
        frame: Number of the frame it was drawn on, from 0.
    """

    label: str
    shape: Shape
    frame: int
