"""What a caller asks for per object and frame: start a track or continue it."""

from __future__ import annotations

from dataclasses import dataclass

from shapes import Shape
from state_token import StateToken


@dataclass(frozen=True)
class Start:
    """Start a track at a shape."""

    shape: Shape


@dataclass(frozen=True)
class Continue:
    """Continue a track on the next frame."""

    token: StateToken
