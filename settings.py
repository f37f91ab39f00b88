"""Read the settings from the environment, and reject wrong values by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from errors import SettingsError

T = TypeVar("T")
D = TypeVar("D")
N = TypeVar("N", int, float)

DEFAULT_MODEL_ID = "facebook/sam2.1-hiera-tiny"


@dataclass(frozen=True)
class Secret:
    """A password that does not print."""

    value: str

    def __repr__(self) -> str:
        return "Secret('***')"


@dataclass(frozen=True)
class RedisSettings:
    """How to reach the Redis server that stores the tracks."""

    host: str
    port: int = 6379
    username: str | None = None
    password: Secret | None = None
    db: int = 0
    ssl: bool = False
    ssl_ca_certs: str | None = None
    timeout_s: float = 5.0


@dataclass(frozen=True)
class Limits:
    """Upper limits of one request; larger requests are rejected before anything is computed."""

    body_bytes: int = 256 * 1024 * 1024
    image_pixels: int = 64_000_000
    image_side: int = 16_384
    objects: int = 256
    polygon_points: int = 20_000
    mask_runs: int = 2_000_000


class MaskForm(StrEnum):
    """The interactor's `mask`: of the whole frame, cropped to its box with `bounds`, or none."""

    FULL = "full"
    CROPPED = "cropped"
    NONE = "none"


@dataclass(frozen=True)
class InteractorSettings:
    """How the interactor reads prompts and answers.

    Attributes:
        extreme_points: Whether four positive points at the object's extremes mean a box. Off: four
            ordinary clicks often lie like that too.
        hole_area: Largest hole to fill, in pixels of SAM 2's low-resolution mask.
        island_area: Largest island to remove, in the same pixels.
        mask: The form of `mask` in the answer.
    """

    extreme_points: bool = False
    hole_area: int = 8  # as SAM 2's video predictor; its image predictor leaves both to its user
    island_area: int = 8
    mask: MaskForm = MaskForm.FULL


@dataclass(frozen=True)
class Settings:
    """All settings of the functions.

    Attributes:
        redis: The shared store, or None for the embedded store (one worker, one replica).
        model_id: A Hugging Face model id, or `micro` for the bundled try-out weights.
        config: Path of a SAM 2 YAML, or the name of one inside the `sam2` package; replaces
            `model_id` together with `checkpoint`.
        checkpoint: Path of the weights that belong to `config`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        image_size: Side of the model's square input, in pixels; None uses the config's.
        batch_objects: Objects per forward pass; None means 1 on CPU and 32 on CUDA.
        compile: Whether to compile the network's parts when they first run; for a GPU.
        bit_exact: Whether a CPU computes SAM 2's original operations instead of the faster ones.
        memory_cache_bytes: Size of the replica's cache of frame memories on its device.
        feature_cache_frames: Encoded frames that a replica caches on its device.
        polygon_tolerance: Largest distance, in pixels, of a polygon from the mask's outline.
        request_limit_s: Longest time to compute one request. It must stay below Nuclio's
            `eventTimeout`, which kills the worker together with the requests that wait for it.
        state_ttl_s: Life of a track from its last use, in seconds.
        retry_window_s: Life of a superseded step, in seconds.
    """

    redis: RedisSettings | None = None
    model_id: str = DEFAULT_MODEL_ID
    config: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    image_size: int | None = None
    batch_objects: int | None = None
    compile: bool = False
    bit_exact: bool = False
    memory_cache_bytes: int = 1024 * 1024 * 1024
    feature_cache_frames: int = 4
    polygon_tolerance: float = 1.0
    request_limit_s: float = 240.0
    state_ttl_s: int = 8 * 3600  # CVAT's signature on a state lives as long
    retry_window_s: int = 600
    limits: Limits = field(default_factory=Limits)
    interactor: InteractorSettings = field(default_factory=InteractorSettings)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Read all settings; an empty variable counts as unset.

        Args:
            env: The environment, for example `os.environ`.

        Raises:
            SettingsError: A value is wrong; the message names the variable, the value and the
                allowed values.
        """
        read = _Reader(env)
        host = read.text("CVAT_FUNCTIONS_REDIS_HOST")
        config = read.text("SAM2_CONFIG")
        checkpoint = read.text("SAM2_CHECKPOINT")
        if (config is None) != (checkpoint is None):
            missing = "SAM2_CHECKPOINT" if checkpoint is None else "SAM2_CONFIG"
            raise SettingsError(
                f"{missing} is not set: SAM2_CONFIG and SAM2_CHECKPOINT go together"
            )
        compiled = read.flag("SAM2_COMPILE", default=cls.compile)
        bit_exact = read.flag("SAM2_BIT_EXACT", default=cls.bit_exact)
        if compiled and bit_exact:
            raise SettingsError("SAM2_COMPILE and SAM2_BIT_EXACT exclude each other: unset one")
        state_ttl_s = read.integer("SAM2_STATE_TTL", cls.state_ttl_s, 10, 30 * 86400)
        return cls(
            redis=None if host is None else _redis(host, read),
            model_id=read.text("SAM2_MODEL_ID") or cls.model_id,
            config=config,
            checkpoint=checkpoint,
            device=read.cast("SAM2_DEVICE", cls.device, _device, "auto, cpu, cuda or cuda:N"),
            image_size=read.cast(
                "SAM2_IMAGE_SIZE", None, _image_size, "a multiple of 32 from 64 to 2048"
            ),
            batch_objects=read.integer("SAM2_BATCH_OBJECTS", None, 1, 256),
            compile=compiled,
            bit_exact=bit_exact,
            memory_cache_bytes=read.integer("SAM2_MEMORY_CACHE_MB", 1024, 0, 1 << 20) << 20,
            feature_cache_frames=read.integer(
                "SAM2_FEATURE_CACHE_FRAMES", cls.feature_cache_frames, 1, 256
            ),
            polygon_tolerance=read.number("SAM2_POLYGON_TOLERANCE", cls.polygon_tolerance, 0, 100),
            request_limit_s=read.number("SAM2_REQUEST_LIMIT", cls.request_limit_s, 1, 86400),
            state_ttl_s=state_ttl_s,
            retry_window_s=read.integer(
                "SAM2_RETRY_WINDOW", min(cls.retry_window_s, state_ttl_s), 1, state_ttl_s
            ),
            limits=_limits(read),
            interactor=_interactor(read),
        )


def _redis(host: str, read: _Reader) -> RedisSettings:
    password = read.text("CVAT_FUNCTIONS_REDIS_PASSWORD")
    return RedisSettings(
        host=host,
        port=read.integer("CVAT_FUNCTIONS_REDIS_PORT", RedisSettings.port, 1, 65535),
        username=read.text("CVAT_FUNCTIONS_REDIS_USERNAME"),
        password=None if password is None else Secret(password),
        db=read.integer("CVAT_FUNCTIONS_REDIS_DB", RedisSettings.db, 0, 1 << 20),
        ssl=read.flag("CVAT_FUNCTIONS_REDIS_SSL", default=RedisSettings.ssl),
        ssl_ca_certs=read.text("CVAT_FUNCTIONS_REDIS_SSL_CA_CERTS"),
        timeout_s=read.number("CVAT_FUNCTIONS_REDIS_TIMEOUT", RedisSettings.timeout_s, 0.1, 60),
    )


def _limits(read: _Reader) -> Limits:
    default = Limits()
    return Limits(
        body_bytes=read.integer("SAM2_MAX_BODY_MB", default.body_bytes >> 20, 1, 4096) << 20,
        image_pixels=read.integer("SAM2_MAX_PIXELS", default.image_pixels, 1, 1 << 30),
        image_side=read.integer("SAM2_MAX_SIDE", default.image_side, 1, 1 << 16),
        objects=read.integer("SAM2_MAX_OBJECTS", default.objects, 1, 10_000),
        polygon_points=read.integer("SAM2_MAX_POLYGON_POINTS", default.polygon_points, 3, 1 << 20),
        mask_runs=read.integer("SAM2_MAX_MASK_RUNS", default.mask_runs, 1, 1 << 26),
    )


def _interactor(read: _Reader) -> InteractorSettings:
    default = InteractorSettings()
    return InteractorSettings(
        extreme_points=read.flag("SAM2_INTERACTOR_EXTREME_POINTS", default=default.extreme_points),
        hole_area=read.integer("SAM2_INTERACTOR_HOLE_AREA", default.hole_area, 0, 1 << 20),
        island_area=read.integer("SAM2_INTERACTOR_ISLAND_AREA", default.island_area, 0, 1 << 20),
        mask=read.cast("SAM2_INTERACTOR_MASK", default.mask, MaskForm, ", ".join(MaskForm)),
    )


@dataclass(frozen=True)
class _Reader:
    """Converts the variables of one environment, or raises SettingsError."""

    env: Mapping[str, str]

    def cast(self, name: str, default: D, convert: Callable[[str], T], allowed: str) -> T | D:
        value = self.env.get(name, "").strip()
        if not value:
            return default
        try:
            return convert(value)
        except ValueError:
            raise SettingsError(f"{name}={value!r} is not allowed: expected {allowed}") from None

    def text(self, name: str) -> str | None:
        return self.cast(name, None, str, "text")

    def flag(self, name: str, *, default: bool) -> bool:
        return self.cast(name, default, _flag, "1, true, yes, on, 0, false, no or off")

    def integer(self, name: str, default: D, low: int, high: int) -> int | D:
        return self.cast(
            name, default, _between(int, low, high), f"a whole number from {low} to {high}"
        )

    def number(self, name: str, default: float, low: float, high: float) -> float:
        return self.cast(
            name, default, _between(float, low, high), f"a number from {low} to {high}"
        )


def _between(convert: Callable[[str], N], low: float, high: float) -> Callable[[str], N]:
    def checked(text: str) -> N:
        value = convert(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return checked


def _flag(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError(text)
    return text


def _image_size(text: str) -> int:
    size = _between(int, 64, 2048)(text)
    if size % 32:  # the image encoder halves the frame five times
        raise ValueError(text)
    return size
