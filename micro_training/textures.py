"""Draw random colours, textures and backgrounds for synthetic clips."""

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

_MIN_COLOUR_DISTANCE = 70.0


def draw_palette(rng: np.random.Generator, avoid: Floats | None = None) -> Floats:
    """Draw two related colours.

    Args:
        rng: Source of randomness.
        avoid: `(3,)` colour in 0..255 that the palette must differ from, because little is learned
            from a camouflaged object; or None.

    Returns:
        `(2, 3)` float64, 0..255.
    """
    palette = rng.uniform(10, 245, (2, 3))
    for _ in range(6):
        if avoid is None or np.linalg.norm(palette.mean(axis=0) - avoid) > _MIN_COLOUR_DISTANCE:
            break
        palette = rng.uniform(10, 245, (2, 3))
    # The second colour contains part of the first, so that an object looks like one object.
    palette[1] = palette[0] + rng.uniform(0.25, 1.0) * (palette[1] - palette[0])
    return palette


def draw_texture(rng: np.random.Generator, size_hw: tuple[int, int], palette: Floats) -> Image:
    """Draw a texture of one of five kinds: noise, stripes, checks, spots or a soft gradient.

    Args:
        rng: Source of randomness.
        size_hw: Size in pixels, (H, W).
        palette: `(2, 3)` colours, 0..255.

    Returns:
        `(H, W, 3)` uint8.
    """
    height, width = size_hw
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 40)
    u = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    v = (y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period)
    match rng.integers(5):
        case 0:
            blend = _smooth_noise(rng, size_hw, int(rng.integers(4, 24)))
        case 1:
            blend = 0.5 + 0.5 * np.sin(u)
        case 2:
            blend = (np.sin(u) * np.sin(v) > 0).astype(np.float32)
        case 3:
            blend = (np.sin(u) * np.sin(v) > rng.uniform(0.2, 0.7)).astype(np.float32)
        case _:
            blend = (u - u.min()) / (u.max() - u.min())
    blend = np.clip(blend + rng.uniform(0, 0.5) * (_smooth_noise(rng, size_hw, 12) - 0.5), 0, 1)
    first, second = palette.astype(np.float32)
    texture = first + blend[..., None] * (second - first)
    image: Image = np.clip(texture, 0, 255).astype(np.uint8)
    return image


def draw_background(rng: np.random.Generator, size_hw: tuple[int, int], palette: Floats) -> Image:
    """Draw a textured background with static shapes that are not objects.

    Args:
        rng: Source of randomness.
        size_hw: Size in pixels, (H, W).
        palette: `(2, 3)` colours, 0..255.

    Returns:
        `(H, W, 3)` uint8.
    """
    background = draw_texture(rng, size_hw, palette)
    height, width = size_hw
    for _ in range(int(rng.integers(0, 14))):
        centre = rng.uniform((0, 0), (width, height))
        corners = centre + rng.uniform(-0.12, 0.12, (int(rng.integers(3, 8)), 2)) * height
        colour = 0.5 * palette[int(rng.integers(2))] + 0.5 * rng.uniform(0, 255, 3)
        hull = cv2.convexHull(corners.astype(np.float32)).astype(np.int32)
        cv2.fillPoly(background, [hull], [float(channel) for channel in colour], cv2.LINE_AA)
    return background


def _smooth_noise(
    rng: np.random.Generator, size_hw: tuple[int, int], cells: int
) -> npt.NDArray[np.float32]:
    grid = rng.random((cells, cells), dtype=np.float32)
    noise = cv2.resize(grid, size_hw[::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray(noise, dtype=np.float32)
