"""Owns what a run on a CVAT task will do: which objects, from where, over which frames.

Asks the server and changes nothing on it, but that an interrupted batch is brought to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvat_task.connection import CvatConnection, Job
from cvat_task.followed_objects import SOURCE, Followed, Wanted, choose, first_frame, resume, series
from cvat_task.job_writer import Journal, recover
from cvat_task.keyframes import Json
from errors import BadRequestError

BATCH_FRAMES = 50


@dataclass(frozen=True)
class RunOptions:
    """What was asked for.

    Attributes:
        from_frame: Where the objects are; None means the first frame that has any.
        to_frame: Where to stop; None means the end, or the beginning if backwards.
        objects: Server ids of what to follow, each `12`, `shape:12` or `track:12`; none means all.
        label: Follow only objects of this label; None means of all.
        backwards: Follow the objects towards frame 0.
        every: See `build_track`.
        batch: Frames between two writes.
    """

    from_frame: int | None = None
    to_frame: int | None = None
    objects: tuple[str, ...] = ()
    label: str | None = None
    backwards: bool = False
    every: int = 1
    batch: int = BATCH_FRAMES

    def beyond(self, frame: int, other: int) -> bool:
        """Tell whether a frame comes after another one in tracking order."""
        return frame < other if self.backwards else frame > other

    def ordered(self, job: Job) -> list[int]:
        """Return a job's usable frames in tracking order."""
        return sorted(job.usable, reverse=self.backwards)


@dataclass
class Plan:
    """Where a run begins.

    Attributes:
        jobs: All jobs in tracking order.
        at: Which of them it begins in.
        annotations: Of that job.
        objects: What is followed.
        anchor: The frame where it begins; it and all before are done.
        target: The last frame to track.
        is_repeat: Whether it goes on where an interrupted run has ended.
        gone: Names of objects that run followed and that are not there any more.
    """

    jobs: list[Job]
    at: int
    annotations: Json
    objects: list[Followed]
    anchor: int
    target: int
    is_repeat: bool = False
    gone: tuple[str, ...] = ()


def make_plan(
    server: CvatConnection,
    job_ids: Sequence[int],
    request: RunOptions,
    journal: Journal,
    *,
    restart: bool = False,
    dry: bool = False,
) -> Plan:
    """Find out what to track from where.

    Args:
        server: It is asked; an interrupted batch is brought to its end there.
        job_ids: By their first frames.
        request: What was asked for.
        journal: How far an interrupted run of the same request came.
        restart: Whether to begin anew all the same.
        dry: Whether to leave the server as it is.

    Raises:
        CvatError: The server does not answer as it should.
        BadRequestError: What was asked for is not there.
    """
    jobs = [server.job(number) for number in job_ids]
    if request.backwards:
        jobs.reverse()
    frames = [frame for job in jobs for frame in request.ordered(job)]
    if not frames:
        raise BadRequestError("there are no frames to track on: all are deleted")
    target = frames[-1] if request.to_frame is None else request.to_frame
    if target not in frames:
        raise BadRequestError(f"--to-frame {target} is not a frame to track on: {_span(frames)}")

    repeat = _repeat(server, jobs, journal, target, dry=dry)
    if repeat is not None and not restart:
        _check_sizes(repeat, request)
        return repeat

    if request.from_frame is not None and request.from_frame not in frames:
        raise BadRequestError(
            f"--from-frame {request.from_frame} is not a frame to track on: {_span(frames)}"
        )
    wanted = _wanted(request, jobs[0])
    for at, job in enumerate(jobs):
        annotations = server.annotations(job.id)
        begins = [one for one in request.ordered(job) if request.from_frame in {None, one}]
        anchor = first_frame(annotations, begins, wanted=wanted)
        if anchor is not None:
            objects = choose(
                annotations, anchor, job.labels, wanted=wanted, tracks_allowed=job.tracks_allowed
            )
            plan = Plan(jobs, at, annotations, objects, anchor, target)
            _check(plan, request)
            return plan
    place = "any frame" if request.from_frame is None else f"frame {request.from_frame}"
    raise BadRequestError(
        f"there is nothing to track on {place}: draw a mask, polygon, rectangle or ellipse there"
        + (", or ask for other --objects or another --label" if wanted != Wanted() else "")
    )


def _repeat(
    server: CvatConnection, jobs: Sequence[Job], journal: Journal, target: int, *, dry: bool
) -> Plan | None:
    """Return the plan that goes on where an interrupted run has ended, if there was one."""
    kept = journal.load()
    at = next((at for at, job in enumerate(jobs) if kept and job.id == kept["job"]), None)
    if kept is None or at is None:
        return None
    anchor, objects = recover(server, kept, change=not dry)
    annotations = server.annotations(jobs[at].id)
    there: list[Followed] = []
    gone: list[Followed] = []
    for one in objects:
        (there if resume(one, annotations, anchor) else gone).append(one)
    if not there:
        return None
    names = tuple(one.name for one in gone)
    return Plan(list(jobs), at, annotations, there, anchor, target, is_repeat=True, gone=names)


def describe(plan: Plan, request: RunOptions) -> list[str]:
    """Return lines for people: what would change, and what is skipped."""
    lines = []
    if plan.is_repeat:
        lines.append(
            f"an earlier run of this command was interrupted: going on after frame {plan.anchor} "
            "(--restart begins anew)"
        )
    for job, frames in todo(plan, request):
        lines.append(f"job {job.id}: {len(frames)} frames to track, {frames[0]} to {frames[-1]}")
        low, high = sorted((frames[0], frames[-1]))
        for what, skipped in (("deleted", job.deleted), ("honeypot", job.honeypots)):
            there = sorted(frame for frame in skipped if low <= frame <= high)
            if there:
                numbers = ", ".join(map(str, there))
                plural = "s" if len(there) > 1 else ""
                lines.append(f"  skipped: {len(there)} {what} frame{plural} ({numbers})")
        if not job.tracks_allowed:
            lines.append("  this task has honeypots and takes no tracks: one shape per frame")
    lines += [f"  {name}: changed or deleted by somebody since: left alone" for name in plan.gone]
    return lines + [f"  {_describe_object(one, plan, request)}" for one in plan.objects]


def todo(plan: Plan, request: RunOptions) -> list[tuple[Job, list[int]]]:
    """Return the jobs with the frames to track in each; frames that two share come once."""
    todo = []
    anchor = plan.anchor
    for job in plan.jobs[plan.at :]:
        frames = [
            frame
            for frame in request.ordered(job)
            if request.beyond(frame, anchor) and not request.beyond(frame, plan.target)
        ]
        if frames:
            todo.append((job, frames))
            anchor = frames[-1]
    return todo


def _describe_object(one: Followed, plan: Plan, request: RunOptions) -> str:
    low, high = sorted((plan.anchor, plan.target))
    inside = range(low, high + 1)
    if one.as_track:
        text = f"{one.name}: {one.type} -> track, a keyframe every {request.every}"
        replaced = sum(
            key["frame"] in inside and key["frame"] != plan.anchor for key in one.keyframes
        )
        return text + (f"; replaces {replaced} keyframes" if replaced else "")
    group = f"group {one.group}" if one.group else "a new group"
    text = f"{one.name}: {one.type} -> one shape per frame, in {group}"
    replaced = sum(
        one.alike > 0
        and series(shape) == series(one.like)
        and shape["frame"] in inside
        and shape["frame"] != plan.anchor
        and shape["source"] == SOURCE
        for shape in plan.annotations["shapes"]
    )
    return text + (f"; replaces up to {replaced} shapes" if replaced else "")


def _wanted(request: RunOptions, job: Job) -> Wanted:
    label_ids = None
    if request.label is not None:
        names = {label.name: number for number, label in job.labels.items()}
        if request.label not in names:
            raise BadRequestError(
                f"there is no label {request.label!r}: expected one of {', '.join(sorted(names))}"
            )
        label_ids = frozenset([names[request.label]])
    return Wanted(frozenset(request.objects) or None, label_ids)


def _check(plan: Plan, request: RunOptions) -> None:
    names = {name for one in plan.objects for name in (one.name.split()[0], str(one.standing))}
    missing = [name for name in request.objects if name not in names]
    if missing:
        raise BadRequestError(
            f"--objects {', '.join(missing)}: not on frame {plan.anchor}; objects that begin on "
            "another frame are tracked by a run of their own, with --from-frame"
        )
    if not request.beyond(plan.target, plan.anchor):
        raise BadRequestError(
            f"--to-frame {plan.target} does not come after frame {plan.anchor}, where the objects "
            f"are{'' if request.backwards else ': --backwards tracks towards frame 0'}"
        )
    _check_sizes(plan, request)


def _check_sizes(plan: Plan, request: RunOptions) -> None:
    # A repeat may begin in a job with the last frame of the one before.
    begun = next(job for job in plan.jobs[plan.at :: -1] if plan.anchor in job.places)
    size_hw = begun.size_hw(plan.anchor)
    for job, frames in todo(plan, request):
        for frame in frames:
            if job.size_hw(frame) != size_hw:
                raise BadRequestError(
                    f"frame {frame} has another size than frame {plan.anchor}: objects are tracked "
                    "through frames of one size only, choose another --to-frame"
                )


def _span(frames: Sequence[int]) -> str:
    return f"there are {len(frames)}, from {min(frames)} to {max(frames)}, without deleted ones"
