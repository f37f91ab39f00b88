"""Read a job's frames: fetch original-quality chunks, one ahead, and decode them as CVAT does."""

from __future__ import annotations

import io
import itertools
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from threading import Thread
from typing import Protocol

import cv2
from PIL import Image

from clips.reader import natural_order
from cvat_task.job import Job
from errors import BadRequestError
from images import decode_image
from settings import Limits


class ChunkSource(Protocol):
    """Where chunks come from."""

    def chunk(self, job_id: int, index: int) -> bytes:
        """Return one chunk of a job, in original quality."""


def job_frames(
    source: ChunkSource,
    job: Job,
    numbers: Sequence[int],
    *,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield frames by their numbers; while a chunk is in use, the next one is being fetched.

    Args:
        source: The server.
        job: The job.
        numbers: Of its frames, in ascending or descending order.
        waiting: Makes the context in which a chunk is waited for.

    Yields:
        The number and the frame, RGB.

    Raises:
        CvatError: The server does not give a chunk.
        BadRequestError: A chunk holds fewer frames than it should.
    """
    chunks = [
        (index, list(chunk_numbers))
        for index, chunk_numbers in itertools.groupby(
            numbers, key=lambda number: job.indices[number] // job.chunk_size
        )
    ]
    upcoming: Future[bytes] | None = None
    for order, (index, chunk_numbers) in enumerate(chunks):
        chunk = upcoming or _fetch(source, job.id, index)
        with waiting():
            data = chunk.result()
        if order + 1 < len(chunks):
            upcoming = _fetch(source, job.id, chunks[order + 1][0])
        first = index * job.chunk_size
        offsets = [job.indices[number] - first for number in chunk_numbers]
        decode = _decode_video if job.is_video else _decode_images
        count = 0
        for number, frame in zip(chunk_numbers, decode(data, offsets), strict=False):
            count += 1
            yield number, frame
        if count < len(chunk_numbers):
            raise BadRequestError(
                f"chunk {index} of job {job.id} ends before frame {chunk_numbers[count]}"
            )


def _fetch(source: ChunkSource, job_id: int, index: int) -> Future[bytes]:
    """Fetch a chunk in a daemon thread: the process can end without waiting for the server."""
    future: Future[bytes] = Future()

    def fetch() -> None:
        try:
            future.set_result(source.chunk(job_id, index))
        except BaseException as err:  # noqa: BLE001  # raised again by `future.result`
            future.set_exception(err)

    Thread(target=fetch, name="chunk", daemon=True).start()
    return future


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
