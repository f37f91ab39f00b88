"""Owns a job's frames: original-quality chunks, fetched one ahead, decoded as CVAT decodes them.

Knows nothing about annotations or tracking.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import cv2
from PIL import Image

from clips.reader import natural_order
from cvat_task.connection import Job
from errors import BadRequestError
from images import decode_image
from settings import Limits


class Chunks(Protocol):
    """Where chunks come from."""

    def chunk(self, job_id: int, index: int) -> bytes:
        """Return one chunk of a job, in original quality."""


def job_frames(
    chunks: Chunks, job: Job, numbers: Sequence[int]
) -> Iterator[tuple[int, Image.Image]]:
    """Give frames by their numbers; while one chunk is in use, the next one is being fetched.

    Args:
        chunks: The server.
        job: The job.
        numbers: Of its frames, all rising or all falling.

    Yields:
        The number and the frame, RGB.

    Raises:
        CvatError: The server does not give a chunk.
        BadRequestError: A chunk holds fewer frames than it should.
    """
    wanted = [
        (index, list(numbers_in))
        for index, numbers_in in itertools.groupby(
            numbers, key=lambda number: job.places[number] // job.chunk_size
        )
    ]
    with ThreadPoolExecutor(1, "chunk") as executor:
        coming: Future[bytes] | None = None
        for order, (index, numbers_in) in enumerate(wanted):
            data = (coming or executor.submit(chunks.chunk, job.id, index)).result()
            if order + 1 < len(wanted):
                coming = executor.submit(chunks.chunk, job.id, wanted[order + 1][0])
            first = index * job.chunk_size
            offsets = [job.places[number] - first for number in numbers_in]
            decode = _decode_video if job.is_video else _decode_images
            given = 0
            for number, frame in zip(numbers_in, decode(data, offsets), strict=False):
                given += 1
                yield number, frame
            if given < len(numbers_in):
                raise BadRequestError(
                    f"chunk {index} of job {job.id} ends before frame {numbers_in[given]}"
                )


def _decode_images(data: bytes, offsets: Sequence[int]) -> Iterator[Image.Image]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as err:
        raise BadRequestError(f"a chunk is not a ZIP file with images: {err}") from err
    with archive:
        names = sorted(archive.namelist(), key=natural_order)
        for offset in offsets:
            if offset >= len(names):
                return
            yield decode_image(archive.read(names[offset]), Limits())


def _decode_video(data: bytes, offsets: Sequence[int]) -> Iterator[Image.Image]:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        frames = _read_video(file.name, set(offsets))
        if list(offsets) != sorted(offsets):  # backwards: seeking is not exact
            frames = reversed(list(frames))
        yield from frames


def _read_video(path: str, offsets: set[int]) -> Iterator[Image.Image]:
    capture = cv2.VideoCapture(path)
    try:
        for offset in range(max(offsets) + 1):
            if not capture.grab():
                return
            if offset in offsets:
                _, frame = capture.retrieve()
                yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
