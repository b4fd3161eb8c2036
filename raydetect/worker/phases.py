"""Seconds, peak memory and threads of the phases of a fit."""

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from raydetect.blocks.group import Group
from raydetect.spec import FitSpec, public_spec


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


def measured_facts(spec: FitSpec, phases: Phases, group: Group, counts: Mapping[str, int]) -> dict[str, Any]:
    """What the record tells of how a fit went; `counts` are images by what was done with them."""
    measured = phases.over(group)
    rate = counts["held_out"] / max(measured["seconds"]["calibrate"], 1e-9) / group.size
    return {
        "spec": public_spec(spec),
        "images": dict(counts),
        "workers": group.size,
        "images_per_second": round(rate, 3),
        **measured,
    }


def merged_facts(facts: Mapping[str, Any], trained: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a detector measured, with what its training told; for an ensemble, member by member."""
    if "members" not in facts:
        return {**trained[0], **facts}
    members = [{**told, **own} for told, own in zip(trained, facts["members"], strict=True)]
    return {**facts, "members": members}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets torch's CPU threads while the block runs, and puts them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
