"""Seconds, peak memory and threads of the phases of a fit."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from raydetect.blocks.group import Group


@dataclass(slots=True)
class Phases:
    """Seconds, and the peak memory of this process up to the end, of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures one phase."""
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 3)
        self.peak_bytes[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def over(self, group: Group) -> dict[str, dict[str, float]]:
        """The largest of all workers."""
        names = list(self.seconds)
        here = torch.tensor([[self.seconds[n], float(self.peak_bytes[n])] for n in names], dtype=torch.float64)
        most = group.max(here)
        return {
            "seconds": {name: round(float(most[i, 0]), 3) for i, name in enumerate(names)},
            "peak_memory_bytes": {name: int(most[i, 1]) for i, name in enumerate(names)},
        }


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets torch's CPU threads while the block runs, and puts them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
