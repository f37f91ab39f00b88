"""Owns writing what was found to a job so that nothing is lost, doubled or torn.

New annotations are created first; what they replace is deleted when they stand. A journal on this
machine says how far the run is and what it is about to write, so that a repeat goes on from there.
Knows nothing about frames or models.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from cvat_task import connection
from cvat_task.annotations import (
    LISTS,
    build_shapes,
    build_track,
    copy_of,
    earlier_shapes,
    empty,
    largest_group,
    same,
)
from cvat_task.connection import Job, ServerAwayError
from cvat_task.followed_objects import Followed
from cvat_task.keyframes import Json, ascending
from errors import BadRequestError

JOURNAL_VERSION = 1


class AnnotationStore(Protocol):
    """Where annotations live."""

    def annotations(self, job_id: int) -> Json:
        """Return all of a job."""

    def create(self, job_id: int, annotations: Json) -> Json:
        """Add some, all or none, and return them with ids."""

    def delete(self, job_id: int, annotations: Json) -> None:
        """Delete some by their ids."""


class Journal:
    """A file that tells a repeat of the same command how far the run came.

    Args:
        folder: Where journals lie.
        asked: What was asked for; another command has another journal.
    """

    def __init__(self, folder: Path, asked: Json) -> None:
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:20]
        self._path = folder / f"{name}.json"
        self._asked = asked

    def load(self) -> Json | None:
        """Return what was kept last; None when there is nothing, or nothing of use."""
        try:
            kept: Json = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        fits = kept.get("version") == JOURNAL_VERSION and kept.get("asked") == self._asked
        return kept if fits else None

    def keep(self, state: Json) -> None:
        """Put a state in the place of the one before, in one step.

        Raises:
            BadRequestError: The file cannot be written.
        """
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"version": JOURNAL_VERSION, "asked": self._asked, **state})
            new.write_text(text, encoding="utf-8")
            new.replace(self._path)
        except OSError as err:
            raise BadRequestError(
                f"{self._path} cannot be written ({err.strerror}): a repeat could not go on from "
                "here. Name a folder that can be written in XDG_STATE_HOME"
            ) from err

    def forget(self) -> None:
        """Delete what was kept."""
        self._path.unlink(missing_ok=True)


class JobWriter:
    """Writes one job's objects, batch by batch.

    Args:
        store: The server.
        job: The job.
        objects: What is followed; those that somebody else has changed leave the list.
        before: The job's annotations when the run came to it.
        journal: Told before and after each batch.
        every: See `build_track`.
        anchor: The frame that was written last, or where the run starts.
        largest_group: The largest group number in use elsewhere in the task.
    """

    def __init__(
        self,
        store: AnnotationStore,
        job: Job,
        objects: list[Followed],
        before: Json,
        journal: Journal,
        *,
        every: int,
        anchor: int,
        largest_group: int = 0,
    ) -> None:
        self._store = store
        self._job = job
        self.objects = objects
        self._journal = journal
        self._every = every
        self.anchor = anchor
        self._largest_group = largest_group
        self._shapes_before: list[Json] = before["shapes"]
        self._written = self._state()

    def keep(self) -> None:
        """Tell the journal how far the job is."""
        self._written = self._state()
        self._journal.keep(self._written | {"pending": None})

    def write(self, frame: int) -> list[str]:
        """Write what was found up to a frame.

        Returns:
            Lines about what somebody else has changed.

        Raises:
            CvatError: The server fails. A repeat finds out what was written and goes on.
        """
        now = self._store.annotations(self._job.id)
        notes = self._leave_what_others_changed(now)
        created, deleted, tracks_of = self._plan(now)
        for one in self.objects:
            one.found = []
        self.anchor = frame
        if any(changed[name] for changed in (created, deleted) for name in LISTS):
            pending = {
                "created": created,
                "deleted": deleted,
                "known": {name: [one["id"] for one in now[name]] for name in LISTS},
                "tracks_of": tracks_of,
                "then": self._state(),
            }
            self._journal.keep(self._written | {"pending": pending})
            ids = _create_once(self._store, self._job.id, pending)
            unchanged = _unchanged(deleted, self._store.annotations(self._job.id))
            _delete(self._store, self._job.id, unchanged)
            if kept := sum(len(deleted[name]) - len(unchanged[name]) for name in LISTS):
                notes.append(
                    f"{kept} annotations were changed by somebody while frames up to {frame} were "
                    "written: look at what stands beside them"
                )
            _stand_for(self.objects, pending, ids)
        self.keep()
        return notes

    def _state(self) -> Json:
        objects = [asdict(_without_track(one)) for one in self.objects]
        return {"job": self._job.id, "anchor": self.anchor, "objects": objects}

    def _leave_what_others_changed(self, now: Json) -> list[str]:
        notes = []
        for one in list(self.objects):
            if one.standing is None:
                continue
            there = next((each for each in now[one.kind] if each["id"] == one.standing), None)
            if there is None or not same(there, one.like):
                what = "deleted" if there is None else "changed"
                notes.append(
                    f"{one.name} was {what} by somebody after frame {self.anchor}: left alone"
                )
                self.objects.remove(one)
        return notes

    def _plan(self, now: Json) -> tuple[Json, Json, list[int | None]]:
        """Return what to create, what to delete, and the index of each object's new track."""
        created, deleted = empty(), empty()
        last = max([self.anchor, *(found.frame for one in self.objects for found in one.found)])
        next_frame = next((frame for frame in self._job.usable if frame > last), None)
        earlier, occupied = earlier_shapes(self.objects, self._shapes_still_there(now))
        deleted["shapes"] += earlier
        tracks_of: list[int | None] = []
        for index, one in enumerate(self.objects):
            tracks_of.append(None)
            handed = one.standing is None and one.start is not None  # but not in this job yet
            if not one.found and not handed:
                continue
            if one.as_track:
                track = build_track(one, self._job.labels, every=self._every, next_frame=next_frame)
                if track is None:
                    continue
                tracks_of[-1] = len(created["tracks"])
                created["tracks"].append(track)
                shapes: list[Json] = []
                replaced = one.standing is not None
            else:
                if not one.group and any(found.visible for found in one.found):
                    one.group = self._next_group(now)
                shapes = build_shapes(one, occupied[index])
                created["shapes"] += shapes
                replaced = one.standing is not None and not one.like["group"] and bool(shapes)
            if replaced:
                deleted[one.kind] += [each for each in now[one.kind] if each["id"] == one.standing]
            if not one.as_track and shapes:
                one.standing = None
        return created, _as_sent(deleted), tracks_of

    def _shapes_still_there(self, now: Json) -> list[Json]:
        """Return the shapes from before the run; one that somebody has changed since is theirs."""
        now_by_id = {shape["id"]: shape for shape in now["shapes"]}
        there = []
        for shape in self._shapes_before:
            current = now_by_id.get(shape["id"])
            if current is not None:
                there.append(shape if same(shape, current) else current | {"source": "manual"})
        return there

    def _next_group(self, now: Json) -> int:
        self._largest_group = max(self._largest_group, largest_group(now)) + 1
        return self._largest_group


def _without_track(one: Followed) -> Followed:
    """Leave out what `resume` reads from the server again."""
    if one.standing is None or one.kind == "shapes":
        return one
    return replace(one, like=one.like | {"shapes": []}, keyframes=[], start=None)


def recover(
    store: AnnotationStore, kept: Json, *, change: bool = True
) -> tuple[int, list[Followed]]:
    """Bring an interrupted batch to its end if it was begun on the server, else drop it.

    Args:
        store: The server.
        kept: The journal's last state.
        change: Whether to delete what the batch had still to delete.

    Returns:
        The frame that was written last, and the objects as they were then.
    """
    pending = kept["pending"]
    now = store.annotations(kept["job"]) if pending else empty()
    ids = _created_ids(now, pending) if pending else None
    if pending is None or ids is None:
        return kept["anchor"], [Followed.from_json(one) for one in kept["objects"]]
    if change:
        _delete(store, kept["job"], _unchanged(pending["deleted"], now))
    then = pending["then"]
    objects = [Followed.from_json(one) for one in then["objects"]]
    _stand_for(objects, pending, ids)
    return then["anchor"], objects


def _create_once(store: AnnotationStore, job_id: int, pending: Json) -> list[int]:
    """Create what is pending; when the server fails, look whether it was done before repeating.

    Returns:
        Ids of the created tracks.
    """
    if not any(pending["created"][name] for name in LISTS):
        return []
    for attempt, pause_s in enumerate((*connection.RETRY_PAUSES_S, None)):
        try:
            answer = store.create(job_id, pending["created"])
        except ServerAwayError:
            if pause_s is None:
                raise
            time.sleep(pause_s)
            ids = _created_ids(store.annotations(job_id), pending)
            if ids is not None:
                return ids
        else:
            if attempt:
                _delete_doubles(store, job_id, pending, answer)
            return [track["id"] for track in answer["tracks"]]
    raise AssertionError("unreachable")


def _delete_doubles(store: AnnotationStore, job_id: int, pending: Json, answer: Json) -> None:
    """Delete what an attempt has left that a proxy gave up and the server finished all the same."""
    now = store.annotations(job_id)
    doubles = empty()
    for name in LISTS:
        known = {*pending["known"][name], *(one["id"] for one in answer[name])}
        doubles[name] = [
            one
            for one in now[name]
            if one["id"] not in known
            and any(same(one, created) for created in pending["created"][name])
        ]
    _delete(store, job_id, _as_sent(doubles))


def _unchanged(annotations: Json, now: Json) -> Json:
    """Leave out what is not as it was: what somebody has changed meanwhile is theirs."""
    return annotations | {
        name: [
            one
            for one in annotations[name]
            if any(each["id"] == one["id"] and same(each, one) for each in now[name])
        ]
        for name in LISTS
    }


def _created_ids(now: Json, pending: Json) -> list[int] | None:
    """Return the ids of the tracks that are pending, or None when nothing of it was created.

    The server creates all or none. What somebody has changed since then has the id -1.
    """
    found: dict[str, list[int]] = {}
    for name in LISTS:
        known = set(pending["known"][name])
        new = [one for one in now[name] if one["id"] not in known]
        found[name] = []
        for wanted in pending["created"][name]:
            match = next((one for one in new if same(one, wanted)), None)
            if match is not None:
                new.remove(match)
            found[name].append(-1 if match is None else match["id"])
    if all(number == -1 for numbers in found.values() for number in numbers):
        return None
    return found["tracks"]


def _delete(store: AnnotationStore, job_id: int, annotations: Json) -> None:
    if any(annotations[name] for name in LISTS):
        store.delete(job_id, annotations)


def _stand_for(objects: Sequence[Followed], pending: Json, track_ids: Sequence[int]) -> None:
    """Let the created tracks stand for their objects."""
    anchor = pending["then"]["anchor"]
    for one, index in zip(objects, pending["tracks_of"], strict=True):
        if index is not None:
            track = pending["created"]["tracks"][index]
            one.like, one.kind, one.standing = track, "tracks", track_ids[index]
            one.keyframes = ascending(track["shapes"])
            one.start = next((key for key in one.keyframes if key["frame"] == anchor), None)


def _as_sent(annotations: Json) -> Json:
    """Return annotations to delete as CVAT takes them: with their ids, without empty fields."""
    return annotations | {
        name: [copy_of(one) | {"id": one["id"]} for one in annotations[name]] for name in LISTS
    }
