"""Draw a scene at a given time: an RGB frame and a map of the body that each pixel shows."""

import cv2
import numpy as np
import numpy.typing as npt

from micro_training.motion import Floats
from micro_training.scene import BACKGROUND_MARGIN, FRAME_WH, TEXTURE_SIZE, Body, Camera, Scene

Image = npt.NDArray[np.uint8]

# Number of fractional bits of the fixed-point corners for fillPoly.
_SHIFT = 4


def render_frame(
    scene: Scene, time: float, size_hw: tuple[int, int], rng: np.random.Generator
) -> tuple[Image, Image]:
    """Draw one frame.

    Args:
        scene: The scene.
        time: In frames.
        size_hw: Size of the frame in pixels, (H, W).
        rng: Source of the sensor noise.

    Returns:
        The frame, `(H, W, 3)` uint8 RGB, and the labels, `(H, W)` uint8: 0 for background, i + 1
        where `scene.bodies[i]` is visible.
    """
    height, width = size_hw
    view = _view_matrix(scene.camera, time, size_hw)
    frame = _draw_background(scene.background, view, size_hw)
    labels = np.zeros((height, width), np.uint8)
    for label, body in enumerate(scene.bodies, start=1):
        _draw_body(frame, labels, body, label, view, time)
    return _expose(frame, scene.camera, time, rng), labels


def _view_matrix(camera: Camera, time: float, size_hw: tuple[int, int]) -> Floats:
    """Return the `(2, 3)` affine map from reference pixels to pixels of the frame."""
    cos, sin = np.cos(camera.roll(time)), np.sin(camera.roll(time))
    zoom = camera.zoom(time)
    linear = zoom * np.array([[cos, -sin], [sin, cos]])
    centre = FRAME_WH / 2
    offset = centre - linear @ (centre + camera.pan(time))
    scale = np.array([size_hw[1], size_hw[0]]) / FRAME_WH
    view: Floats = np.concatenate([linear, offset[:, None]], axis=1) * scale[:, None]
    return view


def _draw_background(background: Image, view: Floats, size_hw: tuple[int, int]) -> Image:
    texture_wh = np.array([background.shape[1], background.shape[0]])
    step = FRAME_WH * (1 + 2 * BACKGROUND_MARGIN) / texture_wh
    matrix = np.concatenate(
        [
            view[:, :2] * step,
            (view[:, :2] @ (-BACKGROUND_MARGIN * FRAME_WH) + view[:, 2])[:, None],
        ],
        axis=1,
    )
    drawn = cv2.warpAffine(
        background, matrix, size_hw[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(drawn, dtype=np.uint8)


def _draw_body(
    frame: Image, labels: Image, body: Body, label: int, view: Floats, time: float
) -> None:
    """Draw a body into `frame` and `labels`, in place."""
    angle = body.turn(time)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = view[:, :2] @ turn * (body.radius * body.grow(time))
    centre = view[:, :2] @ body.path(time) + view[:, 2]
    corners = _deform(body, time) @ linear.T + centre
    height, width = labels.shape
    left, top = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 2, (width, height))
    if right <= left or bottom <= top:
        return
    cover = np.zeros((bottom - top, right - left), np.uint8)
    # A pixel covers [i, i + 1); OpenCV puts its centre at i.
    fixed = np.round((corners - (left, top) - 0.5) * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(cover, [fixed], 255, cv2.LINE_AA, _SHIFT)
    widest = float(np.abs(body.outline).max()) * 1.3
    step = widest / (TEXTURE_SIZE / 2)
    if body.role == "occluder" and body.radius == 1.0:
        # A pillar is far longer than its texture, so the texture repeats.
        step = 1.0
    origin = centre - (left, top) - linear @ np.full(2, step * TEXTURE_SIZE / 2)
    matrix = np.concatenate([linear * step, origin[:, None]], axis=1)
    texture = cv2.warpAffine(
        body.texture,
        matrix,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    patch = frame[top:bottom, left:right]
    alpha = cover[..., None].astype(np.uint16)
    patch[:] = ((patch * (255 - alpha) + texture * alpha + 127) // 255).astype(np.uint8)
    labels[top:bottom, left:right][cover > 127] = label


def _deform(body: Body, time: float) -> Floats:
    orders, amplitudes, rates, phases = body.ripples.T
    theta = np.arctan2(body.outline[:, 1], body.outline[:, 0])
    waves = amplitudes * np.cos(np.outer(theta, orders) + rates * time + phases)
    deformed: Floats = body.outline * (1 + waves.sum(axis=1, keepdims=True))
    return deformed


def _expose(frame: Image, camera: Camera, time: float, rng: np.random.Generator) -> Image:
    if camera.blur_sigma > 0:
        sigma = camera.blur_sigma * frame.shape[0] / FRAME_WH[1]
        frame = np.asarray(cv2.GaussianBlur(frame, (0, 0), sigma), dtype=np.uint8)
    exposed = cv2.convertScaleAbs(frame, alpha=camera.gain(time))
    # One tile of grain for all frames, shifted at random: new noise would take longer than drawing.
    shift = rng.integers(0, camera.grain.shape[0], 2)
    grain = np.roll(camera.grain, shift, axis=(0, 1))
    height, width = frame.shape[:2]
    repeats = (height // grain.shape[0] + 1, width // grain.shape[1] + 1, 1)
    noise = np.tile(grain, repeats)[:height, :width]
    return np.asarray(cv2.add(exposed, noise, dtype=cv2.CV_8U), dtype=np.uint8)
