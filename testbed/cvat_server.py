"""A CVAT server for tests: one task with its jobs, frames and annotations, over HTTP.

It stores annotations as CVAT 2.54 does, and its answers have the form of those recorded from CVAT
2.54 (`cvat_recorded.json`; `test_cvat_server.py` replays them). The test makes the frames.
Chunks of videos are lossless, so that every decoder gives the same pixels.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import ssl
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Json = dict[str, Any]

USER, PASSWORD, TOKEN = "annotator", "right", "token-of-annotator"
LABELS = [
    {
        "id": 6,
        "name": "child",
        "color": "#4221e0",
        "attributes": [
            {
                "id": 1,
                "name": "age",
                "mutable": False,
                "input_type": "select",
                "default_value": "small",
                "values": ["small", "big"],
            }
        ],
        "type": "any",
    },
    {"id": 7, "name": "bed", "color": "#8080c0", "attributes": [], "type": "polygon"},
]
MUTABLE = {
    "id": 2,
    "name": "pose",
    "mutable": True,
    "input_type": "select",
    "default_value": "standing",
    "values": ["standing", "jumping"],
}
PAGE_SIZE = 10  # as CVAT's


class Refusal(Exception):  # noqa: N818  # an answer, not a fault
    """Makes the server answer with an error status."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        method: GET, PATCH, ...
        path: Without the query.
        query: Its parameters.
        body: Decoded JSON.
        headers: By lower-case name.
    """

    method: str
    path: str
    query: dict[str, str]
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def is_(self, action: str) -> bool:
        """Tell whether it creates or deletes annotations."""
        return self.method == "PATCH" and self.query.get("action") == action


@dataclass
class Task:
    """The task that the server has.

    Attributes:
        frames: The task's frames, as its annotations count them.
        name: The task's name.
        file: Name of the video it was made from.
        id: The task's id.
        job_ids: Ids of its jobs, by their first frames.
        segment_size: Frames per job; None means one job with all.
        overlap: Frames that a job shares with the one before it.
        chunk_size: Frames per chunk.
        video: Whether it was made from a video: chunks are MP4, else ZIP files with images.
        start: The file's number of the first frame.
        step: The task has only every step-th frame of the file.
        deleted: Deleted frames.
        included: The frames that its only job has, as a ground-truth job; None means all.
        honeypots: Frames that show another frame; any make the task's validation mode `gt_pool`.
        labels: The task's labels.
    """

    frames: Sequence[Picture]
    name: str = "clip"
    file: str = "clip.mp4"
    id: int = 6
    job_ids: Sequence[int] = (6, 7, 8, 9)
    segment_size: int | None = None
    overlap: int = 0
    chunk_size: int = 4
    video: bool = True
    start: int = 0
    step: int = 1
    deleted: Sequence[int] = ()
    included: Sequence[int] | None = None
    honeypots: Sequence[int] = ()
    labels: list[Json] = field(default_factory=lambda: copy.deepcopy(LABELS))

    def ranges(self) -> dict[int, range]:
        """Return the frames of each job."""
        size = self.segment_size or len(self.frames)
        starts = range(0, max(1, len(self.frames) - self.overlap), size - self.overlap)
        return {
            job: range(start, min(start + size, len(self.frames)))
            for job, start in zip(self.job_ids, starts, strict=False)
        }


class CvatServer:
    """The server; use it as a context.

    Attributes:
        calls: All requests, in order.
        before: Called before a request is served; a `Refusal` that it raises is the answer.
        after: Called when a request was served and before it is answered; may raise `Refusal` too.
        refuse: By path, a status and body to answer instead.
        raw: By path, bytes to answer instead, with status 200.
        chunks: The chunks made so far, by job and index.
    """

    def __init__(self, task: Task, certificate: Path | None = None) -> None:
        self.task = task
        self.calls: list[Call] = []
        self.before: Callable[[Call], None] = lambda _: None
        self.after: Callable[[Call], None] = lambda _: None
        self.refuse: dict[str, tuple[int, object]] = {}
        self.raw: dict[str, bytes] = {}
        self.data: dict[int, Json] = {job: _empty() for job in task.ranges()}
        self._ids = {name: itertools.count(1) for name in ("tags", "shapes", "tracks", "tracked")}
        self.chunks: dict[tuple[int, int], bytes] = {}
        self._lock = threading.RLock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are sent as two packets

            def do_GET(self) -> None:
                server._serve(self)

            do_POST = do_PATCH = do_PUT = do_GET  # noqa: N815  # names of the base class

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._http.server_address[1]}"
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client was killed
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    # -------------------------------------------------------------- what tests do

    def count_from(self, **first: int) -> None:
        """Set the ids of the next shape, track and tracked shape."""
        self._ids |= {name: itertools.count(number) for name, number in first.items()}

    def add(self, job: int, kind: str, **fields: Any) -> int:
        """Add a shape or track, as an annotator does, and return its id."""
        with self._lock:
            created = self.create(job, _empty() | {kind: [fields]})
        id_: int = created[kind][0]["id"]
        return id_

    def remove(self, job: int, kind: str, id_: int) -> None:
        """Delete a shape or track, as an annotator does."""
        with self._lock:
            self.data[job][kind] = [obj for obj in self.data[job][kind] if obj["id"] != id_]

    def shapes(self, job: int, **fields: Any) -> list[Json]:
        """Return a job's shapes with these fields, by frame."""
        return self._select(job, "shapes", fields)

    def tracks(self, job: int, **fields: Any) -> list[Json]:
        """Return a job's tracks with these fields, keyframes by frame."""
        return self._select(job, "tracks", fields)

    def _select(self, job: int, kind: str, fields: Json) -> list[Json]:
        objects = [
            obj
            for obj in self.annotations(job)[kind]
            if all(obj[name] == value for name, value in fields.items())
        ]
        return sorted(objects, key=lambda obj: (obj["frame"], obj["id"]))

    def frame(self, number: int) -> Picture:
        """Return a frame as it is shown."""
        return self.task.frames[number]

    # -------------------------------------------------------------- HTTP

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        length = int(handler.headers.get("Content-Length") or 0)
        raw = handler.rfile.read(length)
        call = Call(
            handler.command,
            parts.path,
            dict(parse_qsl(parts.query)),
            json.loads(raw) if raw else None,
            {name.lower(): value for name, value in handler.headers.items()},
        )
        cookies: list[str] = []
        try:
            self.calls.append(call)
            self.before(call)
            if call.path in self.refuse:
                raise Refusal(*self.refuse[call.path])  # noqa: TRY301  # as every other refusal
            if call.path == "/api/auth/login":
                self._log_in(call.body)
                cookies = ["sessionid=session-1; Path=/", "csrftoken=csrf-1; Path=/"]
                status, kind, body = 200, "application/vnd.cvat+json", b'{"key": "key-1"}'
            else:
                self._check_login(call, handler)
                status, kind, body = self._route(call)
                body = self.raw.get(call.path, body)
            self.after(call)
        except Refusal as refusal:
            status, kind = refusal.status, "application/vnd.cvat+json"
            body = json.dumps(refusal.body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        for cookie in cookies:
            handler.send_header("Set-Cookie", cookie)
        handler.end_headers()
        handler.wfile.write(body)

    def _log_in(self, body: Json) -> None:
        if (body.get("username"), body.get("password")) != (USER, PASSWORD):
            raise Refusal(
                400, {"non_field_errors": ["Unable to log in with provided credentials."]}
            )

    def _check_login(self, call: Call, handler: BaseHTTPRequestHandler) -> None:
        by_token = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        by_session = "sessionid=session-1" in handler.headers.get("Cookie", "")
        if not by_token and not by_session:
            raise Refusal(401, {"detail": "Invalid username/password."})
        if by_session and call.method != "GET" and handler.headers.get("X-CSRFTOKEN") != "csrf-1":
            raise Refusal(403, {"detail": "CSRF Failed: CSRF token missing."})

    def _route(self, call: Call) -> tuple[int, str, bytes]:
        match call.path.strip("/").split("/")[1:]:
            case ["jobs", number, "data"]:
                return self._data(int(number), call.query)
            case parts:
                with self._lock:
                    answer = json.dumps(self._answer(parts, call)).encode()
                return 200, "application/vnd.cvat+json", answer

    def _answer(self, parts: list[str], call: Call) -> Any:  # noqa: C901, PLR0911, PLR0912  # one case per address
        match call.method, parts:
            case "GET", ["server", "about"]:
                return {"name": "Computer Vision Annotation Tool", "version": "2.54.1"}
            case "GET", ["tasks", number] if int(number) == self.task.id:
                return self._task()
            case "GET", ["tasks", _]:
                raise Refusal(404, {"detail": "No Task matches the given query."})
            case "GET", ["jobs"]:
                newest_first = [self._job(job) for job in reversed(self.data)]
                return _page(newest_first, call.query)
            case "GET", ["labels"]:
                extra = {"sublabels": [], "task_id": self.task.id, "parent_id": None}
                return _page(
                    [label | extra | {"has_parent": False} for label in self.task.labels],
                    call.query,
                )
        job = int(parts[1])
        if parts[0] != "jobs" or job not in self.data:
            raise Refusal(404, {"detail": "No Job matches the given query."})
        match call.method, parts[2:]:
            case "GET", []:
                return self._job(job)
            case "GET", ["data", "meta"]:
                return self._meta(job)
            case "GET", ["validation_layout"]:
                honeypots = [
                    frame for frame in self.task.honeypots if frame in self.task.ranges()[job]
                ]
                return {
                    "honeypot_count": len(honeypots),
                    "honeypot_frames": honeypots,
                    "honeypot_real_frames": [0] * len(honeypots),
                }
            case "GET", ["annotations"]:
                return self.annotations(job)
            case "PUT", ["annotations"]:
                before, self.data[job] = self.data[job], _empty()
                try:
                    return self.create(job, call.body)
                except Refusal:
                    self.data[job] = before
                    raise
            case "PATCH", ["annotations"] if call.query["action"] == "create":
                return self.create(job, call.body)
            case "PATCH", ["annotations"] if call.query["action"] == "delete":
                return self._delete(job, call.body)
        raise Refusal(405, {"detail": f'Method "{call.method}" not allowed.'})

    # -------------------------------------------------------------- task, jobs, frames

    def _task(self) -> Json:
        return {
            "id": self.task.id,
            "name": self.task.name,
            "project_id": None,
            "mode": "interpolation" if self.task.video else "annotation",
            "overlap": self.task.overlap,
            "segment_size": self.task.segment_size or len(self.task.frames),
            "data_chunk_size": self.task.chunk_size,
            "data_original_chunk_type": "video" if self.task.video else "imageset",
            "size": len(self.task.frames),
            "dimension": "2d",
            "organization": None,
            "validation_mode": "gt_pool" if self.task.honeypots else None,
        }

    def _job(self, job: int) -> Json:
        frames = self.task.ranges()[job]
        return {
            "id": job,
            "task_id": self.task.id,
            "project_id": None,
            "dimension": "2d",
            "stage": "annotation",
            "state": "new",
            "mode": "interpolation" if self.task.video else "annotation",
            "frame_count": len(frames),
            "start_frame": frames[0],
            "stop_frame": frames[-1],
            "data_chunk_size": self.task.chunk_size,
            "data_original_chunk_type": "video" if self.task.video else "imageset",
            "organization": None,
            "type": "annotation",
        }

    def _meta(self, job: int) -> Json:
        frames = self.task.ranges()[job]
        pictures = (
            [self.task.frames[0]] if self.task.video else [self.task.frames[i] for i in frames]
        )
        return {
            "chunk_size": self.task.chunk_size,
            "size": len(frames),
            "start_frame": self.task.start + frames[0] * self.task.step,
            "stop_frame": self.task.start + frames[-1] * self.task.step,
            "frame_filter": f"step={self.task.step}" if self.task.step > 1 else "",
            "frames": [
                {
                    "width": picture.shape[1],
                    "height": picture.shape[0],
                    "name": self.task.file if self.task.video else f"{index}.png",
                    "related_files": 0,
                    "has_related_context": False,
                }
                for index, picture in enumerate(pictures)
            ],
            "deleted_frames": [frame for frame in self.task.deleted if frame in frames],
            "included_frames": self.task.included
            and [self.task.start + frame * self.task.step for frame in self.task.included],
        }

    def _data(self, job: int, query: dict[str, str]) -> tuple[int, str, bytes]:
        frames = self.task.included or self.task.ranges()[job]
        if query["type"] == "frame":
            number = int(query["number"])
            if number not in frames:
                raise Refusal(400, f"Incorrect requested frame number: {number}")
            return 200, "image/png", _png(self.frame(number))
        index = int(query["index"])
        if (job, index) not in self.chunks:
            size = self.task.chunk_size
            pictures = [self.frame(number) for number in frames[index * size : (index + 1) * size]]
            make = encode_video if self.task.video else _archive
            self.chunks[job, index] = make(pictures)
        kind = "video/mp4" if self.task.video else "application/zip"
        return 200, kind, self.chunks[job, index]

    # -------------------------------------------------------------- annotations

    def annotations(self, job: int) -> Json:
        """Return a job's annotations: numbers as floats, attributes complete."""
        with self._lock:
            answer = copy.deepcopy(self.data[job])
        for shape in answer["shapes"]:
            _numbers_as_floats(shape)
            shape |= {"description": None, "needs_review": None}
            self._complete(shape, ("mutable", "fixed"), [])
        for track in answer["tracks"]:
            self._complete(track, ("fixed",), [])
            track["shapes"].sort(key=lambda key: key["frame"])
            before: list[Json] = []
            for key in track["shapes"]:
                _numbers_as_floats(key)
                self._complete(key, ("mutable",), before, track["label_id"])
                before = key["attributes"]
        return answer

    def _complete(
        self, obj: Json, kinds: Sequence[str], before: list[Json], label_id: int | None = None
    ) -> None:
        """Add missing attributes: as on the keyframe before, else the default value.

        Args:
            obj: A shape, a track or a keyframe; changed.
            kinds: Which attributes it has: `mutable`, `fixed` or both.
            before: Attributes of the keyframe before.
            label_id: The track's label, for a keyframe.
        """
        label = next(
            each
            for each in self.task.labels
            if each["id"] == label_id or obj.get("label_id") == each["id"]
        )
        values = {each["spec_id"]: each["value"] for each in before}
        existing = {each["spec_id"] for each in obj["attributes"]}
        for spec in label["attributes"]:
            kind = "mutable" if spec["mutable"] else "fixed"
            if kind in kinds and spec["id"] not in existing:
                value = values.get(spec["id"], spec["default_value"])
                obj["attributes"].append({"spec_id": spec["id"], "value": value})

    def create(self, job: int, body: Json) -> Json:
        """Add annotations, all or none, and return them with ids."""
        new = {name: copy.deepcopy(body.get(name) or []) for name in ("tags", "shapes", "tracks")}
        if new["tracks"] and self.task.honeypots:
            raise Refusal(400, ["Tracks are not supported when task validation mode is gt_pool"])
        self._check(new)
        created = {
            "tags": [],
            "shapes": [self._new_shape(shape) for shape in new["shapes"]],
            "tracks": [self._new_track(track) for track in new["tracks"]],
        }
        for name, objects in created.items():
            self.data[job][name] += copy.deepcopy(objects)
        return {"version": 0, **created}

    def _check(self, new: Json) -> None:
        known = {label["id"]: label for label in self.task.labels}
        for obj in [*new["shapes"], *new["tracks"]]:
            if "id" in obj:
                raise Refusal(400, ["a new object with an id would overwrite another object"])
            if obj["label_id"] not in known:
                raise Refusal(400, [f"label_id `{obj['label_id']}` is invalid"])
            if any(value is None for value in obj.values()):
                raise Refusal(400, ["This field may not be null."])
        for track in new["tracks"]:
            mutable = {a["id"] for a in known[track["label_id"]]["attributes"] if a["mutable"]}
            if any(a["spec_id"] in mutable for a in track.get("attributes", [])):
                raise Refusal(400, ["spec_id of a mutable attribute is invalid in a track"])
            if any(
                a["spec_id"] not in mutable
                for key in track["shapes"]
                for a in key.get("attributes", [])
            ):
                raise Refusal(400, ["spec_id of an immutable attribute is invalid in a keyframe"])
            numbers = [key["frame"] for key in track["shapes"]]
            if len(set(numbers)) != len(numbers) or not numbers:
                raise Refusal(500, "two keyframes on one frame, or none")

    def _new_shape(self, shape: Json) -> Json:
        defaults = _keyframe_defaults() | {
            "group": 0,
            "source": "manual",
            "description": "",
            "needs_review": False,
            "attributes": [],
            "elements": [],
        }
        return defaults | shape | {"id": next(self._ids["shapes"])}

    def _new_track(self, track: Json) -> Json:
        keyframes = [
            _keyframe_defaults() | {"attributes": []} | key | {"id": next(self._ids["tracked"])}
            for key in track["shapes"]
        ]
        defaults = {"group": 0, "source": "manual", "attributes": [], "elements": []}
        return defaults | track | {"id": next(self._ids["tracks"]), "shapes": keyframes}

    def _delete(self, job: int, body: Json) -> Json:
        for name in ("shapes", "tracks"):
            ids = {obj["id"] for obj in body.get(name) or []}
            self.data[job][name] = [obj for obj in self.data[job][name] if obj["id"] not in ids]
        return {
            "version": 0,
            **{name: body.get(name) or [] for name in ("tags", "shapes", "tracks")},
        }


def _empty() -> Json:
    return {"version": 0, "tags": [], "shapes": [], "tracks": []}


def _keyframe_defaults() -> Json:
    return {"occluded": False, "outside": False, "z_order": 0, "rotation": 0}


def _numbers_as_floats(shape: Json) -> None:
    """Change a shape's or keyframe's numbers to what CVAT answers."""
    shape["points"] = [float(value) for value in shape["points"]]
    shape["rotation"] = float(shape["rotation"])


def _page(items: list[Json], query: dict[str, str]) -> Json:
    page = int(query.get("page", 1))
    end = page * PAGE_SIZE
    following = f"http://cvat.example/?page={page + 1}" if end < len(items) else None
    return {
        "count": len(items),
        "next": following,
        "previous": None,
        "results": items[end - PAGE_SIZE : end],
    }


def _png(picture: Picture) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()


def _archive(pictures: Sequence[Picture]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for index, picture in enumerate(pictures):
            archive.writestr(f"{index:06d}.png", _png(picture))
    return file.getvalue()


def encode_video(pictures: Sequence[Picture], codec: str = "FFV1") -> bytes:
    """Return an MP4, by default with a lossless codec."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        height, width = pictures[0].shape[:2]
        writer = cv2.VideoWriter(file.name, cv2.VideoWriter.fourcc(*codec), 25, (width, height))
        for picture in pictures:
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        writer.release()
        return Path(file.name).read_bytes()
