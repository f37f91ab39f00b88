"""Create functions in cvat-cli's worker processes: parameters, log, end of the agent."""

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

# Each parameter overrides the environment variable SAM2_<NAME>.
MODEL_PARAMETERS = ("model_id", "config", "checkpoint", "device", "image_size")

log = logging.getLogger("sam2_agent")


class Startable(Protocol):
    """A function that loads its model only in an agent."""

    def start_agent(self) -> None:
        """Load what the first request needs."""


F = TypeVar("F", bound=Startable)


def create_function(
    function_class: Callable[[Settings], F], parameters: Mapping[str, object], known: Sequence[str]
) -> F:
    """Create a function and, in an agent's worker process, start it.

    Args:
        function_class: Creates the function from settings.
        parameters: The values of cvat-cli's `-p` options.
        known: The allowed names of parameters.

    Raises:
        SystemExit: A parameter or variable is wrong; in an agent also if the start fails.
    """
    try:
        function = function_class(read_settings(parameters, known, os.environ))
        # create-native also creates the function, in its own process, but only reads its spec.
        agent = multiprocessing.parent_process()
        if agent is not None:
            _set_up_log()
            threading.Thread(target=_exit_with, args=[agent], daemon=True).start()
            function.start_agent()
    except (SettingsError, StateStoreUnavailableError) as err:
        raise SystemExit(f"cannot start: {err}") from err
    return function


def read_settings(
    parameters: Mapping[str, object], known: Sequence[str], env: Mapping[str, str]
) -> Settings:
    """Return the settings of an environment, overridden by parameters.

    Raises:
        SettingsError: A parameter is unknown, or a value is wrong.
    """
    unknown = set(parameters) - set(known)
    if unknown:
        raise SettingsError(
            f"parameter {min(unknown)} is not known: expected some of {', '.join(known)}"
        )
    if "model_id" in parameters and {"config", "checkpoint"} & set(parameters):
        raise SettingsError("model_id and config with checkpoint name two models: give one")
    given = {f"SAM2_{name.upper()}": str(value) for name, value in parameters.items()}
    if "SAM2_MODEL_ID" in given:  # these variables would override the parameter
        env = {name: env[name] for name in env if name not in {"SAM2_CONFIG", "SAM2_CHECKPOINT"}}
    return Settings.from_env({**env, **given})


def _set_up_log() -> None:
    """Log in the format of cvat-cli."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _exit_with(agent: BaseProcess) -> None:
    """Exit when the agent is killed; this worker would keep the model on the GPU forever."""
    agent.join()
    os._exit(1)
