"""Read clips, video files or folders of images, frame by frame."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import cv2
from PIL import Image

from errors import BadRequestError
from images import decode_image
from settings import Limits

DEFAULT_FPS = 25.0
MAX_FPS = 1000.0
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class Clip(Protocol):
    """Frames numbered from 0.

    Attributes:
        frame_count: Number of frames; of a video file, what its header says.
        fps: Frames per second.
    """

    frame_count: int
    fps: float

    def frames(self, first: int, last: int) -> Iterator[tuple[int, Image.Image]]:
        """Yield frame numbers and RGB frames from first to last, backwards if last < first."""


def open_clip(path: Path) -> Clip:
    """Open a video file or a folder of images.

    Raises:
        BadRequestError: It is neither.
    """
    return _Folder(path) if path.is_dir() else _Video(path)


class _Folder:
    def __init__(self, path: Path) -> None:
        images = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise BadRequestError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self._files: Sequence[Path] = sorted(images, key=lambda file: natural_order(file.name))
        self.frame_count = len(images)
        self.fps = DEFAULT_FPS

    def frames(self, first: int, last: int) -> Iterator[tuple[int, Image.Image]]:
        direction = 1 if first <= last else -1
        for number in range(first, last + direction, direction):
            yield number, decode_image(self._files[number].read_bytes(), Limits())


class _Video:
    def __init__(self, path: Path) -> None:
        self._path = path
        capture = cv2.VideoCapture(str(path)) if path.is_file() else None
        self.frame_count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture else 0
        fps = capture.get(cv2.CAP_PROP_FPS) if capture else 0
        if capture is None or self.frame_count < 1:
            raise BadRequestError(f"{path} is not a video that can be read, nor a folder of images")
        capture.release()
        self.fps = fps if 1 <= fps <= MAX_FPS else DEFAULT_FPS  # some headers hold nonsense

    def frames(self, first: int, last: int) -> Iterator[tuple[int, Image.Image]]:
        if first <= last:
            yield from self._forwards(first, last)
            return
        # Seeking is not exact in many codecs: decode forwards, keep the frames on disk.
        with tempfile.TemporaryDirectory() as folder:
            for number, frame in self._forwards(last, first):
                frame.save(Path(folder, f"{number}.png"), compress_level=1)
            for number in range(first, last - 1, -1):
                file = Path(folder, f"{number}.png")
                if file.exists():  # the header may promise more frames than the file has
                    with Image.open(file) as image:
                        yield number, image.convert("RGB")

    def _forwards(self, first: int, last: int) -> Iterator[tuple[int, Image.Image]]:
        capture = cv2.VideoCapture(str(self._path))
        try:
            for number in range(last + 1):
                if not capture.grab():
                    return
                if number >= first:
                    _, frame = capture.retrieve()
                    yield number, Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        finally:
            capture.release()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts frame10 after frame9."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
