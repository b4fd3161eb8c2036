"""Time and peak memory of the phases of a fit, and the number of torch threads."""

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from raydetect.blocks.coresets.group import Group
from raydetect.config import FitSpec, public_spec


@dataclass(slots=True)
class Phases:
    """Seconds of each phase, and this process's peak memory at its end."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures one phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
        self.peak_bytes[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def over(self, group: Group) -> dict[str, dict[str, float]]:
        """The maximum over all workers."""
        names = list(self.seconds)
        here = torch.tensor([[self.seconds[n], float(self.peak_bytes[n])] for n in names], dtype=torch.float64)
        most = group.max(here)
        return {
            "seconds": {name: round(float(most[i, 0]), 3) for i, name in enumerate(names)},
            "peak_memory_bytes": {name: int(most[i, 1]) for i, name in enumerate(names)},
        }


def measured_facts(spec: FitSpec, phases: Phases, group: Group, counts: Mapping[str, int]) -> dict[str, Any]:
    """The record's fields on how a fit went; `counts` is the number of images by their use."""
    measured = phases.over(group)
    seconds = max(measured["seconds"]["calibrate"], 1e-9) * group.size
    rate = counts["held_out"] / seconds
    tiles = {"tiles_per_second": round(counts["held_out_tiles"] / seconds, 3)} if "held_out_tiles" in counts else {}
    return {
        "spec": public_spec(spec),
        "images": dict(counts),
        "workers": group.size,
        "images_per_second": round(rate, 3),
        **tiles,
        **measured,
    }


def merged_facts(facts: Mapping[str, Any], trained: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the facts of a detector with those of its training; for an ensemble, member by member."""
    if "members" not in facts:
        return {**trained[0], **facts}
    members = [{**training, **own} for training, own in zip(trained, facts["members"], strict=True)]
    return {**facts, "members": members}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of torch's CPU threads for the block and restores it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
