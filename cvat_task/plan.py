"""Plan a run on a CVAT task: which objects, from where, over which frames.

Planning changes nothing on the server, except that it completes an interrupted batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvat_task.connection import CvatConnection
from cvat_task.followed_object import SOURCE, FollowedObject
from cvat_task.handover import resume
from cvat_task.job import Job
from cvat_task.job_writer import recover
from cvat_task.journal import Journal
from cvat_task.keyframes import Json
from cvat_task.object_selection import ObjectFilter, first_frame, select_objects
from cvat_task.shape_matching import series_of
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
        keyframe_interval: See `build_track`.
        batch_frames: Frames between two writes.
    """

    from_frame: int | None = None
    to_frame: int | None = None
    objects: tuple[str, ...] = ()
    label: str | None = None
    backwards: bool = False
    keyframe_interval: int = 1
    batch_frames: int = BATCH_FRAMES

    def is_after(self, frame: int, other: int) -> bool:
        """Tell whether a frame comes after another one in tracking order."""
        return frame < other if self.backwards else frame > other

    def in_order(self, job: Job) -> list[int]:
        """Return a job's usable frames in tracking order."""
        return sorted(job.usable, reverse=self.backwards)


@dataclass(frozen=True)
class Plan:
    """Where a run begins, and where it ends.

    Attributes:
        jobs: All jobs in tracking order.
        first_job: Index of the job it begins in.
        annotations: Of that job.
        objects: The objects to follow.
        done_frame: The frame where it begins; this and all before are done.
        target: The last frame to track.
        is_repeat: Whether it goes on where an interrupted run has ended.
        missing: Names of objects that the interrupted run followed and that no longer exist.
    """

    jobs: list[Job]
    first_job: int
    annotations: Json
    objects: list[FollowedObject]
    done_frame: int
    target: int
    is_repeat: bool = False
    missing: tuple[str, ...] = ()


def make_plan(
    server: CvatConnection,
    job_ids: Sequence[int],
    options: RunOptions,
    journal: Journal,
    *,
    restart: bool = False,
    dry: bool = False,
) -> Plan:
    """Find out what to track from where.

    Args:
        server: The server; an interrupted batch is completed there.
        job_ids: By their first frames.
        options: What was asked for.
        journal: How far an interrupted run of the same command came.
        restart: Whether to begin anew all the same.
        dry: Whether to leave the server as it is.

    Raises:
        CvatError: The server does not answer as it should.
        BadRequestError: What was asked for does not exist.
    """
    jobs = [server.job(job_id) for job_id in job_ids]
    if options.backwards:
        jobs.reverse()
    frames = [frame for job in jobs for frame in options.in_order(job)]
    if not frames:
        raise BadRequestError("there are no frames to track on: all are deleted")
    target = frames[-1] if options.to_frame is None else options.to_frame
    if target not in frames:
        raise BadRequestError(f"--to-frame {target} is not a frame to track on: {_span(frames)}")

    repeat = _plan_repeat(server, jobs, journal, target, dry=dry)
    if repeat is not None and not restart:
        _check_sizes(repeat, options)
        return repeat

    if options.from_frame is not None and options.from_frame not in frames:
        raise BadRequestError(
            f"--from-frame {options.from_frame} is not a frame to track on: {_span(frames)}"
        )
    wanted = _object_filter(options, jobs[0])
    for index, job in enumerate(jobs):
        annotations = server.annotations(job.id)
        starts = [frame for frame in options.in_order(job) if options.from_frame in {None, frame}]
        start = first_frame(annotations, starts, wanted=wanted)
        if start is not None:
            objects = select_objects(
                annotations, start, job.labels, wanted=wanted, tracks_allowed=job.tracks_allowed
            )
            plan = Plan(jobs, index, annotations, objects, start, target)
            _check(plan, options)
            return plan
    where = "any frame" if options.from_frame is None else f"frame {options.from_frame}"
    raise BadRequestError(
        f"there is nothing to track on {where}: draw a mask, polygon, rectangle or ellipse there"
        + (", or ask for other --objects or another --label" if wanted != ObjectFilter() else "")
    )


def _plan_repeat(
    server: CvatConnection, jobs: Sequence[Job], journal: Journal, target: int, *, dry: bool
) -> Plan | None:
    """Return the plan that goes on where an interrupted run has ended, if there was one."""
    saved = journal.load()
    if saved is None:
        return None
    index = next((index for index, job in enumerate(jobs) if job.id == saved["job"]), None)
    if index is None:
        return None
    done_frame, saved_objects = recover(server, saved, change=not dry)
    annotations = server.annotations(jobs[index].id)
    objects: list[FollowedObject] = []
    missing: list[str] = []
    for obj in saved_objects:
        resumed = resume(obj, annotations, done_frame)
        if resumed is None:
            missing.append(obj.spec.name)
        else:
            objects.append(resumed)
    if not objects:
        return None
    return Plan(
        list(jobs),
        index,
        annotations,
        objects,
        done_frame,
        target,
        is_repeat=True,
        missing=tuple(missing),
    )


def describe(plan: Plan, options: RunOptions) -> list[str]:
    """Return lines for people: what would change, and what is skipped."""
    lines = []
    if plan.is_repeat:
        lines.append(
            "an earlier run of this command was interrupted: going on after frame "
            f"{plan.done_frame} (--restart begins anew)"
        )
    for job, frames in frames_by_job(plan, options):
        lines.append(f"job {job.id}: {len(frames)} frames to track, {frames[0]} to {frames[-1]}")
        low, high = sorted((frames[0], frames[-1]))
        for what, skipped in (("deleted", job.deleted), ("honeypot", job.honeypots)):
            between = sorted(frame for frame in skipped if low <= frame <= high)
            if between:
                numbers = ", ".join(map(str, between))
                plural = "s" if len(between) > 1 else ""
                lines.append(f"  skipped: {len(between)} {what} frame{plural} ({numbers})")
        if not job.tracks_allowed:
            lines.append("  this task has honeypots and takes no tracks: one shape per frame")
    lines += [
        f"  {name}: changed or deleted by somebody since: left alone" for name in plan.missing
    ]
    return lines + [f"  {_describe_object(obj, plan, options)}" for obj in plan.objects]


def frames_by_job(plan: Plan, options: RunOptions) -> list[tuple[Job, list[int]]]:
    """Return the jobs with the frames to track in each; a frame that two share comes once."""
    result = []
    done_frame = plan.done_frame
    for job in plan.jobs[plan.first_job :]:
        frames = [
            frame
            for frame in options.in_order(job)
            if options.is_after(frame, done_frame) and not options.is_after(frame, plan.target)
        ]
        if frames:
            result.append((job, frames))
            done_frame = frames[-1]
    return result


def _describe_object(obj: FollowedObject, plan: Plan, options: RunOptions) -> str:
    spec, progress = obj.spec, obj.progress
    low, high = sorted((plan.done_frame, plan.target))
    replaced_frames = set(range(low, high + 1)) - {plan.done_frame}
    if spec.is_track:
        text = f"{spec.name}: {spec.shape_type} -> track, a keyframe every "
        text += f"{options.keyframe_interval}"
        count = sum(key["frame"] in replaced_frames for key in progress.keyframes)
        return text + (f"; replaces {count} keyframes" if count else "")
    group = f"group {progress.group}" if progress.group else "a new group"
    text = f"{spec.name}: {spec.shape_type} -> one shape per frame, in {group}"
    count = sum(
        spec.earlier_shapes_per_frame > 0
        and series_of(shape) == series_of(spec.template)
        and shape["frame"] in replaced_frames
        and shape["source"] == SOURCE
        for shape in plan.annotations["shapes"]
    )
    return text + (f"; replaces up to {count} shapes" if count else "")


def _object_filter(options: RunOptions, job: Job) -> ObjectFilter:
    label_ids = None
    if options.label is not None:
        ids = {label.name: label_id for label_id, label in job.labels.items()}
        if options.label not in ids:
            raise BadRequestError(
                f"there is no label {options.label!r}: expected one of {', '.join(sorted(ids))}"
            )
        label_ids = frozenset([ids[options.label]])
    return ObjectFilter(frozenset(options.objects) or None, label_ids)


def _check(plan: Plan, options: RunOptions) -> None:
    names = {
        name
        for obj in plan.objects
        if obj.progress.existing is not None
        for name in (obj.progress.existing.reference, str(obj.progress.existing.id))
    }
    missing = [name for name in options.objects if name not in names]
    if missing:
        raise BadRequestError(
            f"--objects {', '.join(missing)}: not on frame {plan.done_frame}; objects that begin "
            "on another frame are tracked by a run of their own, with --from-frame"
        )
    if not options.is_after(plan.target, plan.done_frame):
        raise BadRequestError(
            f"--to-frame {plan.target} does not come after frame {plan.done_frame}, where the "
            f"objects are{'' if options.backwards else ': --backwards tracks towards frame 0'}"
        )
    _check_sizes(plan, options)


def _check_sizes(plan: Plan, options: RunOptions) -> None:
    # A repeat may begin in a job with the last frame of the job before.
    jobs = plan.jobs[plan.first_job :: -1]
    size_hw = next(job for job in jobs if plan.done_frame in job.indices).size_hw(plan.done_frame)
    for job, frames in frames_by_job(plan, options):
        for frame in frames:
            if job.size_hw(frame) != size_hw:
                raise BadRequestError(
                    f"frame {frame} has another size than frame {plan.done_frame}: objects are "
                    "tracked through frames of one size only, choose another --to-frame"
                )


def _span(frames: Sequence[int]) -> str:
    return f"there are {len(frames)}, from {min(frames)} to {max(frames)}, without deleted ones"
