"""The CVAT server for tests answers as CVAT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from testbed.cvat_server import TOKEN, CvatServer, Task

RECORDED = Path(__file__).parent.parent / "testbed" / "cvat_recorded.json"


def test_it_answers_what_was_recorded_from_cvat() -> None:
    """Call for call as CVAT 2.54 did, for a task of two overlapping jobs.

    Fields that nothing reads (dates, links, owners) were removed from the recording.
    """
    frames = [np.zeros((240, 320, 3), np.uint8)] * 40
    task = Task(frames, name="bedroom", file="small.mp4", segment_size=25, overlap=5, chunk_size=10)
    calls: list[dict[str, Any]] = json.loads(RECORDED.read_text())
    answered = []
    with CvatServer(task) as server:
        server.count_from(shapes=6, tracks=3, tracked=5)
        for call in calls:
            response = httpx.request(
                call["method"],
                server.url + call["path"],
                params=call["params"],
                json=call["request"],
                headers={"Authorization": f"Bearer {TOKEN}"},
            )
            answered.append((call["path"], response.status_code, response.json()))

    assert answered == [(call["path"], call["status"], call["response"]) for call in calls]


def test_a_wrong_password_is_401() -> None:
    """The form of the answer is CVAT's."""
    with CvatServer(Task([np.zeros((8, 8, 3), np.uint8)])) as server:
        response = httpx.get(f"{server.url}/api/jobs/6")

    assert response.status_code == 401
    assert response.json() == {"detail": "Invalid username/password."}
