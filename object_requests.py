"""What a caller asks for one object on one frame: start a track or continue one."""

from __future__ import annotations

from dataclasses import dataclass

from shapes import Shape
from state_token import StateToken


@dataclass(frozen=True)
class Start:
    """Begin a track at a shape."""

    shape: Shape


@dataclass(frozen=True)
class Continue:
    """Follow a track one frame further."""

    token: StateToken
