"""The objects that a run follows through a job: what each one is, and how far its tracking is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from cvat_task.keyframes import Json, ascending
from state_token import StateToken

SOURCE = "semi-auto"  # the `source` that CVAT gives to what its own tracking makes
ListName = Literal["shapes", "tracks"]


@dataclass(frozen=True)
class TrackedPosition:
    """Where tracking found an object on a frame.

    Attributes:
        frame: The frame's number.
        points: CVAT's flat list; where the object is not visible, the last known ones.
        visible: Whether it was found.
    """

    frame: int
    points: list[float]
    visible: bool


@dataclass(frozen=True)
class ServerObject:
    """A shape or a track in a job's annotations on the server.

    Attributes:
        list_name: The list of the annotations it is in.
        id: Its id there.
        content: CVAT's JSON of it, as this run knows it.
    """

    list_name: ListName
    id: int
    content: Json

    @property
    def reference(self) -> str:
        """Return its name for annotators, `shape:12` or `track:12`."""
        return f"{self.list_name[:-1]}:{self.id}"

    def find_in(self, annotations: Json) -> Json | None:
        """Return what annotations hold under its id; None if it was deleted."""
        return next((obj for obj in annotations[self.list_name] if obj["id"] == self.id), None)


@dataclass(frozen=True)
class ObjectSpec:
    """What an object is; fixed while a run tracks it in a job.

    Attributes:
        name: For people, e.g. `shape:12 car`.
        shape_type: The shape type it is drawn with.
        is_track: Whether a track is written for it, else one shape per frame.
        template: The shape or track it began as, a track without its keyframes. What is written
            has its label, group and attributes.
        initial_keyframe: The keyframe it began with in this job, or the one where it was last seen
            in the job before. Its `occluded`, `z_order` and attributes hold where no keyframe does.
        earlier_shapes_per_frame: Shapes of its group, label and type on the first frame, if that
            group existed before the run; 0 if no earlier run has left shapes to replace.
    """

    name: str
    shape_type: str
    is_track: bool
    template: Json
    initial_keyframe: Json
    earlier_shapes_per_frame: int = 0


@dataclass
class ObjectProgress:
    """How far the tracking of an object in a job is.

    Attributes:
        existing: What represents it on the server; None while nothing does, and when it is
            represented by one shape per frame.
        keyframes: Keyframes of its track, ascending; those of `existing` or of the job before. An
            object that is drawn as a shape has one.
        done_keyframe: Its keyframe on the frame that was written last; None before it is seen in
            this job.
        last_seen: Where it was found last.
        group: The group that its shapes share; 0 is none.
        unwritten: What was found and is not written yet, in tracking order.
        shared: What was found on frames that the next job has too.
        token: State token to continue it from; None before this process has tracked it.
    """

    existing: ServerObject | None
    keyframes: list[Json]
    done_keyframe: Json | None
    last_seen: TrackedPosition
    group: int
    unwritten: list[TrackedPosition] = field(default_factory=list)
    shared: list[TrackedPosition] = field(default_factory=list)
    token: StateToken | None = None

    @property
    def has_track(self) -> bool:
        """Whether a track represents it on the server."""
        return self.existing is not None and self.existing.list_name == "tracks"

    def record(
        self, frame: int, points: Sequence[float] | None, *, is_shared: bool = False
    ) -> None:
        """Add what was found on a frame.

        Args:
            frame: The frame's number.
            points: CVAT's flat list; None: the object was not found.
            is_shared: Whether the next job has this frame too.
        """
        found = TrackedPosition(frame, list(points or self.last_seen.points), points is not None)
        self.unwritten.append(found)
        if is_shared:
            self.shared.append(found)
        if found.visible:
            self.last_seen = found

    def continue_from(self, token: StateToken) -> None:
        """Note the state token that the next frame continues from."""
        self.token = token

    def use_group(self, group: int) -> None:
        """Give its shapes a group."""
        self.group = group

    def mark_written(self) -> None:
        """Forget what was found: it is written, or about to be and in the journal."""
        self.unwritten = []

    def represent_by_shapes(self) -> None:
        """Note that one shape per frame represents it from now on."""
        self.existing = None

    def represent_by_track(self, track: Json, track_id: int, done_frame: int) -> None:
        """Note that a track represents it from now on, and which keyframe to go on from."""
        self.existing = ServerObject("tracks", track_id, track)
        self.keyframes = ascending(track["shapes"])
        self.done_keyframe = next(
            (keyframe for keyframe in self.keyframes if keyframe["frame"] == done_frame), None
        )


@dataclass(frozen=True)
class FollowedObject:
    """An object that a run follows through a job."""

    spec: ObjectSpec
    progress: ObjectProgress

    def to_json(self) -> Json:
        """Return what a journal keeps.

        It has neither the state token nor a track that is on the server: `resume` reads it there.
        """
        progress = self.progress
        existing = progress.existing
        return {
            "spec": asdict(self.spec),
            "progress": {
                "existing": existing and {"list_name": existing.list_name, "id": existing.id},
                "keyframes": [] if progress.has_track else progress.keyframes,
                "done_keyframe": None if progress.has_track else progress.done_keyframe,
                "last_seen": asdict(progress.last_seen),
                "group": progress.group,
                "unwritten": [asdict(position) for position in progress.unwritten],
                "shared": [asdict(position) for position in progress.shared],
            },
        }

    @classmethod
    def from_json(cls, data: Json) -> FollowedObject:
        """Read what `to_json` returned; `resume` completes it from the server."""
        spec = ObjectSpec(**data["spec"])
        fields = dict(data["progress"])
        if fields["existing"] is not None:
            fields["existing"] = ServerObject(**fields["existing"], content=spec.template)
        fields["last_seen"] = TrackedPosition(**fields["last_seen"])
        for name in ("unwritten", "shared"):
            fields[name] = [TrackedPosition(**position) for position in fields[name]]
        return cls(spec, ObjectProgress(**fields))


def without_keyframes(track: Json) -> Json:
    """Return a track's label, group, attributes and so on: all of its JSON but the keyframes."""
    return {name: value for name, value in track.items() if name != "shapes"}
