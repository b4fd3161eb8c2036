"""Workers that fit together: the few collectives that merging needs, alone or over torch.distributed.

Tensors on the wire lie in CPU memory (gloo); nothing is pickled.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)


class Group:
    """One worker alone: every collective gives back what went in.

    Attributes:
        rank: number of this worker, from 0.
        size: how many there are.
    """

    rank = 0
    size = 1

    def gather(self, rows_N: Tensor) -> list[Tensor]:
        """Everyone's tensor, in order of ranks; they may differ in length along dim 0."""
        return [rows_N]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, in order of ranks."""
        return [data]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers, element by element."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over all workers, element by element."""
        return values

    def broadcast(self, values: Tensor, root: int) -> Tensor:
        """The tensor of `root`; the others give one of the same shape and dtype, which is overwritten."""
        return values


class TorchGroup(Group):
    """The workers of torch.distributed's default process group."""

    def __init__(self) -> None:
        """Reads rank and size; the process group must be up."""
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
