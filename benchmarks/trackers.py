"""The trackers that benchmarks compare: this function, SAM 2's predictor, a loop per object.

Each implements `TimedTracker`: `start` prompts objects on a clip's first frame and fills their
memory banks (see `memory_banks`), `step` tracks them on one further frame.
"""

from __future__ import annotations

import ast
import base64
import functools
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import sam2.sam2_video_predictor
import sam2.utils.misc
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor, SAM2VideoPredictorVOS
from tqdm import tqdm

from benchmarks.clip import FIRST_NEW_FRAME, Clip
from benchmarks.comparison import Step, TimedTracker
from benchmarks.memory_banks import copy_output, fill_memory_banks, open_store
from benchmarks.redis_traffic import RedisTraffic
from benchmarks.references import LoopObject, PerObjectLoop, decode_object, encode_object
from model_handler import inference
from model_loader import load_predictor
from settings import Settings
from shapes import Mask, encode_cvat_rle
from state_token import new_id
from testbed.functions import Replica, without_settings
from testbed.redis_server import RedisServer

TIMEOUT_S = 3600.0  # of one request; dozens of objects at full size take minutes on a CPU


class ServedFunction:
    """This repository's function: a `local_server.py` process on a Redis server.

    Args:
        environment: The function's settings; none are taken from this process's environment.
        server: The Redis server for its tracks.
        folder: Where its log file is written.
    """

    def __init__(self, environment: Mapping[str, str], server: RedisServer, folder: Path) -> None:
        self.server = server
        self._log = folder / f"function-{new_id()}.log"
        limits = {"SAM2_REQUEST_LIMIT": "86400"}
        settings = server.environment | limits | dict(environment)
        self.replica = Replica(without_settings(os.environ) | settings, log=self._log)
        self.replica.client.timeout = TIMEOUT_S
        self._traffic = RedisTraffic(server)
        self._store = open_store(server)

    def start(self, clip: Clip, objects: int) -> None:
        """See `TimedTracker.start`."""
        self.replica.wait()
        self._frames = clip.frames
        self._states = self.start_objects(clip.frames[0], clip.masks[:objects])

    def step(self, index: int) -> Step:
        """See `TimedTracker.step`."""
        before = self._traffic.read()
        ms, answer = self.post(self._frames[index], [None] * len(self._states), self._states)
        written, read = self._traffic.since(before)
        self._states = answer["states"]
        return Step(ms, answer["shapes"], written, read, self.report())

    def report(self) -> dict[str, Any]:
        """Return the function's log line of the last request."""
        return last_report(self._log.read_text())

    def close(self) -> None:
        """End the process and close the connections."""
        self._store.close()
        self._traffic.close()
        self.replica.kill()

    def start_objects(self, frame: bytes, masks: Sequence[Mask]) -> list[str]:
        """Start objects on a frame, fill their memory banks, and return their state tokens."""
        shapes = [{"type": "mask", "points": encode_cvat_rle(mask)} for mask in masks]
        _, answer = self.post(frame, shapes, [])
        return fill_memory_banks(self._store, answer["states"])

    def post(
        self, frame: bytes, shapes: list[Any], states: list[str]
    ) -> tuple[float, dict[str, Any]]:
        """Send a request; return its milliseconds, without encoding the body, and the answer."""
        image = base64.b64encode(frame).decode()
        body = json.dumps({"image": image, "shapes": shapes, "states": states}).encode()
        headers = {"Content-Type": "application/json"}
        begin = time.perf_counter()
        response = self.replica.client.post("/", content=body, headers=headers)
        ms = (time.perf_counter() - begin) * 1000
        assert response.is_success, response.text
        return ms, response.json()


class Predictor:
    """`SAM2VideoPredictor` as its authors use it: load a folder of JPEGs, then propagate.

    The time of a frame is its propagation, its share of the loading, and the thresholding of its
    logits. Holes are not filled, as in any installation of SAM 2 without its CUDA extension.
    """

    def __init__(self, model: SAM2VideoPredictor) -> None:
        self._model = model
        self._model.fill_hole_area = 0
        silent = functools.partial(tqdm, disable=True)
        sam2.sam2_video_predictor.tqdm = sam2.utils.misc.tqdm = silent

    def start(self, clip: Clip, objects: int) -> None:
        """See `TimedTracker.start`."""
        device = self._model.device
        begin = time.perf_counter()
        sam2.utils.misc.load_video_frames(
            str(clip.folder), self._model.image_size, offload_video_to_cpu=False,
            compute_device=device,
        )  # fmt: skip
        self._loading_ms = (time.perf_counter() - begin) * 1000 / len(clip.frames)
        with inference(device):
            state = self._model.init_state(str(clip.folder))
            for number, mask in enumerate(clip.masks[:objects]):
                self._model.add_new_mask(state, 0, obj_id=number, mask=mask)
            self._model.propagate_in_video_preflight(state)
        for outputs in state["output_dict_per_obj"].values():
            first = outputs["cond_frame_outputs"][0]
            outputs["non_cond_frame_outputs"] |= {
                frame: copy_output(first) for frame in range(1, FIRST_NEW_FRAME)
            }
        self._steps = self._model.propagate_in_video(state, start_frame_idx=FIRST_NEW_FRAME)

    def step(self, index: int) -> Step:
        """See `TimedTracker.step`."""
        begin = time.perf_counter()
        with inference(self._model.device):
            frame, _, logits = next(self._steps)
            masks = (logits[:, 0] > 0).cpu().numpy()
        assert frame == index
        ms = (time.perf_counter() - begin) * 1000 + self._loading_ms
        return Step(ms, masks, loading_ms=self._loading_ms)

    def close(self) -> None:
        """Drop the clip's state."""
        self._steps = None


class Loop:
    """`references.PerObjectLoop`; each object's whole state is saved to Redis after each frame."""

    def __init__(self, model: SAM2VideoPredictor, server: RedisServer) -> None:
        self._model = model
        self._loop = PerObjectLoop(model)
        self._client = server.client()
        self._traffic = RedisTraffic(server)

    def start(self, clip: Clip, objects: int) -> None:
        """See `TimedTracker.start`."""
        self._frames = clip.frames
        self._keys = [f"loop:{number}" for number in range(objects)]
        frame = self._loop.encode(Image.open(io.BytesIO(clip.frames[0])))
        for key, mask in zip(self._keys, clip.masks, strict=False):
            started = self._loop.start(frame, mask)
            count = self._model.num_maskmem
            latest = {step: copy_output(started.first) for step in range(1, count + 1)}
            filled = LoopObject(step=count, first=started.first)
            filled.latest.update(latest)
            self._client.set(key, encode_object(filled))

    def step(self, index: int) -> Step:
        """See `TimedTracker.step`."""
        before = self._traffic.read()
        begin = time.perf_counter()
        frame = self._loop.encode(Image.open(io.BytesIO(self._frames[index])))
        masks = []
        for key in self._keys:
            data = self._client.get(key)
            assert isinstance(data, bytes)
            obj = decode_object(data, self._model.device)
            masks.append(self._loop.track(frame, obj))
            self._client.set(key, encode_object(obj))
        ms = (time.perf_counter() - begin) * 1000
        written, read = self._traffic.since(before)
        return Step(ms, masks, written, read)

    def close(self) -> None:
        """Delete the tracks and close the connections."""
        self._client.delete(*self._keys)
        self._client.close()
        self._traffic.close()


def open_trackers(
    names: Sequence[str],
    environment: Mapping[str, str],
    server: RedisServer,
    folder: Path,
    stack: ExitStack,
    *,
    compiled: bool = False,
) -> dict[str, TimedTracker]:
    """Open trackers by name: `ours`, `predictor` and `loop`.

    Args:
        names: Which to open.
        environment: The function's settings; the others load the same network by them.
        server: The Redis server for the tracks.
        folder: Where log files are written.
        stack: Closes the trackers.
        compiled: Compile SAM 2's predictor, as its authors recommend for speed.
    """

    def load() -> SAM2VideoPredictor:
        return load_predictor(Settings.from_env(environment))[0]

    load_once = functools.cache(load)  # the references share a model unless one is compiled
    factories: dict[str, Callable[[], TimedTracker]] = {
        "ours": lambda: ServedFunction(environment, server, folder),
        "predictor": lambda: Predictor(compile_predictor(load()) if compiled else load_once()),
        "loop": lambda: Loop(load_once(), server),
    }
    return {name: stack.enter_context(closing(factories[name]())) for name in names}


def compile_predictor(model: SAM2VideoPredictor) -> SAM2VideoPredictor:
    """Compile a predictor as `build_sam2_video_predictor(vos_optimized=True)` does."""
    model.__class__ = SAM2VideoPredictorVOS  # its constructor adds only the next line
    model._compile_all_components()  # noqa: SLF001
    # Source: sam2_base.py, the effect of `compile_image_encoder: true` in a config
    model.image_encoder.forward = torch.compile(
        model.image_encoder.forward, mode="max-autotune", fullgraph=True, dynamic=False
    )
    return model


def last_report(log: str) -> dict[str, Any]:
    """Return the last request's log line as a dict: counts, bytes and `times_ms`."""
    line = next(line for line in reversed(log.splitlines()) if "] tracked: " in line)
    report: dict[str, Any] = ast.literal_eval(line.partition("] tracked: ")[2])
    return report
