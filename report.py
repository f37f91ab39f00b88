"""Count and time what a request does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Report:
    """Counts and times of a request, for its log line.

    Attributes:
        started: Objects started.
        continued: Objects continued.
        lost: Objects that are not in the frame.
        bytes_written: To the store.
        bytes_read: From the store.
        out_of_memory: Attempts that did not fit into the device's memory and were repeated.
        times_ms: Milliseconds by stage.
    """

    started: int = 0
    continued: int = 0
    lost: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    out_of_memory: int = 0
    times_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str, device: torch.device | None = None) -> Iterator[None]:
        """Add the time of a block to `times_ms[stage]`, without the blocks timed inside it.

        Args:
            stage: Name of the block.
            device: Waited for at the end of the block, if it is a GPU: calls only launch its work.
        """
        begin, before_ms = time.perf_counter(), sum(self.times_ms.values())
        try:
            yield
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
        finally:
            inside_ms = sum(self.times_ms.values()) - before_ms
            spent_ms = (time.perf_counter() - begin) * 1000 - inside_ms
            self.times_ms[stage] = round(self.times_ms.get(stage, 0) + spent_ms, 1)
