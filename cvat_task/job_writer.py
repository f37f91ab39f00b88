"""Write what was found to a job, batch by batch, so that nothing is lost, doubled or half written.

New annotations are created first; what they replace is deleted when they exist. The journal has how
far the run is and what it is about to write, so that a repeat goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tenacity import Retrying

from cvat_task.annotations import (
    LISTS,
    build_shapes,
    build_track,
    earlier_shapes,
    empty,
    largest_group,
    same,
    without_ids,
)
from cvat_task.followed_object import FollowedObject
from cvat_task.job import Job
from cvat_task.journal import Journal
from cvat_task.keyframes import Json

CHANGED_ID = -1  # in place of the id of a created track that somebody has changed since


class AnnotationStore(Protocol):
    """Where annotations are stored: the server."""

    def annotations(self, job_id: int) -> Json:
        """Return all annotations of a job."""

    def create(self, job_id: int, annotations: Json) -> Json:
        """Add annotations, all or none, and return them with ids."""

    def delete(self, job_id: int, annotations: Json) -> None:
        """Delete annotations by their ids."""

    def retrying(self) -> Retrying:
        """Return how often and with which pauses a call is repeated when the server fails."""


class JobWriter:
    """Writes the objects of a job.

    Args:
        store: The server.
        job: The job.
        objects: The followed objects; those that somebody else has changed leave the list.
        before: The job's annotations when the run came to it.
        journal: Updated before and after each batch.
        keyframe_interval: See `build_track`.
        done_frame: The frame that was written last, or where the run starts.
        largest_group: The largest group number in use elsewhere in the task.
    """

    def __init__(
        self,
        store: AnnotationStore,
        job: Job,
        objects: list[FollowedObject],
        before: Json,
        journal: Journal,
        *,
        keyframe_interval: int,
        done_frame: int,
        largest_group: int = 0,
    ) -> None:
        self._store = store
        self._job = job
        self.objects = objects
        self._journal = journal
        self._keyframe_interval = keyframe_interval
        self.done_frame = done_frame
        self._largest_group = largest_group
        self._shapes_before: list[Json] = before["shapes"]
        self._written = self._state()

    def save_progress(self) -> None:
        """Save in the journal how far the job is."""
        self._written = self._state()
        self._journal.save(self._written | {"pending": None})

    def write(self, frame: int) -> list[str]:
        """Write what was found up to a frame.

        Returns:
            Lines about what somebody else has changed.

        Raises:
            CvatError: The server fails. A repeat finds out what was written and goes on.
        """
        now = self._store.annotations(self._job.id)
        notes = self._drop_changed_objects(now)
        created, deleted, track_indices = self._plan(now)
        for obj in self.objects:
            obj.progress.mark_written()
        self.done_frame = frame
        if any(changed[name] for changed in (created, deleted) for name in LISTS):
            pending = {
                "created": created,
                "deleted": deleted,
                "known_ids": {name: [obj["id"] for obj in now[name]] for name in LISTS},
                "track_indices": track_indices,
                "after": self._state(),
            }
            self._journal.save(self._written | {"pending": pending})
            track_ids = _create_once(self._store, self._job.id, pending)
            unchanged = _unchanged(deleted, self._store.annotations(self._job.id))
            _delete(self._store, self._job.id, unchanged)
            if remaining := sum(len(deleted[name]) - len(unchanged[name]) for name in LISTS):
                notes.append(
                    f"{remaining} annotations were changed by somebody while frames up to {frame} "
                    "were written: they stay beside the new ones, delete what is not needed"
                )
            _represent_by_tracks(self.objects, pending, track_ids)
        self.save_progress()
        return notes

    def _state(self) -> Json:
        objects = [obj.to_json() for obj in self.objects]
        return {"job": self._job.id, "done_frame": self.done_frame, "objects": objects}

    def _drop_changed_objects(self, now: Json) -> list[str]:
        """Leave objects to those who have changed them, and return a line about each."""
        notes = []
        for obj in list(self.objects):
            existing = obj.progress.existing
            if existing is None:
                continue
            content = existing.find_in(now)
            if content is None or not same(content, existing.content):
                what = "deleted" if content is None else "changed"
                notes.append(
                    f"{obj.spec.name} was {what} by somebody after frame {self.done_frame}: left "
                    "alone"
                )
                self.objects.remove(obj)
        return notes

    def _plan(self, now: Json) -> tuple[Json, Json, list[int | None]]:
        """Return what to create and to delete, and the index of each object's new track."""
        created, deleted = empty(), empty()
        positions = (position for obj in self.objects for position in obj.progress.unwritten)
        last = max([self.done_frame, *(position.frame for position in positions)])
        next_frame = next((frame for frame in self._job.usable if frame > last), None)
        earlier, occupied = earlier_shapes(self.objects, self._unchanged_shapes_before(now))
        deleted["shapes"] += earlier
        track_indices: list[int | None] = []
        for index, obj in enumerate(self.objects):
            track_indices.append(None)
            if obj.spec.is_track:
                track = self._plan_track(obj, next_frame)
                if track is not None:
                    track_indices[-1] = len(created["tracks"])
                    created["tracks"].append(track)
                    _add_existing(obj, now, deleted)
            else:
                shapes = self._plan_shapes(obj, occupied[index], now)
                created["shapes"] += shapes
                if shapes:
                    if not obj.spec.template["group"]:  # its copy in a group was created
                        _add_existing(obj, now, deleted)
                    obj.progress.represent_by_shapes()
        return created, _as_sent(deleted), track_indices

    def _plan_track(self, obj: FollowedObject, next_frame: int | None) -> Json | None:
        progress = obj.progress
        # A track from the job before may have keyframes here before anything new is found.
        is_handed_over = progress.existing is None and progress.done_keyframe is not None
        if not progress.unwritten and not is_handed_over:
            return None
        return build_track(
            obj,
            self._job.labels,
            keyframe_interval=self._keyframe_interval,
            next_frame=next_frame,
        )

    def _plan_shapes(self, obj: FollowedObject, occupied: set[int], now: Json) -> list[Json]:
        progress = obj.progress
        if not progress.group and any(position.visible for position in progress.unwritten):
            self._largest_group = max(self._largest_group, largest_group(now)) + 1
            progress.use_group(self._largest_group)
        return build_shapes(obj, occupied)

    def _unchanged_shapes_before(self, now: Json) -> list[Json]:
        """Return the shapes from before the run that still exist.

        One that somebody has changed since counts as drawn by a person.
        """
        now_by_id = {shape["id"]: shape for shape in now["shapes"]}
        shapes = []
        for shape in self._shapes_before:
            current = now_by_id.get(shape["id"])
            if current is not None:
                is_same = same(shape, current)
                shapes.append(shape if is_same else current | {"source": "manual"})
        return shapes


def recover(
    store: AnnotationStore, saved: Json, *, change: bool = True
) -> tuple[int, list[FollowedObject]]:
    """Complete an interrupted batch if writing it had begun on the server, else drop it.

    Args:
        store: The server.
        saved: The journal's last state.
        change: Whether to delete what the batch had still to delete.

    Returns:
        The frame that was written last, and the objects as they were then.
    """
    pending = saved["pending"]
    now = store.annotations(saved["job"]) if pending else empty()
    track_ids = _created_track_ids(now, pending) if pending else None
    if pending is None or track_ids is None:
        return saved["done_frame"], [FollowedObject.from_json(data) for data in saved["objects"]]
    if change:
        _delete(store, saved["job"], _unchanged(pending["deleted"], now))
    after = pending["after"]
    objects = [FollowedObject.from_json(data) for data in after["objects"]]
    _represent_by_tracks(objects, pending, track_ids)
    return after["done_frame"], objects


def _create_once(store: AnnotationStore, job_id: int, pending: Json) -> list[int]:
    """Create what is pending; when the server fails, look whether it was done before repeating.

    Returns:
        Ids of the created tracks.
    """
    if not any(pending["created"][name] for name in LISTS):
        return []
    for attempt in store.retrying():
        is_repeat = attempt.retry_state.attempt_number > 1
        if is_repeat:
            track_ids = _created_track_ids(store.annotations(job_id), pending)
            if track_ids is not None:
                return track_ids
        with attempt:
            answer = store.create(job_id, pending["created"])
            break
    if is_repeat:
        _delete_doubles(store, job_id, pending, answer)
    return [track["id"] for track in answer["tracks"]]


def _delete_doubles(store: AnnotationStore, job_id: int, pending: Json, answer: Json) -> None:
    """Delete what an earlier attempt created after all, though a proxy had given it up."""
    now = store.annotations(job_id)
    doubles = empty()
    for name in LISTS:
        known = {*pending["known_ids"][name], *(obj["id"] for obj in answer[name])}
        doubles[name] = [
            obj
            for obj in now[name]
            if obj["id"] not in known
            and any(same(obj, created) for created in pending["created"][name])
        ]
    _delete(store, job_id, _as_sent(doubles))


def _unchanged(annotations: Json, now: Json) -> Json:
    """Return annotations without those that somebody has changed or deleted meanwhile."""
    return annotations | {
        name: [
            obj
            for obj in annotations[name]
            if any(other["id"] == obj["id"] and same(other, obj) for other in now[name])
        ]
        for name in LISTS
    }


def _created_track_ids(now: Json, pending: Json) -> list[int] | None:
    """Return the ids of the pending tracks, or None when nothing that is pending was created.

    The server creates all or none. A track that somebody has changed since has the id `CHANGED_ID`.
    """
    ids: dict[str, list[int]] = {}
    for name in LISTS:
        known = set(pending["known_ids"][name])
        new = [obj for obj in now[name] if obj["id"] not in known]
        ids[name] = []
        for created in pending["created"][name]:
            match = next((obj for obj in new if same(obj, created)), None)
            if match is not None:
                new.remove(match)
            ids[name].append(CHANGED_ID if match is None else match["id"])
    if all(id_ == CHANGED_ID for name in LISTS for id_ in ids[name]):
        return None
    return ids["tracks"]


def _delete(store: AnnotationStore, job_id: int, annotations: Json) -> None:
    if any(annotations[name] for name in LISTS):
        store.delete(job_id, annotations)


def _represent_by_tracks(
    objects: Sequence[FollowedObject], pending: Json, track_ids: Sequence[int]
) -> None:
    """Note for the objects which created tracks represent them."""
    done_frame = pending["after"]["done_frame"]
    for obj, index in zip(objects, pending["track_indices"], strict=True):
        if index is not None:
            track = pending["created"]["tracks"][index]
            obj.progress.represent_by_track(track, track_ids[index], done_frame)


def _add_existing(obj: FollowedObject, now: Json, deleted: Json) -> None:
    """Add what represents an object on the server to what will be deleted."""
    existing = obj.progress.existing
    content = existing and existing.find_in(now)
    if existing is not None and content is not None:
        deleted[existing.list_name].append(content)


def _as_sent(annotations: Json) -> Json:
    """Return annotations to delete as CVAT takes them: with their ids, without empty fields."""
    return annotations | {
        name: [without_ids(obj) | {"id": obj["id"]} for obj in annotations[name]] for name in LISTS
    }
