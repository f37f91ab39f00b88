"""Keep on this machine how far a run is, so that a repeat of the command goes on from there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cvat_task.keyframes import Json
from errors import BadRequestError

JOURNAL_VERSION = 2


class Journal:
    """A file with the state of a run.

    Args:
        folder: The folder for journals.
        command: What was asked for, as JSON; another command has another journal.
    """

    def __init__(self, folder: Path, command: Json) -> None:
        name = hashlib.sha256(json.dumps(command, sort_keys=True).encode()).hexdigest()[:20]
        self._path = folder / f"{name}.json"
        self._command = command

    def load(self) -> Json | None:
        """Return the state that was saved last; None if there is none of this version."""
        try:
            saved: Json = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        fits = saved.get("version") == JOURNAL_VERSION and saved.get("command") == self._command
        return saved if fits else None

    def save(self, state: Json) -> None:
        """Replace the saved state, in one step.

        Raises:
            BadRequestError: The file cannot be written.
        """
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"version": JOURNAL_VERSION, "command": self._command, **state})
            new.write_text(text, encoding="utf-8")
            new.replace(self._path)
        except OSError as err:
            raise BadRequestError(
                f"{self._path} cannot be written ({err.strerror}): a repeat could not go on from "
                "here. Name a folder that can be written in XDG_STATE_HOME"
            ) from err

    def delete(self) -> None:
        """Delete the saved state."""
        self._path.unlink(missing_ok=True)
