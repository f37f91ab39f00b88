"""Owns how a function begins and ends in cvat-cli's worker: parameters, log, the agent's death.

Knows nothing of what the functions do.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Protocol, TypeVar

from errors import SettingsError, StateStoreUnavailableError
from settings import Settings

# Each parameter stands for the environment variable SAM2_<NAME>, and wins over it.
MODEL_PARAMETERS = ("model_id", "config", "checkpoint", "device", "image_size")

log = logging.getLogger("sam2_agent")


class Startable(Protocol):
    """A function whose model is loaded only where it is to serve."""

    def start_agent(self) -> None:
        """Get ready for the first request."""


F = TypeVar("F", bound=Startable)


def make(
    function_of: Callable[[Settings], F], parameters: Mapping[str, object], known: Sequence[str]
) -> F:
    """Make a function, and in an agent's worker also start it.

    Args:
        function_of: Makes the function from settings.
        parameters: The values of cvat-cli's `-p` options.
        known: Their allowed names.

    Raises:
        SystemExit: A parameter or variable is wrong; in an agent also if it could not serve.
    """
    try:
        function = function_of(read_settings(parameters, known, os.environ))
        # create-native also makes the function, in its own process, and only looks at the spec.
        agent = multiprocessing.parent_process()
        if agent is not None:
            _write_log()
            threading.Thread(target=_end_with, args=[agent], daemon=True).start()
            function.start_agent()
    except (SettingsError, StateStoreUnavailableError) as err:
        raise SystemExit(f"cannot start: {err}") from err
    return function


def read_settings(
    parameters: Mapping[str, object], known: Sequence[str], env: Mapping[str, str]
) -> Settings:
    """Return the settings of an environment and the parameters that win over it.

    Raises:
        SettingsError: A parameter is not known, or a value is wrong.
    """
    unknown = set(parameters) - set(known)
    if unknown:
        raise SettingsError(
            f"parameter {min(unknown)} is not known: expected some of {', '.join(known)}"
        )
    if "model_id" in parameters and {"config", "checkpoint"} & set(parameters):
        raise SettingsError("model_id and config with checkpoint name two models: give one")
    given = {f"SAM2_{name.upper()}": str(value) for name, value in parameters.items()}
    if "SAM2_MODEL_ID" in given:  # otherwise the variables would win over the parameter
        env = {name: env[name] for name in env if name not in {"SAM2_CONFIG", "SAM2_CHECKPOINT"}}
    return Settings.from_env({**env, **given})


def _write_log() -> None:
    """Write our log lines as cvat-cli writes its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _end_with(agent: BaseProcess) -> None:
    """End this worker when its agent was killed; it would keep the model on the GPU for ever."""
    agent.join()
    os._exit(1)
