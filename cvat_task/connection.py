"""Talk to a CVAT server through `cvat-sdk`: jobs, chunks of frames, annotations, errors.

Answers stay CVAT's own JSON: the SDK's models check every single number, which is slow, and may not
fit the answers of another CVAT version.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import urllib3
from cvat_sdk.core.auth import make_client_from_cli
from cvat_sdk.core.client import Client
from cvat_sdk.core.exceptions import CvatSdkException
from cvat_sdk.exceptions import ApiException, OpenApiException
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from cvat_task.job import Job, Label
from cvat_task.keyframes import Json
from errors import BadRequestError, TrackerError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0  # the server may have to make a chunk first
# Answers of a server that is too busy to make a chunk, restarts, or is lost to its proxy.
TEMPORARY_STATUSES = {429, 500, 502, 503, 504}
ATTEMPTS = 5
RETRY_WAIT = wait_exponential(multiplier=1, exp_base=3)  # 1, 3, 9 and 27 seconds


# What OpenSSL says, by its version, when a server answers a TLS greeting with plain HTTP.
NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


class CvatError(TrackerError):
    """The server does not do what was asked; `exit_code` is the command's, for scripts."""

    exit_code: ClassVar[int] = 1


class LoginError(CvatError):
    """The server does not take the credentials."""

    exit_code = 3


class NotFoundOnServerError(CvatError):
    """There is no such job or task, or it is not shown to this user."""

    exit_code = 4


class ForbiddenError(CvatError):
    """This user may not do that."""

    exit_code = 5


class ServerUnavailableError(CvatError):
    """The server cannot be reached, or fails."""

    exit_code = 6


class CertificateError(CvatError):
    """The server's certificate is not trusted."""

    exit_code = 7


class RejectedError(CvatError):
    """The server rejects what was sent as wrong."""

    exit_code = 8


class CvatConnection:
    """A CVAT server, logged in.

    Args:
        options: What `cvat_sdk.core.auth.configure_client_auth_arguments` reads from the command
            line.
        pause: Waits some seconds before a request is repeated.

    Raises:
        CvatError: It cannot be reached or does not take the credentials.
    """

    def __init__(
        self, options: argparse.Namespace, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._pause = pause
        with _translated("log in"):
            _check_reachable(options)
            self._client: Client = make_client_from_cli(options)
        # `retrying` decides about repeats; the SDK's own would hide the status.
        pools = self._client.api_client.rest_client.pool_manager
        pools.connection_pool_kw["retries"] = urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=3
        )
        pools.clear()
        self.url = str(self._client.api_client.configuration.host)
        self._validation_modes: dict[int, str | None] = {}  # by task

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def job(self, job_id: int) -> Job:
        """Return a job.

        Raises:
            CvatError: There is no job with this id, or it cannot be read.
            BadRequestError: It has no two-dimensional frames.
        """
        job = self._json("GET", f"/api/jobs/{job_id}")
        if job["dimension"] != "2d":
            raise BadRequestError(f"job {job_id} is {job['dimension']}: only 2d is tracked")
        meta = self._json("GET", f"/api/jobs/{job_id}/data/meta")
        step = int(meta["frame_filter"].partition("step=")[2] or 1)
        count = job["stop_frame"] - job["start_frame"] + 1
        # Numbers in the file; a task with a frame step has only every step-th frame of it.
        numbers = meta["included_frames"] or range(
            meta["start_frame"], meta["start_frame"] + count * step, step
        )
        frames = sorted(
            job["start_frame"] + (number - meta["start_frame"]) // step for number in numbers
        )
        sizes_hw = [(frame["height"], frame["width"]) for frame in meta["frames"]]
        if len(sizes_hw) > 1:  # also of the frames that a ground-truth job leaves out
            sizes_hw = [sizes_hw[frame - job["start_frame"]] for frame in frames]
        has_honeypots = self._validation_mode(job["task_id"]) == "gt_pool"
        honeypots = (
            self._json("GET", f"/api/jobs/{job_id}/validation_layout").get("honeypot_frames", [])
            if has_honeypots
            else []
        )
        return Job(
            id=job_id,
            task_id=job["task_id"],
            frames=tuple(frames),
            deleted=frozenset(meta["deleted_frames"]),
            honeypots=frozenset(honeypots),
            sizes_hw=tuple(sizes_hw),
            chunk_size=meta["chunk_size"],
            is_video=job["data_original_chunk_type"] == "video",
            tracks_allowed=not has_honeypots,
            labels={
                label["id"]: Label(
                    label["name"],
                    frozenset(spec["id"] for spec in label["attributes"] if spec["mutable"]),
                )
                for label in self._pages("/api/labels", job_id=job_id)
            },
        )

    def task_jobs(self, task_id: int) -> list[int]:
        """Return the ids of a task's annotation jobs, by their first frame.

        Raises:
            CvatError: There is no such task, or it cannot be read.
        """
        self._json("GET", f"/api/tasks/{task_id}")  # a list of no jobs would not say why
        jobs = [
            job for job in self._pages("/api/jobs", task_id=task_id) if job["type"] == "annotation"
        ]
        return [job["id"] for job in sorted(jobs, key=lambda job: int(job["start_frame"]))]

    def chunk(self, job_id: int, index: int) -> bytes:
        """Return the original-quality chunk of a job, counted from 0 in each job."""
        query = {"type": "chunk", "quality": "original", "index": index}
        return self._call("GET", f"/api/jobs/{job_id}/data", query)

    def annotations(self, job_id: int) -> Json:
        """Return all annotations of a job."""
        return self._json("GET", f"/api/jobs/{job_id}/annotations")

    def create(self, job_id: int, annotations: Json) -> Json:
        """Add annotations, all or none, and return them with their ids.

        It is not repeated when the server fails: the server may have added them all the same.
        """
        path = f"/api/jobs/{job_id}/annotations"
        body = self._call_once("PATCH", path, {"action": "create"}, annotations)
        return _decoded(body, path)

    def delete(self, job_id: int, annotations: Json) -> None:
        """Delete annotations by their ids; those that are deleted already do not matter."""
        path = f"/api/jobs/{job_id}/annotations"
        self._call("PATCH", path, {"action": "delete"}, annotations)

    def retrying(self) -> Retrying:
        """Return how often and with which pauses a call of a failing server is repeated."""
        return Retrying(
            retry=retry_if_exception_type(ServerUnavailableError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=RETRY_WAIT,
            sleep=self._pause,
            reraise=True,
        )

    def _validation_mode(self, task_id: int) -> str | None:
        if task_id not in self._validation_modes:
            try:
                mode = self._json("GET", f"/api/tasks/{task_id}").get("validation_mode")
            except (
                ForbiddenError,
                NotFoundOnServerError,
            ):  # an annotator of the job may not see its task
                mode = None
            self._validation_modes[task_id] = mode
        return self._validation_modes[task_id]

    def _json(self, method: str, path: str, query: dict[str, Any] | None = None) -> Json:
        return _decoded(self._call(method, path, query or {}), path)

    def _pages(self, path: str, **query: int) -> Iterator[Json]:
        page = 1
        while True:
            answer = self._json("GET", path, {**query, "page": page})
            yield from answer["results"]
            if not answer["next"]:
                return
            page += 1

    def _call(
        self, method: str, path: str, query: dict[str, Any], body: Json | None = None
    ) -> bytes:
        return self.retrying()(self._call_once, method, path, query, body)

    def _call_once(self, method: str, path: str, query: dict[str, Any], body: Json | None) -> bytes:
        with _translated(f"{method} {path}"):
            _, response = self._client.api_client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "application/vnd.cvat+json, */*"},
                body=body,
                _parse_response=False,
                _check_status=False,
                _request_timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S),
            )
            data = bytes(response.data)
        if not 200 <= response.status < 300:
            raise _error_for(response.status, data, path)
        return data


def _check_reachable(options: argparse.Namespace) -> None:
    """Connect to the server and let go: the SDK has no time limit for logging in.

    Where no server is named, the SDK takes that of a saved profile, which needs no logging in.
    """
    if options.server_host is None:
        return
    url = urllib3.util.parse_url(options.server_host)
    port = getattr(options, "server_port", None) or url.port
    port = port or (80 if url.scheme == "http" else 443)  # the SDK's default is HTTPS
    try:
        socket.create_connection(((url.host or "").strip("[]"), port), CONNECT_TIMEOUT_S).close()
    except OSError as err:
        raise ServerUnavailableError(
            f"the server does not answer ({err}): check its address, run this again"
        ) from err


def _decoded(body: bytes, path: str) -> Json:
    try:
        answer: Json = json.loads(body)
    except ValueError as err:
        raise ServerUnavailableError(
            f"{path}: the answer is not JSON: is this a CVAT server?"
        ) from err
    return answer


def _error_for(status: int, body: bytes, path: str) -> CvatError:
    reason = body.decode(errors="replace").strip()[:300]
    try:
        answer = json.loads(body)
        reason = str(answer.get("detail", answer) if isinstance(answer, dict) else answer)
    except ValueError:
        pass
    reason = " ".join(reason.split()) or f"status {status}"
    if status == 401:
        return LoginError(f"the server does not let you in ({reason}): check user, password, token")
    if status == 403:
        return ForbiddenError(
            f"{path}: you may not do this ({reason}): ask for the job to be assigned to you, or "
            "name its organisation with --org"
        )
    if status == 404:
        return NotFoundOnServerError(
            f"{path} is not there ({reason}): check the number, or name its organisation with --org"
        )
    if status in TEMPORARY_STATUSES:
        return ServerUnavailableError(
            f"{path}: the server failed with {status} ({reason[:100]}): see its log, run this again"
        )
    return RejectedError(f"{path}: the server refused it with {status} ({reason})")


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Translate the errors of the SDK and of its HTTP client."""
    try:
        yield
    except ApiException as err:
        if err.status == 400 and what == "log in":
            raise LoginError(
                "the server does not let you in (wrong user or password): see --auth and --profile"
            ) from err
        raise _error_for(err.status or 0, str(err.body or err.reason).encode(), what) from err
    except urllib3.exceptions.HTTPError as err:
        cause = getattr(err, "reason", None) or err
        if isinstance(cause, urllib3.exceptions.SSLError):
            if any(sign in str(cause) for sign in NO_TLS):
                raise ServerUnavailableError(
                    "the server speaks http, not https: begin its address with http://"
                ) from err
            raise CertificateError(
                f"the server's certificate is not trusted ({cause}): name its authority's file in "
                "SSL_CERT_FILE, or switch the check off with --insecure"
            ) from err
        text = str(cause).rpartition(": ")[2]
        raise ServerUnavailableError(
            f"the server does not answer ({text}): check its address, run this again"
        ) from err
    except OpenApiException as err:
        raise ServerUnavailableError(
            f"{what}: this is not how a CVAT server answers: {err}"
        ) from err
    except CvatSdkException as err:
        raise LoginError(str(err)) from err
