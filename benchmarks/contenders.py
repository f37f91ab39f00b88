"""Owns who is measured: the function behind HTTP and Redis, SAM 2's predictor, a loop per object.

Each starts objects on a clip's first frame and then finds them on one frame at a time, so that
several can be asked in turn. Starting also fills the memory bank, seven memories and sixteen
pointers, with copies of what the first frame left: what is in it changes no time, and to track
fifteen frames only to fill it would take longer than to measure.
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
from benchmarks.references import LoopObject, PerObjectLoop, decode_object, encode_object
from benchmarks.turns import Contender, Step
from model_handler import inference
from model_loader import load_predictor
from settings import RedisSettings, Settings
from shapes import Mask, encode_cvat_rle
from state_store import RedisStateStore, StepWrite, connect
from state_token import StateToken, new_id
from testbed.functions import Replica
from testbed.redis_server import RedisServer
from track_state import POINTER_REACH, decode_memory, decode_state, encode_memory, encode_state

TIMEOUT_S = 3600.0  # of one request; dozens of objects at full size take minutes on a CPU


class Function:
    """This repository's function: a `local_server.py` process on a Redis server.

    Args:
        environment: Its settings; nothing else of ours is set.
        server: Keeps its tracks.
        folder: Where its log goes.
    """

    def __init__(self, environment: Mapping[str, str], server: RedisServer, folder: Path) -> None:
        self.server = server
        self._log = folder / f"function-{new_id()}.log"
        others = {k: v for k, v in os.environ.items() if not k.startswith(("SAM2_", "CVAT_"))}
        limits = {"SAM2_REQUEST_LIMIT": "86400"}
        self.replica = Replica(
            others | server.environment | limits | dict(environment), log=self._log
        )
        self.replica.client.timeout = TIMEOUT_S
        self._traffic = Traffic(server)
        self._store = open_store(server)

    def start(self, clip: Clip, objects: int) -> None:
        """See `Contender.start`."""
        self.replica.wait()
        self._frames = clip.frames
        self._states = self.begin(clip.frames[0], clip.masks[:objects])

    def step(self, index: int) -> Step:
        """See `Contender.step`."""
        before = self._traffic.read()
        ms, answer = self.post(self._frames[index], [None] * len(self._states), self._states)
        written, read = self._traffic.since(before)
        self._states = answer["states"]
        return Step(ms, answer["shapes"], written, read, self.report())

    def report(self) -> dict[str, Any]:
        """Return the log line of the last request."""
        return last_report(self._log.read_text())

    def close(self) -> None:
        """End the process."""
        self._store.close()
        self._traffic.close()
        self.replica.kill()

    def begin(self, frame: bytes, masks: Sequence[Mask]) -> list[str]:
        """Start objects on a frame, fill their memory banks, and return their states."""
        shapes = [{"type": "mask", "points": encode_cvat_rle(mask)} for mask in masks]
        _, answer = self.post(frame, shapes, [])
        return fill_banks(self._store, answer["states"])

    def post(
        self, frame: bytes, shapes: list[Any], states: list[str]
    ) -> tuple[float, dict[str, Any]]:
        """Send a request; return milliseconds and answer, the caller's own work left out."""
        image = base64.b64encode(frame).decode()
        body = json.dumps({"image": image, "shapes": shapes, "states": states}).encode()
        headers = {"Content-Type": "application/json"}
        begin = time.perf_counter()
        response = self.replica.client.post("/", content=body, headers=headers)
        ms = (time.perf_counter() - begin) * 1000
        assert response.is_success, response.text
        return ms, response.json()


class Predictor:
    """`SAM2VideoPredictor` as its makers use it: JPEGs of a folder loaded at once, then a loop.

    Its time for a frame is that of the loop, a share of the loading, and the thresholding of its
    scores. It fills no holes, as wherever its CUDA extension was not built.
    """

    def __init__(self, model: SAM2VideoPredictor) -> None:
        self._model = model
        self._model.fill_hole_area = 0
        quiet = functools.partial(tqdm, disable=True)
        sam2.sam2_video_predictor.tqdm = sam2.utils.misc.tqdm = quiet

    def start(self, clip: Clip, objects: int) -> None:
        """See `Contender.start`."""
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
        """See `Contender.step`."""
        begin = time.perf_counter()
        with inference(self._model.device):
            frame, _, logits = next(self._steps)
            masks = (logits[:, 0] > 0).cpu().numpy()
        assert frame == index
        ms = (time.perf_counter() - begin) * 1000 + self._loading_ms
        return Step(ms, masks, loading_ms=self._loading_ms)

    def close(self) -> None:
        """Forget the clip."""
        self._steps = None


class Loop:
    """`references.PerObjectLoop`, each object's state saved whole to Redis after each frame."""

    def __init__(self, model: SAM2VideoPredictor, server: RedisServer) -> None:
        self._model = model
        self._loop = PerObjectLoop(model)
        self._client = server.client()
        self._traffic = Traffic(server)

    def start(self, clip: Clip, objects: int) -> None:
        """See `Contender.start`."""
        self._frames = clip.frames
        self._keys = [f"loop:{number}" for number in range(objects)]
        frame = self._loop.encode(Image.open(io.BytesIO(clip.frames[0])))
        for key, mask in zip(self._keys, clip.masks, strict=False):
            one = self._loop.start(frame, mask)
            count = self._model.num_maskmem
            latest = {step: copy_output(one.first) for step in range(1, count + 1)}
            filled = LoopObject(step=count, first=one.first)
            filled.latest.update(latest)
            self._client.set(key, encode_object(filled))

    def step(self, index: int) -> Step:
        """See `Contender.step`."""
        before = self._traffic.read()
        begin = time.perf_counter()
        frame = self._loop.encode(Image.open(io.BytesIO(self._frames[index])))
        masks = []
        for key in self._keys:
            data = self._client.get(key)
            assert isinstance(data, bytes)
            one = decode_object(data, self._model.device)
            masks.append(self._loop.track(frame, one))
            self._client.set(key, encode_object(one))
        ms = (time.perf_counter() - begin) * 1000
        written, read = self._traffic.since(before)
        return Step(ms, masks, written, read)

    def close(self) -> None:
        """Forget the tracks."""
        self._client.delete(*self._keys)
        self._client.close()
        self._traffic.close()


class Traffic:
    """Counts the bytes between a Redis server and its clients, this one's left out."""

    def __init__(self, server: RedisServer) -> None:
        self._client = server.client()
        self._own = (0, 0)
        self._own = self.since(self.read())

    def read(self) -> tuple[int, int]:
        """Return bytes in and out since the server was started."""
        stats: dict[str, Any] = self._client.info("stats")
        return stats["total_net_input_bytes"], stats["total_net_output_bytes"]

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return bytes in and out since an earlier reading."""
        received, sent = self.read()
        return received - before[0] - self._own[0], sent - before[1] - self._own[1]

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()


def open_contenders(
    names: Sequence[str],
    environment: Mapping[str, str],
    server: RedisServer,
    folder: Path,
    stack: ExitStack,
    *,
    compiled: bool = False,
) -> dict[str, Contender]:
    """Start `ours`, `predictor` and `loop`, or some of them, to be closed with the stack.

    Args:
        names: Which.
        environment: The function's settings, by which the others load the same network.
        server: Keeps the tracks.
        folder: For logs.
        stack: Closes them.
        compiled: Let SAM 2's predictor compile itself, as its makers recommend for speed.
    """

    def load() -> SAM2VideoPredictor:
        return load_predictor(Settings.from_env(environment))[0]

    shared = functools.cache(load)
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: Function(environment, server, folder),
        "predictor": lambda: Predictor(compile_predictor(load()) if compiled else shared()),
        "loop": lambda: Loop(shared(), server),
    }
    return {name: stack.enter_context(closing(makers[name]())) for name in names}


def compile_predictor(model: SAM2VideoPredictor) -> SAM2VideoPredictor:
    """Do to a predictor what `build_sam2_video_predictor(vos_optimized=True)` does."""
    model.__class__ = SAM2VideoPredictorVOS  # whose constructor adds nothing but the next line
    model._compile_all_components()  # noqa: SLF001
    # sam2_base.py, what `compile_image_encoder: true` in a config does
    model.image_encoder.forward = torch.compile(
        model.image_encoder.forward, mode="max-autotune", fullgraph=True, dynamic=False
    )
    return model


def open_store(server: RedisServer) -> RedisStateStore:
    """Return the function's store, to write states as the function would."""
    client = connect(RedisSettings("127.0.0.1", server.port))
    return RedisStateStore(client=client, state_ttl_s=8 * 3600, retry_window_s=600)


def fill_banks(store: RedisStateStore, states: Sequence[str]) -> list[str]:
    """Write each started track anew, as if it had stood still for fifteen frames.

    Args:
        store: The function's.
        states: State tokens as the function answered them.

    Returns:
        The new tokens.
    """
    tokens = [StateToken.parse(state) for state in states]
    keys = [(token.track, token.step) for token in tokens]
    values = zip(tokens, store.load_states(tokens), store.load_memories(keys), strict=True)
    filled = []
    for started, state_bytes, memory_bytes in values:
        assert state_bytes is not None
        assert memory_bytes is not None
        header, memory_header = _header(state_bytes), _header(memory_bytes)
        fingerprint = header["__metadata__"]["fingerprint"]
        state = decode_state(
            state_bytes,
            step_id=started.step,
            fingerprint=fingerprint,
            obj_ptr_size=header["obj_ptrs"]["shape"][1],
        )
        memory = decode_memory(
            memory_bytes,
            frame_id=started.step,
            fingerprint=fingerprint,
            shape=tuple(memory_header["maskmem_features"]["shape"]),
        )
        for _ in range(POINTER_REACH):
            state = state.advance(new_id(), state.newest.obj_ptr, state.last_box)
        token = StateToken(new_id(), state.newest.id)
        memories = {
            id_: encode_memory(memory, frame_id=id_, fingerprint=fingerprint)
            for id_ in state.memory_ids
        }
        store.save([StepWrite(token=token, state=encode_state(state), memories=memories)])
        filled.append(str(token))
    return filled


def last_report(log: str) -> dict[str, Any]:
    """Return the last request's log line: counts, bytes and `times_ms`."""
    line = next(line for line in reversed(log.splitlines()) if "] tracked: " in line)
    report: dict[str, Any] = ast.literal_eval(line.partition("] tracked: ")[2])
    return report


def copy_output(output: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a frame's output: shared tensors would be saved once, and stay in the CPU's cache."""
    return {name: _copy(value) for name, value in output.items()}


def _copy(value: Any) -> Any:  # noqa: ANN401  # tensors, lists of them, None
    if isinstance(value, list):
        return [_copy(one) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def _header(data: bytes) -> dict[str, Any]:
    """Return the header of safetensors."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header
