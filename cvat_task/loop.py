"""Owns the loop of a run on a CVAT task: job by job and frame by frame, to the client and back.

Server, frames, objects, writing and tracking have rooms of their own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Never

import numpy as np
from PIL import Image
from tqdm import tqdm

from clips.overlays import ContactSheet, draw_masks
from clips.tracking_client import TrackingClient
from cvat_task.annotations import largest_group
from cvat_task.connection import CvatConnection, CvatError
from cvat_task.followed_objects import Followed, hand_over
from cvat_task.job_frames import job_frames
from cvat_task.job_writer import JobWriter, Journal
from cvat_task.keyframes import Json
from cvat_task.plan import Plan, RunOptions, todo
from errors import BadRequestError, TrackerError
from object_requests import Continue, Start
from shapes import Shape, ShapeType, shape_to_mask
from state_token import StateToken
from tracker import TrackedObject

SHEET_FRAMES = 12


@dataclass
class TaskSummary:
    """What a run did.

    Attributes:
        frames: Frames tracked.
        seconds: How long it took, model loading not counted.
        lost: By object, on how many frames it was not found.
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
    request: RunOptions,
    client: TrackingClient,
    journal: Journal,
    *,
    out: Path | None = None,
    stop: threading.Event | None = None,
) -> TaskSummary:
    """Track and write, job by job.

    Args:
        server: Where frames come from and results go.
        plan: Where to begin.
        request: What was asked for.
        client: What tracks.
        journal: Told how far the run is, and emptied when it is done.
        out: Folder for `contact_sheet.png`; None: no sheet.
        stop: Ends the run after the frame in flight when it is set; what was found is written.

    Raises:
        TrackerError: Of the server or the client; what was found before is written if it can be.
    """
    outcome = TaskSummary()
    begin = time.monotonic()
    frames = [frame for _, frames in todo(plan, request) for frame in frames]
    sheet = _Sheet(out, frames)
    objects, anchor, annotations = plan.objects, plan.anchor, plan.annotations
    elsewhere = 0
    if len(plan.jobs) > 1:
        elsewhere = max(largest_group(server.annotations(job.id)) for job in plan.jobs)
    with closing(sheet), tqdm(total=len(frames), unit="frame", disable=None) as bar:
        loop = _Loop(server, plan, request, client, bar, sheet, outcome, stop)
        for at in range(plan.at, len(plan.jobs)):
            job = plan.jobs[at]
            writer = JobWriter(
                server,
                job,
                objects,
                annotations,
                journal,
                every=request.every,
                anchor=anchor,
                largest_group=elsewhere,
            )
            if at > plan.at:
                writer.keep()
            following = plan.jobs[at + 1] if at + 1 < len(plan.jobs) else None
            loop.track(at, writer, set(following.usable) if following else set())
            anchor = writer.anchor
            if outcome.interrupted or following is None:
                break
            first = request.ordered(following)[0]
            if request.beyond(first, plan.target):
                break
            annotations = server.annotations(following.id)
            objects = loop.hand_over(writer.objects, following.id, annotations, first, anchor)
            if not objects:
                break
    outcome.seconds = time.monotonic() - begin
    if not outcome.interrupted:
        journal.forget()
    return outcome


class _Loop:
    """The loop over the frames of a run; it holds what goes on from job to job."""

    def __init__(
        self,
        server: CvatConnection,
        plan: Plan,
        request: RunOptions,
        client: TrackingClient,
        bar: tqdm[Never],
        sheet: _Sheet,
        outcome: TaskSummary,
        stop: threading.Event | None,
    ) -> None:
        self._server = server
        self._plan = plan
        self._request = request
        self._client = client
        self._bar = bar
        self._sheet = sheet
        self._outcome = outcome
        self._stop = stop
        self._tokens: dict[int, StateToken] = {}  # by the id of the object's `Followed`
        self._is_writing = False
        # Batches that end on a keyframe leave the same keyframes as one long batch would.
        self._batch = -(-request.batch // request.every) * request.every

    def track(self, at: int, writer: JobWriter, shared: set[int]) -> None:
        """Track the objects of a writer to the end of its job, and write them.

        Args:
            at: Which of the plan's jobs.
            writer: The job's.
            shared: Frames of the next job.
        """
        job = self._plan.jobs[at]
        begin = writer.anchor
        todo = [
            frame
            for frame in self._request.ordered(job)
            if self._request.beyond(frame, begin)
            and not self._request.beyond(frame, self._plan.target)
        ]
        done = 0
        last = begin
        try:
            for number, frame in self._frames(at, [*self._lead_in(at, writer), *todo]):
                found = self._step(
                    writer.objects, number, frame, new=self._request.beyond(number, begin)
                )
                if not self._request.beyond(number, begin):
                    continue
                for one, _ in found:
                    if number in shared:
                        one.recent.append(one.found[-1])
                    self._outcome.lost[one.name] += not one.found[-1].visible
                done, last = done + 1, number
                self._outcome.frames += 1
                self._show(number, frame, found)
                if done % self._batch == 0:
                    self._write(writer, last)
                if self._stop is not None and self._stop.is_set():
                    self._outcome.interrupted = True
                if self._outcome.interrupted or not writer.objects:
                    break
        except TrackerError:
            if not self._is_writing:  # what was found until then is worth keeping
                with suppress(CvatError):
                    self._write(writer, last)
            raise
        self._write(writer, last)

    def hand_over(
        self, objects: Sequence[Followed], job_id: int, annotations: Json, first: int, anchor: int
    ) -> list[Followed]:
        """Return the objects as the next job begins with them."""
        handed = []
        for one in objects:
            heir = hand_over(one, annotations, first, anchor)
            if heir is None:
                self._note(f"{one.name}: somebody has drawn it in job {job_id}: left alone")
                continue
            if id(one) in self._tokens:
                self._tokens[id(heir)] = self._tokens[id(one)]
            handed.append(heir)
        self._handed = objects  # keeps their ids from being used again
        return handed

    def _lead_in(self, at: int, writer: JobWriter) -> list[int]:
        """Return the frames up to the anchor that objects without a state have to see first."""
        starts = [one.last_seen.frame for one in writer.objects if id(one) not in self._tokens]
        if not starts:
            return []
        first = max(starts) if self._request.backwards else min(starts)
        low, high = sorted((first, writer.anchor))
        jobs = self._plan.jobs[: at + 1]
        numbers = {frame for job in jobs for frame in job.usable if low <= frame <= high}
        return sorted(numbers | set(starts), reverse=self._request.backwards)

    def _frames(self, at: int, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        jobs = self._plan.jobs[at::-1]  # the newest that has the frame

        def place(number: int) -> int:
            return next(place for place, job in enumerate(jobs) if number in job.places)

        for which, group in groupby(numbers, key=place):
            yield from job_frames(self._server, jobs[which], list(group))

    def _step(
        self, objects: Sequence[Followed], number: int, frame: Image.Image, *, new: bool
    ) -> list[tuple[Followed, TrackedObject]]:
        items: list[Start | Continue] = []
        there = []
        for one in objects:
            token = self._tokens.get(id(one))
            if token is not None:
                items.append(Continue(token))
            elif one.last_seen.frame == number:
                items.append(Start(Shape(ShapeType(one.type), one.last_seen.points)))
            else:
                continue
            there.append(one)
        if not items:
            return []
        found = list(zip(there, self._client.track(frame, items), strict=True))
        for one, answer in found:
            self._tokens[id(one)] = answer.token
            if new:
                one.note(number, answer.shape.points if answer.shape and not answer.lost else None)
        return found

    def _show(
        self, number: int, frame: Image.Image, found: Sequence[tuple[Followed, TrackedObject]]
    ) -> None:
        self._sheet.add(number, frame, found)
        self._bar.set_description(f"frame {number}", refresh=False)
        lost = sum(answer.lost for _, answer in found)
        self._bar.set_postfix(objects=len(found), lost=lost, refresh=False)
        self._bar.update()

    def _write(self, writer: JobWriter, last: int) -> None:
        self._is_writing = True
        for note in writer.write(last):
            self._note(note)
        self._is_writing = False

    def _note(self, note: str) -> None:
        self._outcome.notes.append(note)
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
            places = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round()
            self._shown = {frames[int(place)] for place in places}
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise BadRequestError(
                    f"--out {out} cannot be made ({err.strerror}): name another folder"
                ) from err
            self._page = ContactSheet(out / "contact_sheet.png", sorted(self._shown))

    def add(
        self, number: int, frame: Image.Image, found: Sequence[tuple[Followed, TrackedObject]]
    ) -> None:
        """Draw a frame if it is one to show."""
        if self._page is None or number not in self._shown:
            return
        size_hw = (frame.height, frame.width)
        masks = {
            index: shape_to_mask(one.shape, size_hw) if one.mask is None else one.mask
            for index, (_, one) in enumerate(found)
            if one.shape is not None and not one.lost
        }
        names = [followed.name for followed, _ in found]
        self._page.add(number, draw_masks(np.asarray(frame), masks, names))

    def close(self) -> None:
        """Write the page."""
        if self._page is not None:
            self._page.close()
