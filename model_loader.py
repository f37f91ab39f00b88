"""Load SAM 2 from a config and a checkpoint onto a device; compile it where the settings say so."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.overrides import TorchFunctionMode

from errors import SettingsError
from model_handler import ModelHandler, inference
from rearranged import rearrange
from settings import Settings
from track_state import MEMORY_REACH, POINTER_REACH, SCHEMA_VERSION

MICRO_FOLDER = Path(__file__).parent / "weights" / "micro"

# What sam2.build_sam.build_sam2_video_predictor adds to a config with `apply_postprocessing`.
PREDICTOR_OPTIONS = {
    "_target_": "sam2.sam2_video_predictor.SAM2VideoPredictor",
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
    "binarize_mask_from_pts_for_mem_enc": True,
    "fill_hole_area": 8,
}

CPU_BATCH_OBJECTS = 1  # batches gain nothing on a CPU, and cost bit equality
CUDA_BATCH_OBJECTS = 32

# Graphs per compiled part; torch.compile's 8 is less than the mask decoder has at 64 objects.
MAX_GRAPHS = 32


def load_model(settings: Settings) -> ModelHandler:
    """Load the model that the settings name, on the device they name.

    Raises:
        SettingsError: Files are missing, do not fit each other or cannot be downloaded, the device
            is missing or fails, or compiling is not possible; the message says what to do.
    """
    if settings.compile:
        require_compiler(pick_device(settings.device))
    model, fingerprint = load_predictor(settings)
    if settings.compile:
        compile_network(model)
    elif model.device.type == "cpu" and not settings.bit_exact:
        rearrange(model)
    batch_objects = settings.batch_objects or (
        CUDA_BATCH_OBJECTS if model.device.type == "cuda" else CPU_BATCH_OBJECTS
    )
    return ModelHandler(
        model,
        fingerprint=fingerprint,
        batch_objects=batch_objects,
        feature_cache_frames=settings.feature_cache_frames,
        compiled=settings.compile,
    )


def load_predictor(settings: Settings) -> tuple[SAM2VideoPredictor, str]:
    """Load SAM 2's network itself, in evaluation mode, on the device that the settings name.

    Returns:
        The network, and the fingerprint of network, weights and input size.

    Raises:
        SettingsError: See `load_model`.
    """
    config_path, checkpoint_path = find_files(settings)
    device = pick_device(settings.device)
    model, fingerprint = build_predictor(config_path, checkpoint_path, settings.image_size)
    try:
        return model.to(device).eval(), fingerprint
    except RuntimeError as err:  # CUDA's errors, out of memory among them
        raise SettingsError(
            f"SAM2_DEVICE={settings.device!r}: the model cannot be moved to {device}: "
            f"{_one_line(err)}; check the GPU with nvidia-smi, or use another device"
        ) from err


def compile_network(model: SAM2VideoPredictor, **options: Any) -> None:  # noqa: ANN401  # torch's own
    """Let `torch.compile` fuse the network's parts, in place, when they first run.

    Graphs are compiled for one object and for several; the mask decoder's for each size of a batch,
    and for a box, a mask and no prompt.

    Args:
        model: On its device, in evaluation mode.
        options: For `torch.compile`, instead of its slowest search; CUDA graphs, which hand out
            memory that the next call overwrites, stay out.

    Source: `sam2.sam2_video_predictor.SAM2VideoPredictorVOS`, which tracks one object at a time and
        so compiles the memory encoder with `dynamic=False`. The image encoder is compiled as
        `compile_image_encoder` of `sam2.modeling.sam2_base.SAM2Base` does.
    """
    options = {"recompile_limit": MAX_GRAPHS} | (options or {"mode": "max-autotune-no-cudagraphs"})
    _fill_position_tables(model)
    for part, dynamic in (
        (model.image_encoder, False),
        (model.memory_attention, True),  # memories and objects vary in number
        (model.memory_encoder, True),  # objects vary in number
        (model.sam_mask_decoder, False),  # "accuracy regression on True", says the source
    ):
        part.forward = torch.compile(part.forward, dynamic=dynamic, **options)


def require_compiler(device: torch.device) -> None:
    """Check that `torch.compile` can work for a device.

    Raises:
        SettingsError: The device is no GPU, or there is no C compiler.

    Source: `triton/runtime/build.py` (`_build`).
    """
    if device.type != "cuda":
        # No gain on a CPU, where PyTorch 2.13 also fails at memory attention of several objects.
        raise SettingsError(f"SAM2_COMPILE=on needs a GPU, and the device is {device}: unset it")
    commands = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    if not any(map(shutil.which, commands)):
        raise SettingsError(
            f"SAM2_COMPILE=on needs a C compiler, and {' or '.join(commands)} is not found: "
            "install one, name another in CC, or unset SAM2_COMPILE"
        )


def find_files(settings: Settings) -> tuple[Path, Path]:
    """Return the paths of the config and the checkpoint, downloading the latter if need be.

    Raises:
        SettingsError: See `load_model`.
    """
    if settings.config is not None and settings.checkpoint is not None:
        return _config_path(settings.config), Path(settings.checkpoint)
    if settings.model_id == "micro":
        return MICRO_FOLDER / "config.yaml", MICRO_FOLDER / "checkpoint.pt"
    if settings.model_id not in HF_MODEL_ID_TO_FILENAMES:
        known = ", ".join(["micro", *HF_MODEL_ID_TO_FILENAMES])
        raise SettingsError(
            f"SAM2_MODEL_ID={settings.model_id!r} is not known: expected one of {known}; "
            "for other weights set SAM2_CONFIG and SAM2_CHECKPOINT"
        )
    config_name, file_name = HF_MODEL_ID_TO_FILENAMES[settings.model_id]
    try:
        checkpoint = huggingface_hub.hf_hub_download(settings.model_id, file_name)
    except Exception as err:  # the hub's client raises its own, httpx's and the system's errors
        raise SettingsError(
            f"cannot download the weights of {settings.model_id} ({type(err).__name__}): bake them "
            "into the image, or set SAM2_CONFIG and SAM2_CHECKPOINT, or SAM2_MODEL_ID=micro to "
            "try the function out"
        ) from err
    return _config_path(config_name), Path(checkpoint)


def build_predictor(
    config_path: Path, checkpoint_path: Path, image_size: int | None
) -> tuple[SAM2VideoPredictor, str]:
    """Build SAM 2's video predictor and load its weights, on the CPU.

    Args:
        config_path: A YAML like those in `sam2/configs`.
        checkpoint_path: A file like SAM 2's own: `{"model": state_dict}`, loaded as plain tensors.
        image_size: Side of the model's input in pixels; None keeps the config's.

    Returns:
        The model, and the fingerprint of everything that its states depend on.

    Raises:
        SettingsError: See `load_model`.
    """
    for path in (config_path, checkpoint_path):
        if not path.is_file():
            raise SettingsError(
                f"{path} does not exist: it should hold the model's config or weights"
            )
    try:
        config = OmegaConf.load(config_path)
        options = OmegaConf.merge(config.model, PREDICTOR_OPTIONS)
        if image_size is not None:
            options.image_size = image_size
        with _BuildOnCpu():
            model = instantiate(options, _recursive_=True)
    except Exception as err:  # anything a wrong YAML makes hydra or the model raise
        raise SettingsError(f"{config_path} is not a SAM 2 config: {err}") from err
    for module in model.modules():
        if isinstance(module, PositionEmbeddingSine):
            module.cache.clear()  # of the CPU's: they are made again on the features' device
    memory_settings = (
        model.num_maskmem,
        model.max_obj_ptrs_in_encoder,
        model.memory_temporal_stride_for_eval,
    )
    if memory_settings != (MEMORY_REACH + 1, POINTER_REACH + 1, 1):
        raise SettingsError(
            f"{config_path} attends to other frames than all SAM 2 models do: num_maskmem must be "
            f"{MEMORY_REACH + 1}, max_obj_ptrs_in_encoder {POINTER_REACH + 1} and "
            "memory_temporal_stride_for_eval 1"
        )
    try:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  # a damaged archive raises almost anything
        # Without PyTorch's message, which advises to run the code that a checkpoint may hold.
        raise SettingsError(
            f"{checkpoint_path} does not hold weights for {config_path}: it is damaged, or not a "
            "file of plain tensors"
        ) from None
    try:
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as err:
        raise SettingsError(
            f"{checkpoint_path} does not hold weights for {config_path}: {_one_line(err)}"
        ) from err
    return model, _fingerprint(OmegaConf.to_container(options, resolve=True), checkpoint_path)


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; `auto` is CUDA where it is available, else the CPU.

    Raises:
        SettingsError: The setting names a CUDA device that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"SAM2_DEVICE={name!r}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} "
            "CUDA devices; check the driver and the container's GPU access, or use cpu"
        )
    return device


class _BuildOnCpu(TorchFunctionMode):
    """Keep on the CPU what SAM 2's constructors put on the first GPU.

    They do so wherever CUDA is available, whatever device the model is for.

    Source: `sam2.modeling.sam.transformer.RoPEAttention`,
        `sam2.modeling.position_encoding.PositionEmbeddingSine`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],  # torch's interface
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # what the function returns
        """Call a function of torch's, with the CPU for CUDA."""

        def to_cpu(value: Any) -> Any:  # noqa: ANN401  # any argument
            is_cuda = isinstance(value, str | torch.device) and str(value) == "cuda"
            return "cpu" if is_cuda else value

        return func(
            *map(to_cpu, args), **{name: to_cpu(value) for name, value in (kwargs or {}).items()}
        )


def _fill_position_tables(model: SAM2VideoPredictor) -> None:
    """Make the tables that SAM 2 makes at first use: changed later, they void compiled graphs."""
    size = model.image_size
    with inference(model.device):
        model.forward_image(torch.zeros(1, 3, size, size, device=model.device))
    side = model.sam_image_embedding_size
    for module in model.memory_attention.modules():
        if isinstance(module, RoPEAttention):
            module.freqs_cis = module.compute_cis(end_x=side, end_y=side).to(model.device)


def _config_path(name: str) -> Path:
    """Return a config's path: a file of this name, or a file inside the sam2 package."""
    path = Path(name)
    return path if path.is_file() else Path(sam2.__path__[0]) / name


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:300]


def _fingerprint(options: object, checkpoint_path: Path) -> str:
    digest = hashlib.sha256(f"{SCHEMA_VERSION} {json.dumps(options, sort_keys=True)}".encode())
    with checkpoint_path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
