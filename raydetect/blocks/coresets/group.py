"""Groups of workers: the collectives needed for merging, for a single worker or over torch.distributed.

Transferred tensors are on the CPU (gloo); nothing is pickled.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)


class Group:
    """A single worker: every collective returns its input.

    Attributes:
        rank: index of this worker, from 0.
        size: number of workers.
    """

    rank = 0
    size = 1

    def gather(self, rows_N: Tensor) -> list[Tensor]:
        """The tensors of all workers, in rank order; lengths along dim 0 may differ."""
        return [rows_N]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of all workers, in rank order."""
        return [data]

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all workers."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all workers."""
        return values

    def broadcast(self, values: Tensor, root: int) -> Tensor:
        """The tensor of `root`; other workers pass one of the same shape and dtype, which is overwritten."""
        return values


class TorchGroup(Group):
    """The default process group of torch.distributed."""

    def __init__(self) -> None:
        """Reads rank and size; the process group must be initialised."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, rows_N: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        rows_N = rows_N.contiguous()
        lengths = self._lengths(len(rows_N))
        longest = max(lengths)
        padded = rows_N.new_zeros((longest, *rows_N.shape[1:]))
        padded[: len(rows_N)] = rows_N
        found = [torch.empty_like(padded) for _ in range(self.size)]
        if longest:
            dist.all_gather(found, padded)
        return [part[:length] for part, length in zip(found, lengths, strict=True)]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """See `Group.gather_bytes`."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        return [part.numpy().tobytes() for part in self.gather(mine)]

    def sum(self, values: Tensor) -> Tensor:
        """See `Group.sum`."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        """See `Group.max`."""
        most = values.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most

    def broadcast(self, values: Tensor, root: int) -> Tensor:
        """See `Group.broadcast`."""
        values = values.contiguous()
        dist.broadcast(values, root)
        return values

    def _lengths(self, length: int) -> Sequence[int]:
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor([length]))
        return [int(one) for one in found]
