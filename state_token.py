"""Make and parse state tokens, which name a step of a track."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from errors import BadRequestError


@dataclass(frozen=True)
class StateToken:
    """Name of one step of one track; CVAT carries it in `states` as `<track>.<step>`."""

    track: str
    step: str

    def __str__(self) -> str:
        return f"{self.track}.{self.step}"

    @classmethod
    def parse(cls, text: object) -> StateToken:
        """Read a token.

        Raises:
            BadRequestError: It does not have the form of a token.
        """
        if not isinstance(text, str) or not re.fullmatch(r"[\w-]{22}\.[\w-]{22}", text, re.ASCII):
            raise BadRequestError(
                "this is not a state token of this function; start the track again"
            )
        track, _, step = text.partition(".")
        return cls(track, step)


def new_id() -> str:
    """Return an unguessable id for a track or a step: 128 bits in 22 URL-safe characters."""
    return secrets.token_urlsafe(16)
