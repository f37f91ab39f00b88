"""Draw a short clip with texture and two moving shapes from a seed; frames are JPEG bytes."""

from __future__ import annotations

import base64
import functools

import cv2
import numpy as np

from shapes import Mask

SIZE_HW = (180, 320)


@functools.cache  # callers must not change the list
def jpeg_frames(count: int, *, seed: int = 0, size_hw: tuple[int, int] = SIZE_HW) -> list[bytes]:
    """Return `count` JPEGs of a disc (blob) and a rectangle (block) that move over noise."""
    height, width = size_hw
    rng = np.random.default_rng(seed)
    background = cv2.resize(
        rng.integers(0, 255, (9, 16, 3), dtype=np.uint8),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    frames = []
    for index in range(count):
        frame = background.copy()
        cv2.circle(frame, (60 + 5 * index, 90), 30, (40, 200, 230), -1)
        cv2.rectangle(frame, (220 - 4 * index, 40), (270 - 4 * index, 100), (200, 60, 30), -1)
        noise = rng.integers(0, 30, frame.shape)
        noisy = np.clip(frame + noise, 0, 255).astype(np.uint8)
        frames.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    return frames


def blob_mask(size_hw: tuple[int, int] = SIZE_HW) -> Mask:
    """Return the blob's mask on frame 0."""
    rows, columns = np.ogrid[: size_hw[0], : size_hw[1]]
    return np.asarray((columns - 60) ** 2 + (rows - 90) ** 2 <= 30**2)


def block_mask(size_hw: tuple[int, int] = SIZE_HW) -> Mask:
    """Return the block's mask on frame 0."""
    mask = np.zeros(size_hw, dtype=np.bool_)
    mask[40:101, 220:271] = True
    return mask


def base64_text(data: bytes) -> str:
    """Return bytes in base64, as CVAT sends images."""
    return base64.b64encode(data).decode()
