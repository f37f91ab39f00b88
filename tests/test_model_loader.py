from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor, SAM2VideoPredictorVOS

import model_loader
from errors import SettingsError
from model_loader import compile_network, load_model, load_predictor, pick_device, require_compiler
from object_requests import Continue, Start
from settings import Settings
from shapes import Shape, ShapeType, encode_cvat_rle
from state_store import MemoryStateStore
from state_token import StateToken
from testbed.drawn_frames import SIZE_HW, blob_mask, block_mask
from track_state import POINTER_REACH
from tracker import Frame, Tracker, build_tracker

MICRO = Settings(model_id="micro", device="cpu", image_size=64)
STARTS = [
    Start(Shape(ShapeType.MASK, encode_cvat_rle(blob_mask()))),
    Start(Shape(ShapeType.RECTANGLE, [220.0, 40.0, 271.0, 101.0])),
    Start(Shape(ShapeType.MASK, encode_cvat_rle(block_mask()))),
]


# Devices


def test_cuda_on_a_machine_without_is_refused_with_what_to_do() -> None:
    """The function does not fall back to a CPU unasked."""
    missing = f"cuda:{torch.cuda.device_count()}"

    with pytest.raises(SettingsError, match=r"SAM2_DEVICE='cuda:\d+': PyTorch .* sees \d+"):
        pick_device(missing)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_building_a_model_uses_no_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """SAM 2's constructors use the first GPU if CUDA is available; the model is moved later."""
    moved_to: list[torch.device] = []

    def move(model: SAM2VideoPredictor, device: torch.device) -> SAM2VideoPredictor:
        moved_to.append(device)
        return model

    def fail() -> NoReturn:
        pytest.fail("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
    monkeypatch.setattr(SAM2VideoPredictor, "to", move)
    model, _ = load_predictor(replace(MICRO, device=device))

    assert moved_to == [torch.device(device)]
    for layer in model.memory_attention.layers:
        assert layer.cross_attn_image.freqs_cis.device.type == "cpu"


def test_position_encodings_are_computed_on_the_device_of_the_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those from building, on the CPU, would be copied to the GPU for every frame."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, _ = load_predictor(MICRO)

    assert model.image_encoder.neck.position_encoding.cache == {}
    assert model.memory_encoder.position_encoding.cache == {}


def test_a_device_that_fails_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a wrong config; the message names the setting and has the reason in one line."""

    def full(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(SAM2VideoPredictor, "to", full)

    with pytest.raises(SettingsError, match=r"^SAM2_DEVICE='cuda': the model cannot be moved to "
                       r"cuda: CUDA out of memory\. Tried to allocate 20 MiB"):  # fmt: skip
        load_predictor(Settings(model_id="micro", device="cuda"))


def test_a_model_that_fills_the_device_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start ends with a line that says what to set, not with a traceback."""

    def full(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SAM2VideoPredictor, "forward_image", full)

    with pytest.raises(SettingsError, match=r"^SAM2_DEVICE='cpu' has too little .*SAM2_IMAGE_SIZE"):
        build_tracker(MICRO, MemoryStateStore(state_ttl_s=60, retry_window_s=60))


# Compilation


def test_compiling_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In one line; CC may name a compiler that is not on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    with pytest.raises(SettingsError, match=r"^SAM2_COMPILE=on needs a C compiler, .* unset SAM2_"):
        require_compiler(torch.device("cuda"))
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CC", str(compiler))
    require_compiler(torch.device("cuda"))


def test_compiling_for_a_cpu_is_refused() -> None:
    """Before anything is loaded."""
    with pytest.raises(SettingsError, match=r"^SAM2_COMPILE=on needs a GPU, and the device is cpu"):
        load_model(replace(MICRO, model_id="not loaded", compile=True))


def test_parts_are_specialised_as_sam2_specialises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the memory encoder, to which SAM 2 gives one object at a time."""
    compiled: dict[str, bool] = {}

    def record(forward: Any, *, dynamic: bool, **_: object) -> Any:
        compiled[type(forward.__self__).__name__] = dynamic
        return forward

    monkeypatch.setattr(torch, "compile", record)
    model, _ = load_predictor(MICRO)
    model.__class__ = SAM2VideoPredictorVOS
    model._compile_all_components()
    theirs = dict(compiled)
    compiled.clear()
    compile_network(model)

    assert compiled == {"ImageEncoder": False, "MemoryEncoder": True} | {
        name: theirs[name] for name in ("MemoryAttention", "MaskDecoder")
    }


@pytest.fixture(scope="module")
def graphs() -> Iterator[list[str]]:
    """The graphs that `torch.compile` was given."""
    torch._dynamo.reset()
    compiled: list[str] = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        compiled.append(str(graph))
        return graph.forward

    compile_it = functools.partial(compile_network, backend=count, fullgraph=True)
    with (
        mock.patch.object(model_loader, "compile_network", compile_it),
        mock.patch.object(model_loader, "require_compiler"),
    ):
        yield compiled
    torch._dynamo.reset()


def tracker_of(settings: Settings) -> Tracker:
    """Build a warm tracker."""
    return build_tracker(settings, MemoryStateStore(state_ttl_s=60, retry_window_s=60))


def frame(number: int) -> Frame:
    """Return a frame of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    return Frame.from_image(Image.fromarray(pixels))


def test_requests_find_every_graph_compiled(graphs: list[str]) -> None:
    """Starts, young and old tracks, batches of all sizes: the warm-up has compiled for them all."""
    tracker = tracker_of(replace(MICRO, batch_objects=4, compile=True))
    at_start = len(graphs)
    assert at_start > 10

    tokens: list[StateToken] = []
    for number in range(POINTER_REACH + 4):
        # batches of 3, of 3 and 3 of another age, of 4, and of 4 and 4, from young to full banks
        new = {0: STARTS, 2: STARTS, 3: STARTS[:1], POINTER_REACH + 2: STARTS[1:2]}.get(number, [])
        found = tracker.run(frame(number), [*map(Continue, tokens), *new])
        tokens = [obj.token for obj in found]

    assert len(tokens) == 8
    assert len(graphs) == at_start
