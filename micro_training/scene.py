"""Draw random scenes: bodies with outline, texture and motion, and events that hide them."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from micro_training.motion import (
    Crossing,
    Eclipse,
    Floats,
    Path,
    Wander,
    Wave,
    draw_wander,
    draw_wave,
)
from micro_training.textures import Image, draw_background, draw_palette, draw_texture

FRAME_WH = np.array([640.0, 360.0])
TEXTURE_SIZE = 128
# Part of the frame's size by which the background extends beyond it, for the camera's motion.
BACKGROUND_MARGIN = 0.3
_OUTLINE_POINTS = 64
_GRAIN_SIZE = 160

Role = Literal["object", "occluder", "lookalike"]
Event = Literal["none", "eclipse", "pillar"]


@dataclass(frozen=True, eq=False)
class Body:
    """A textured shape that moves, turns, grows and deforms.

    `outline` is `(P, 2)`, xy around the centre in units of `radius`; `ripples` is `(K, 4)`: order,
    amplitude, rate and phase of each radial deformation; `texture` is RGB.
    """

    role: Role
    outline: Floats
    ripples: Floats
    radius: float
    path: Path
    turn: Wave
    grow: Wave
    texture: Image

    @property
    def reach(self) -> float:
        """An upper bound of the body's radius, in reference pixels."""
        widest = float(np.linalg.norm(self.outline, axis=1).max())
        return self.radius * widest * (1 + float(self.ripples[:, 1].sum())) * self.grow.highest


@dataclass(frozen=True, eq=False)
class Camera:
    """The camera's pan (reference pixels), zoom and roll (radians) over time, and its noise.

    `gain` is brightness over time, `blur_sigma` is in pixels, `grain` is a tile of sensor noise,
    `(G, G, 3)` int16 grey levels.
    """

    pan: Wander
    zoom: Wave
    roll: Wave
    gain: Wave
    blur_sigma: float
    grain: npt.NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Scene:
    """The contents of a clip: `bodies` from back to front; `target` is the body the event hides."""

    background: Image
    bodies: tuple[Body, ...]
    camera: Camera
    target: int


def draw_scene(
    rng: np.random.Generator,
    *,
    objects: int,
    event: Event,
    lookalike: bool,
    moment: float,
    hidden: float,
) -> Scene:
    """Draw a scene.

    Args:
        rng: Source of randomness.
        objects: Number of objects; the event hides the first.
        event: What hides it: nothing, a body that moves over it, or a pillar that it passes behind.
        lookalike: Whether to add a distractor with the first object's texture.
        moment: Time of the middle of the event, in frames.
        hidden: Approximate time that the object is hidden, in frames.
    """
    palette = draw_palette(rng)
    size_hw = (int(FRAME_WH[1]), int(FRAME_WH[0] * 0.8))
    background = draw_background(rng, size_hw, palette)
    bodies = [_draw_body(rng, palette, radius=rng.uniform(36, 84)) for _ in range(objects)]
    occluders: list[Body] = []
    if event != "none":
        bodies[0], occluder = _hide(rng, palette, bodies[0], event, moment, hidden)
        occluders = [occluder]
    lookalikes = [_draw_lookalike(rng, bodies[0])] if lookalike else []
    # The occluder is in front; other bodies may be in front of the hidden object or behind it.
    others = bodies[1:] + lookalikes
    order = rng.permutation(len(others))
    behind = int(rng.integers(len(others) + 1))
    stack = [others[i] for i in order]
    layers = (*stack[:behind], bodies[0], *stack[behind:], *occluders)
    still = rng.random() < 0.3
    camera = Camera(
        pan=_draw_pan(rng, 0.0 if still else rng.uniform(5, 60)),
        zoom=draw_wave(rng, 1.0, 0.0 if still else rng.uniform(0, 0.15), 0.1),
        roll=draw_wave(rng, 0.0, 0.0 if still else rng.uniform(0, 0.12), 0.1),
        gain=draw_wave(rng, 1.0, rng.uniform(0, 0.12), 0.3),
        blur_sigma=max(0.0, rng.uniform(-1.0, 1.4)),
        grain=np.round(
            rng.standard_normal((_GRAIN_SIZE, _GRAIN_SIZE, 3)) * max(0.0, rng.uniform(-4, 12))
        ).astype(np.int16),
    )
    return Scene(background, layers, camera, target=behind)


def _draw_body(rng: np.random.Generator, background: Floats, radius: float) -> Body:
    texture = draw_texture(
        rng, (TEXTURE_SIZE, TEXTURE_SIZE), draw_palette(rng, avoid=background.mean(axis=0))
    )
    return Body(
        role="object",
        outline=_draw_outline(rng),
        ripples=_draw_ripples(rng, swing=rng.uniform(0, 0.22)),
        radius=radius,
        path=draw_wander(rng, FRAME_WH, max_speed=rng.uniform(2, 11)),
        turn=draw_wave(rng, rng.uniform(-3, 3), rng.uniform(0, 1.5), 0.15),
        grow=draw_wave(rng, 1.0, rng.uniform(0, 0.25), 0.12),
        texture=texture,
    )


def _draw_outline(rng: np.random.Generator) -> Floats:
    """Draw a blob, a polygon, a star or an ellipse of mean radius about 1."""
    theta = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    match rng.integers(4):
        case 0:
            orders = np.arange(2, 6)
            sizes = rng.uniform(0, 0.3, 4) / (orders - 1)
            phases = rng.uniform(0, 2 * np.pi, 4)
            radii = 1 + (sizes * np.cos(np.outer(theta, orders) + phases)).sum(axis=1)
        case 1:
            corners = int(rng.integers(3, 8))
            jitter = rng.uniform(-0.3, 0.3, corners)
            angles = 2 * np.pi * (np.arange(corners) + jitter) / corners
            ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            ring *= rng.uniform(0.8, 1.2, (corners, 1))
            along = np.linspace(0, corners, _OUTLINE_POINTS, endpoint=False)
            start = along.astype(int)
            share = (along - start)[:, None]
            sides: Floats = (1 - share) * ring[start] + share * ring[(start + 1) % corners]
            return sides * 1.1
        case 2:
            points = int(rng.integers(4, 8))
            radii = 1 + rng.uniform(0.15, 0.35) * np.sign(np.cos(points * theta))
            radii = np.convolve(np.tile(radii, 3), np.ones(3) / 3, "same")[
                _OUTLINE_POINTS : 2 * _OUTLINE_POINTS
            ]
        case _:
            radii = np.ones_like(theta)
    stretch = rng.uniform(0.6, 1.0)
    circle = np.stack([np.cos(theta) / np.sqrt(stretch), np.sin(theta) * np.sqrt(stretch)], axis=1)
    outline: Floats = radii[:, None] * circle
    return outline


def _draw_ripples(rng: np.random.Generator, swing: float) -> Floats:
    orders = rng.integers(2, 5, 2)
    amplitudes = rng.dirichlet(np.ones(2)) * swing
    rates = rng.uniform(0.05, 0.4, 2)
    return np.stack([orders, amplitudes, rates, rng.uniform(0, 2 * np.pi, 2)], axis=1)


def _draw_lookalike(rng: np.random.Generator, original: Body) -> Body:
    tint = rng.uniform(-25, 25, 3) * (rng.random() < 0.5)
    texture = np.clip(original.texture + tint, 0, 255).astype(np.uint8)
    return Body(
        role="lookalike",
        outline=original.outline if rng.random() < 0.5 else _draw_outline(rng),
        ripples=original.ripples,
        radius=original.radius * rng.uniform(0.8, 1.25),
        path=draw_wander(rng, FRAME_WH, max_speed=rng.uniform(2, 9)),
        turn=draw_wave(rng, rng.uniform(-3, 3), rng.uniform(0, 1.5), 0.15),
        grow=original.grow,
        texture=texture,
    )


def _hide(
    rng: np.random.Generator,
    background: Floats,
    body: Body,
    event: Event,
    moment: float,
    hidden: float,
) -> tuple[Body, Body]:
    """Return a body with a path, and an occluder, that hide it around `moment`."""
    small = replace(body, radius=min(body.radius, rng.uniform(36, 60)))
    cover = _draw_body(rng, background, radius=1.0)
    still = Wave(1.0, np.zeros(1), np.zeros(1), np.zeros(1))
    calm = np.zeros((1, 4))
    if event == "eclipse":
        slack = rng.uniform(6, 30)
        target = replace(small, path=draw_wander(rng, FRAME_WH, max_speed=rng.uniform(1, 6)))
        angle = rng.uniform(0, 2 * np.pi)
        path: Path = Eclipse(
            target.path,
            moment,
            hidden,
            slack,
            speed=rng.uniform(6, 16),
            heading=np.array([np.cos(angle), np.sin(angle)]),
        )
        # Scaled to an inscribed circle of radius 1 or more, so that any outline covers the target.
        outline = cover.outline / np.linalg.norm(cover.outline, axis=1).min()
        outline = outline * np.minimum(1.0, 1.35 / np.linalg.norm(outline, axis=1, keepdims=True))
        occluder = replace(
            cover,
            role="occluder",
            outline=outline,
            radius=0.95 * target.reach + slack,
            path=path,
            ripples=calm,
            grow=still,
        )
        return target, occluder
    speed = rng.uniform(5, 12) * rng.choice([-1.0, 1.0])
    position = FRAME_WH * np.array([rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.75)])
    sway = draw_wave(rng, 0.0, rng.uniform(0, 40), 0.1)
    target = replace(small, path=Crossing(position, moment, speed, rng.uniform(200, 300), sway))
    half_width = 0.85 * target.reach + abs(speed) * hidden / 2
    lean = rng.uniform(-0.15, 0.15)
    post = Wander(Wave(position[0], *[np.zeros(1)] * 3), Wave(FRAME_WH[1] / 2, *[np.zeros(1)] * 3))
    corners = np.array(
        [[-half_width, -600], [half_width, -600], [half_width, 600], [-half_width, 600]]
    )
    occluder = replace(
        cover,
        role="occluder",
        outline=corners,
        radius=1.0,
        path=post,
        ripples=calm,
        grow=still,
        turn=Wave(lean * (rng.random() < 0.5), *[np.zeros(1)] * 3),
    )
    return target, occluder


def _draw_pan(rng: np.random.Generator, swing: float) -> Wander:
    return Wander(draw_wave(rng, 0.0, swing, 0.1), draw_wave(rng, 0.0, 0.6 * swing, 0.1))
