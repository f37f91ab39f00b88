"""Smooth random motion as functions of time, for clips of any length.

Time is in frames (any real number), positions in reference pixels (a 640 x 360 frame), angles in
radians.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Path(Protocol):
    """A position as a function of time."""

    def __call__(self, time: float) -> Floats:
        """Return the `(2,)` position, xy."""
        ...


@dataclass(frozen=True, eq=False)
class Wave:
    """A constant plus sines: a smooth, bounded change of one number."""

    base: float
    amplitudes: Floats
    rates: Floats
    phases: Floats

    def __call__(self, time: float) -> float:
        """Return the value at a time."""
        return self.base + float(np.sum(self.amplitudes * np.sin(self.rates * time + self.phases)))

    @property
    def highest(self) -> float:
        """An upper bound of the value."""
        return self.base + float(np.abs(self.amplitudes).sum())


def draw_wave(
    rng: np.random.Generator, base: float, swing: float, max_rate: float, terms: int = 2
) -> Wave:
    """Draw a wave around `base`, within `swing` of it, no faster than `swing * max_rate`."""
    shares = rng.dirichlet(np.ones(terms)) * swing
    rates = rng.uniform(0.3, 1.0, terms) * max_rate
    return Wave(base, shares, rates, rng.uniform(0, 2 * np.pi, terms))


@dataclass(frozen=True, eq=False)
class Wander:
    """A bounded drift."""

    x: Wave
    y: Wave

    def __call__(self, time: float) -> Floats:
        """Return the `(2,)` position, xy."""
        return np.array([self.x(time), self.y(time)])


def draw_wander(rng: np.random.Generator, frame_wh: Floats, max_speed: float) -> Wander:
    """Draw a path that starts anywhere in the frame and may leave and re-enter it."""
    waves = []
    for extent in frame_wh:
        swing = rng.uniform(0.1, 0.5) * extent
        base = rng.uniform(0.2, 0.8) * extent
        waves.append(draw_wave(rng, base, swing, rng.uniform(0.1, 1.0) * max_speed / swing))
    return Wander(*waves)


@dataclass(frozen=True, eq=False)
class Crossing:
    """Pass `position` at time `moment`, nearly straight, and swing back much later."""

    position: Floats
    moment: float
    speed: float
    swing: float
    sway: Wave

    def __call__(self, time: float) -> Floats:
        """Return the `(2,)` position, xy."""
        x = self.swing * np.sin(self.speed / self.swing * (time - self.moment))
        return np.add(self.position, (x, self.sway(time) - self.sway(self.moment)))


@dataclass(frozen=True, eq=False)
class Eclipse:
    """Move over another path: approach it, cover it for some time, and move on.

    `slack` is the distance off centre at which it still covers.
    """

    target: Path
    moment: float
    hidden: float
    slack: float
    speed: float
    heading: Floats

    def __call__(self, time: float) -> Floats:
        """Return the `(2,)` position, xy."""
        since = time - self.moment
        half = self.hidden / 2
        inside = np.clip(since / half, -1, 1) * self.slack
        outside = np.sign(since) * max(abs(since) - half, 0.0) * self.speed
        position: Floats = self.target(time) + self.heading * (inside + outside)
        return position
