"""Track and write, job by job and frame by frame."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Never

import numpy as np
from PIL import Image
from tqdm import tqdm

from clips.overlays import ContactSheet, draw_masks
from clips.tracking_client import RemoteTrackingClient, TrackingClient
from cvat_task.annotations import largest_group
from cvat_task.connection import CvatConnection, CvatError
from cvat_task.followed_object import FollowedObject
from cvat_task.handover import hand_over
from cvat_task.interrupts import Interrupted, Interrupts
from cvat_task.job_frames import job_frames
from cvat_task.job_writer import JobWriter
from cvat_task.journal import Journal
from cvat_task.keyframes import Json
from cvat_task.plan import Plan, RunOptions, frames_by_job
from errors import BadRequestError, TrackerError
from object_requests import Continue, Start
from shapes import Shape, ShapeType, shape_to_mask
from tracker import TrackedObject

SHEET_FRAMES = 12
FrameResults = list[tuple[FollowedObject, TrackedObject]]


@dataclass
class TaskSummary:
    """What a run did.

    Attributes:
        frames: Frames tracked.
        seconds: How long it took, without loading the model.
        lost: By the name of an object, on how many frames it was not found.
        notes: What the annotator should know.
        interrupted: Whether Ctrl-C ended it early.
    """

    frames: int = 0
    seconds: float = 0.0
    lost: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False


def run(
    server: CvatConnection,
    plan: Plan,
    options: RunOptions,
    client: TrackingClient,
    journal: Journal,
    *,
    out: Path | None = None,
    interrupts: Interrupts | None = None,
) -> TaskSummary:
    """Track and write, job by job.

    Args:
        server: Where frames come from and results go.
        plan: Where to begin.
        options: What was asked for.
        client: What tracks.
        journal: Has how far the run is; deleted when it is done.
        out: Folder for `contact_sheet.png`; None: no sheet.
        interrupts: Says when Ctrl-C ends the run; what was found until then is written.

    Raises:
        TrackerError: Of the server or the client; what was found before is written if possible.
        KeyboardInterrupt: Ctrl-C came a second time, or while the server failed; a repeat goes on
            after the last batch.
    """
    summary = TaskSummary()
    begin = time.monotonic()
    frames = [frame for _, frames in frames_by_job(plan, options) for frame in frames]
    sheet = _Sheet(out, frames)
    objects, done_frame, annotations = plan.objects, plan.done_frame, plan.annotations
    group_elsewhere = 0
    if len(plan.jobs) > 1:
        group_elsewhere = max(largest_group(server.annotations(job.id)) for job in plan.jobs)
    interrupts = interrupts or Interrupts()
    with (
        interrupts.deferred(),
        closing(sheet),
        tqdm(total=len(frames), unit="frame", disable=None) as bar,
    ):
        loop = _Loop(server, plan, options, client, bar, sheet, summary, interrupts)
        indices = [
            index for index in range(plan.first_job, len(plan.jobs)) if plan.jobs[index].usable
        ]
        for index, following in zip_longest(indices, (plan.jobs[index] for index in indices[1:])):
            writer = JobWriter(
                server,
                plan.jobs[index],
                objects,
                annotations,
                journal,
                keyframe_interval=options.keyframe_interval,
                done_frame=done_frame,
                largest_group=group_elsewhere,
            )
            if index > plan.first_job:
                writer.save_progress()
            loop.track(index, writer, set(following.usable) if following else set())
            done_frame = writer.done_frame
            if summary.interrupted or following is None:
                break
            first = options.in_order(following)[0]
            if options.is_after(first, plan.target):
                break
            if interrupts.requested:  # while the last batch was written
                summary.interrupted = True
                break
            with interrupts.allowed():
                annotations = server.annotations(following.id)
            objects = loop.hand_over(writer.objects, following.id, annotations, first, done_frame)
            if not objects:
                break
    summary.seconds = time.monotonic() - begin
    if not summary.interrupted:
        journal.delete()
    return summary


class _Loop:
    """The loop over the frames of a job, with what all jobs of a run share."""

    def __init__(
        self,
        server: CvatConnection,
        plan: Plan,
        options: RunOptions,
        client: TrackingClient,
        bar: tqdm[Never],
        sheet: _Sheet,
        summary: TaskSummary,
        interrupts: Interrupts,
    ) -> None:
        self._server = server
        self._plan = plan
        self._options = options
        self._client = client
        self._bar = bar
        self._sheet = sheet
        self._summary = summary
        self._interrupts = interrupts
        self._is_writing = False
        # Batches that end on a keyframe leave the same keyframes as one long batch would.
        interval = options.keyframe_interval
        self._batch_frames = -(-options.batch_frames // interval) * interval

    def track(self, job_index: int, writer: JobWriter, shared: set[int]) -> None:
        """Track the objects of a writer to the end of its job, and write them.

        Args:
            job_index: Index of the job in the plan.
            writer: The job's.
            shared: Frames of the next job.
        """
        start = last = writer.done_frame
        frames = [
            frame
            for frame in self._options.in_order(self._plan.jobs[job_index])
            if self._options.is_after(frame, start)
            and not self._options.is_after(frame, self._plan.target)
        ]
        count = 0
        numbers = [*self._lead_in(job_index, writer), *frames]
        try:
            for number, frame in self._frames(job_index, numbers):
                results = self._track_frame(writer.objects, number, frame)
                if self._options.is_after(number, start):
                    self._record(results, number, is_shared=number in shared)
                    self._show(number, frame, results)
                    last = number
                    count += 1
                    if count % self._batch_frames == 0:
                        self._write(writer, last)
                self._summary.interrupted = self._interrupts.requested
                if self._summary.interrupted or not writer.objects:
                    break
        except Interrupted:
            if self._is_writing:  # the server fails: there is no use in writing again
                raise
            self._summary.interrupted = True
        except TrackerError:
            if not self._is_writing:  # keep what was found until then
                with suppress(CvatError):
                    self._write(writer, last)
            raise
        self._write(writer, last)

    def hand_over(
        self,
        objects: Sequence[FollowedObject],
        job_id: int,
        annotations: Json,
        first: int,
        done_frame: int,
    ) -> list[FollowedObject]:
        """Return the objects as the next job begins with them."""
        following = []
        for obj in objects:
            successor = hand_over(obj, annotations, first, done_frame)
            if successor is None:
                self._note(f"{obj.spec.name}: somebody has drawn it in job {job_id}: left alone")
            else:
                following.append(successor)
        return following

    def _lead_in(self, job_index: int, writer: JobWriter) -> list[int]:
        """Return the done frames that objects without a state token have to be tracked on again."""
        starts = [
            obj.progress.last_seen.frame for obj in writer.objects if obj.progress.token is None
        ]
        if not starts:
            return []
        first = max(starts) if self._options.backwards else min(starts)
        low, high = sorted((first, writer.done_frame))
        jobs = self._plan.jobs[: job_index + 1]
        numbers = {frame for job in jobs for frame in job.usable if low <= frame <= high}
        return sorted(numbers | set(starts), reverse=self._options.backwards)

    def _frames(self, job_index: int, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Yield frames, each from the latest job that has it, up to the job with this index."""
        jobs = self._plan.jobs[job_index::-1]

        def source(number: int) -> int:
            return next(index for index, job in enumerate(jobs) if number in job.indices)

        for index, job_numbers in groupby(numbers, key=source):
            yield from job_frames(
                self._server, jobs[index], list(job_numbers), waiting=self._interrupts.allowed
            )

    def _track_frame(
        self, objects: Sequence[FollowedObject], number: int, frame: Image.Image
    ) -> FrameResults:
        """Track the objects on a frame; one without a state token starts where it was last seen."""
        items: list[Start | Continue] = []
        tracked = []
        for obj in objects:
            progress = obj.progress
            if progress.token is not None:
                items.append(Continue(progress.token))
            elif progress.last_seen.frame == number:
                shape = Shape(ShapeType(obj.spec.shape_type), progress.last_seen.points)
                items.append(Start(shape))
            else:
                continue
            tracked.append(obj)
        if not items:
            return []
        # Ctrl-C lets this process finish a frame, but does not wait for a running function.
        is_remote = isinstance(self._client, RemoteTrackingClient)
        with self._interrupts.allowed() if is_remote else nullcontext():
            answers = self._client.track(frame, items)
        results = list(zip(tracked, answers, strict=True))
        for obj, answer in results:
            obj.progress.continue_from(answer.token)
        return results

    def _record(self, results: FrameResults, number: int, *, is_shared: bool) -> None:
        for obj, answer in results:
            is_found = answer.shape is not None and not answer.lost
            points = answer.shape.points if answer.shape is not None and is_found else None
            obj.progress.record(number, points, is_shared=is_shared)
            self._summary.lost[obj.spec.name] += not is_found
        self._summary.frames += 1

    def _show(self, number: int, frame: Image.Image, results: FrameResults) -> None:
        self._sheet.add(number, frame, results)
        self._bar.set_description(f"frame {number}", refresh=False)
        lost = sum(answer.lost for _, answer in results)
        self._bar.set_postfix(objects=len(results), lost=lost, refresh=False)
        self._bar.update()

    def _write(self, writer: JobWriter, last: int) -> None:
        self._is_writing = True
        for note in writer.write(last):
            self._note(note)
        self._is_writing = False

    def _note(self, note: str) -> None:
        self._summary.notes.append(note)
        self._bar.write(note, file=sys.stderr)


class _Sheet:
    """A contact sheet of a few of the tracked frames, or nothing.

    Args:
        out: Its folder; None: no sheet.
        frames: What will be tracked, in order.
    """

    def __init__(self, out: Path | None, frames: Sequence[int]) -> None:
        self._page: ContactSheet | None = None
        self._shown: set[int] = set()
        if out is not None and frames:
            indices = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round()
            self._shown = {frames[int(index)] for index in indices}
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise BadRequestError(
                    f"--out {out} cannot be made ({err.strerror}): name another folder"
                ) from err
            self._page = ContactSheet(out / "contact_sheet.png", sorted(self._shown))

    def add(self, number: int, frame: Image.Image, results: FrameResults) -> None:
        """Draw a frame if it is among those to show."""
        if self._page is None or number not in self._shown:
            return
        size_hw = (frame.height, frame.width)
        masks = {
            index: shape_to_mask(answer.shape, size_hw) if answer.mask is None else answer.mask
            for index, (_, answer) in enumerate(results)
            if answer.shape is not None and not answer.lost
        }
        names = [obj.spec.name for obj, _ in results]
        self._page.add(number, draw_masks(np.asarray(frame), masks, names))

    def close(self) -> None:
        """Write the page."""
        if self._page is not None:
            self._page.close()
