from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from errors import SettingsError
from settings import InteractorSettings, Limits, MaskForm, RedisSettings, Secret, Settings

HOST = {"CVAT_FUNCTIONS_REDIS_HOST": "redis"}

# variable, value, field that it sets, expected value
RIGHT = [
    ("CVAT_FUNCTIONS_REDIS_HOST", "redis.local", "redis.host", "redis.local"),
    ("CVAT_FUNCTIONS_REDIS_PORT", "6666", "redis.port", 6666),
    ("CVAT_FUNCTIONS_REDIS_PORT", "65535", "redis.port", 65535),
    ("CVAT_FUNCTIONS_REDIS_USERNAME", "tracker", "redis.username", "tracker"),
    ("CVAT_FUNCTIONS_REDIS_PASSWORD", "hush", "redis.password.value", "hush"),
    ("CVAT_FUNCTIONS_REDIS_DB", "3", "redis.db", 3),
    ("CVAT_FUNCTIONS_REDIS_SSL", "1", "redis.ssl", True),
    ("CVAT_FUNCTIONS_REDIS_SSL", "Yes", "redis.ssl", True),
    ("CVAT_FUNCTIONS_REDIS_SSL", "TRUE", "redis.ssl", True),
    ("CVAT_FUNCTIONS_REDIS_SSL", "on", "redis.ssl", True),
    ("CVAT_FUNCTIONS_REDIS_SSL", "0", "redis.ssl", False),
    ("CVAT_FUNCTIONS_REDIS_SSL", "false", "redis.ssl", False),
    ("CVAT_FUNCTIONS_REDIS_SSL", "No", "redis.ssl", False),
    ("CVAT_FUNCTIONS_REDIS_SSL", "off", "redis.ssl", False),
    ("CVAT_FUNCTIONS_REDIS_SSL_CA_CERTS", "/ca.pem", "redis.ssl_ca_certs", "/ca.pem"),
    ("CVAT_FUNCTIONS_REDIS_TIMEOUT", "2.5", "redis.timeout_s", 2.5),
    ("SAM2_MODEL_ID", "micro", "model_id", "micro"),
    ("SAM2_DEVICE", "auto", "device", "auto"),
    ("SAM2_DEVICE", "cpu", "device", "cpu"),
    ("SAM2_DEVICE", "cuda", "device", "cuda"),
    ("SAM2_DEVICE", "cuda:1", "device", "cuda:1"),
    ("SAM2_IMAGE_SIZE", "512", "image_size", 512),
    ("SAM2_IMAGE_SIZE", "64", "image_size", 64),
    ("SAM2_BATCH_OBJECTS", "8", "batch_objects", 8),
    ("SAM2_COMPILE", "on", "compile", True),
    ("SAM2_BIT_EXACT", "on", "bit_exact", True),
    ("SAM2_MEMORY_CACHE_MB", "2", "memory_cache_bytes", 2 * 1024 * 1024),
    ("SAM2_MEMORY_CACHE_MB", "0", "memory_cache_bytes", 0),
    ("SAM2_FEATURE_CACHE_FRAMES", "9", "feature_cache_frames", 9),
    ("SAM2_POLYGON_TOLERANCE", "0.5", "polygon_tolerance", 0.5),
    ("SAM2_POLYGON_TOLERANCE", "0", "polygon_tolerance", 0.0),
    ("SAM2_STATE_TTL", "3600", "state_ttl_s", 3600),
    ("SAM2_RETRY_WINDOW", "60", "retry_window_s", 60),
    ("SAM2_REQUEST_LIMIT", "30", "request_limit_s", 30.0),
    ("SAM2_MAX_BODY_MB", "1", "limits.body_bytes", 1024 * 1024),
    ("SAM2_MAX_PIXELS", "1000", "limits.image_pixels", 1000),
    ("SAM2_MAX_SIDE", "100", "limits.image_side", 100),
    ("SAM2_MAX_OBJECTS", "2", "limits.objects", 2),
    ("SAM2_MAX_POLYGON_POINTS", "10", "limits.polygon_points", 10),
    ("SAM2_MAX_MASK_RUNS", "10", "limits.mask_runs", 10),
    ("SAM2_INTERACTOR_EXTREME_POINTS", "on", "interactor.extreme_points", True),
    ("SAM2_INTERACTOR_HOLE_AREA", "0", "interactor.hole_area", 0),
    ("SAM2_INTERACTOR_ISLAND_AREA", "20", "interactor.island_area", 20),
    ("SAM2_INTERACTOR_MASK", "cropped", "interactor.mask", MaskForm.CROPPED),
    ("SAM2_INTERACTOR_MASK", "none", "interactor.mask", MaskForm.NONE),
]

# variable, wrong values, part of the message that names the allowed values
WRONG = [
    ("CVAT_FUNCTIONS_REDIS_PORT", ["0", "65536", "-1", "6379.0", "redis"], "from 1 to 65535"),
    ("CVAT_FUNCTIONS_REDIS_DB", ["-1", "x", "1.5"], "from 0 to"),
    ("CVAT_FUNCTIONS_REDIS_SSL", ["2", "maybe", "si"], "true, yes, on, 0, false, no or off"),
    ("CVAT_FUNCTIONS_REDIS_TIMEOUT", ["0", "61", "nan", "inf", "soon"], "from 0.1 to 60"),
    ("SAM2_DEVICE", ["gpu", "cuda:", "cuda:x", "CUDA", "cpu:0"], "cuda or cuda:N"),
    ("SAM2_IMAGE_SIZE", ["0", "32", "100", "2080", "-64", "big"], "multiple of 32 from 64 to 2048"),
    ("SAM2_BATCH_OBJECTS", ["0", "257", "-1", "all"], "from 1 to 256"),
    ("SAM2_MEMORY_CACHE_MB", ["-1", "1.5", "1g"], "from 0 to"),
    ("SAM2_FEATURE_CACHE_FRAMES", ["0", "257", "x"], "from 1 to 256"),
    ("SAM2_POLYGON_TOLERANCE", ["-0.1", "100.1", "nan", "-inf", "fine"], "from 0 to 100"),
    ("SAM2_STATE_TTL", ["9", "-1", "8h", "2592001"], "from 10 to 2592000"),
    ("SAM2_RETRY_WINDOW", ["0", "28801", "10m"], "from 1 to 28800"),
    ("SAM2_REQUEST_LIMIT", ["0", "86401", "nan", "4m"], "from 1 to 86400"),
    ("SAM2_MAX_BODY_MB", ["0", "4097", "x"], "from 1 to 4096"),
    ("SAM2_MAX_PIXELS", ["0", "x"], "from 1 to"),
    ("SAM2_MAX_SIDE", ["0", "65537"], "from 1 to 65536"),
    ("SAM2_MAX_OBJECTS", ["0", "10001"], "from 1 to 10000"),
    ("SAM2_MAX_POLYGON_POINTS", ["2", "x"], "from 3 to"),
    ("SAM2_MAX_MASK_RUNS", ["0", "x"], "from 1 to"),
    ("SAM2_INTERACTOR_EXTREME_POINTS", ["4", "dextr"], "true, yes, on, 0, false, no or off"),
    ("SAM2_INTERACTOR_HOLE_AREA", ["-1", "0.5", "big"], "from 0 to"),
    ("SAM2_INTERACTOR_ISLAND_AREA", ["-1", "0.5", "big"], "from 0 to"),
    ("SAM2_INTERACTOR_MASK", ["off", "FULL", "bounds"], "full, cropped, none"),
]


def lookup(settings: Settings, path: str) -> Any:
    """Return a setting by its dotted name."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_empty_environment_gives_the_defaults() -> None:
    """No variable is required; the embedded store is the default."""
    settings = Settings.from_env({})

    assert settings == Settings()
    assert settings.redis is None
    assert settings.model_id == "facebook/sam2.1-hiera-tiny"
    assert settings.state_ttl_s == 8 * 3600
    assert settings.retry_window_s == 600
    assert not settings.interactor.extreme_points


def test_host_alone_reaches_a_plain_redis() -> None:
    """The other Redis variables have defaults."""
    assert Settings.from_env(HOST).redis == RedisSettings(host="redis", port=6379)


def test_two_ways_to_compute_exclude_each_other() -> None:
    """Compiled kernels cannot have SAM 2's own bits."""
    with pytest.raises(SettingsError, match="SAM2_COMPILE and SAM2_BIT_EXACT exclude"):
        Settings.from_env({"SAM2_COMPILE": "on", "SAM2_BIT_EXACT": "on"})


@pytest.mark.parametrize(("variable", "value", "path", "expected"), RIGHT)
def test_variable_sets_its_field(variable: str, value: str, path: str, expected: object) -> None:
    """Each variable is converted and sets one field; surrounding blanks are ignored."""
    value_read = lookup(Settings.from_env(HOST | {variable: f" {value} "}), path)

    assert value_read == expected
    assert type(value_read) is type(expected)


def test_config_and_checkpoint_are_read_together() -> None:
    """A user's own weights need a config and a checkpoint."""
    settings = Settings.from_env({"SAM2_CONFIG": "a.yaml", "SAM2_CHECKPOINT": "a.pt"})

    assert (settings.config, settings.checkpoint) == ("a.yaml", "a.pt")


@pytest.mark.parametrize(
    ("given", "missing"), [("SAM2_CONFIG", "SAM2_CHECKPOINT"), ("SAM2_CHECKPOINT", "SAM2_CONFIG")]
)
def test_config_without_checkpoint_is_refused(given: str, missing: str) -> None:
    """Either of them alone would silently load another model."""
    with pytest.raises(SettingsError, match=rf"^{missing} is not set.*go together"):
        Settings.from_env({given: "a.yaml"})


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [(variable, value, allowed) for variable, values, allowed in WRONG for value in values],
)
def test_wrong_value_is_refused_by_name(variable: str, value: str, allowed: str) -> None:
    """The message names the variable, the value and the allowed values."""
    with pytest.raises(SettingsError) as refusal:
        Settings.from_env(HOST | {variable: value})

    assert str(refusal.value).startswith(f"{variable}={value!r} is not allowed: expected ")
    assert allowed in str(refusal.value)


def test_tables_name_every_setting() -> None:
    """A setting that is added has to be added to the tables above."""
    tested = {path.removesuffix(".value") for _, _, path, _ in RIGHT} | {"config", "checkpoint"}
    every = {field.name for field in dataclasses.fields(Settings)} - {
        "redis",
        "limits",
        "interactor",
    }
    every |= {f"redis.{field.name}" for field in dataclasses.fields(RedisSettings)}
    every |= {f"limits.{field.name}" for field in dataclasses.fields(Limits)}
    every |= {f"interactor.{field.name}" for field in dataclasses.fields(InteractorSettings)}

    assert tested == every


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_empty_variable_counts_as_unset(blank: str) -> None:
    """Compose files and charts pass empty strings for unset variables."""
    variables = {variable for variable, *_ in RIGHT} | {"SAM2_CONFIG", "SAM2_CHECKPOINT"}

    assert Settings.from_env(dict.fromkeys(variables, blank)) == Settings()


def test_retry_window_ends_with_the_track() -> None:
    """A superseded step expires before the newest; a short state TTL shortens the default."""
    assert Settings.from_env({"SAM2_STATE_TTL": "60"}).retry_window_s == 60
    with pytest.raises(SettingsError, match=r"SAM2_RETRY_WINDOW='61' is not .* from 1 to 60$"):
        Settings.from_env({"SAM2_STATE_TTL": "60", "SAM2_RETRY_WINDOW": "61"})


def test_password_does_not_print() -> None:
    """Neither repr nor str of anything that holds the password shows it."""
    settings = Settings.from_env(HOST | {"CVAT_FUNCTIONS_REDIS_PASSWORD": "hush"})
    assert settings.redis is not None
    shown = f"{settings} {settings!r} {settings.redis} {settings.redis.password} {Secret('hush')!r}"

    assert "hush" not in shown
    assert settings.redis.password == Secret("hush")


def test_settings_cannot_be_changed() -> None:
    """They are read once."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().device = "cpu"  # type: ignore[misc]
