"""Search over a bank sharded across actors, with the same results as a search over the whole bank.

Shapes: N patches, D feature dim, K neighbours, X any leading shape.
"""

import numpy as np
import ray
import torch
from torch import Tensor

from raydetect.blocks.search.search import Search, merge_answers, split_bank
from raydetect.distributed.scoring.bank_actors import Bank


class RemoteSearch(Search):
    """Queries all shards in parallel and merges their results.

    Performance: every call sends the patches to all actors, and each actor serves one call at a time.
    """

    def __init__(self, bank: Bank) -> None:
        """Stores the actor handles."""
        self.bank_actors = bank
        self.pieces = split_bank(bank.num_rows, len(bank.actors))

    @property
    def num_rows(self) -> int:
        """Number of rows of all shards."""
        return self.bank_actors.num_rows

    @property
    def dims(self) -> int:
        """Feature dimension D."""
        return self.bank_actors.dims

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """Distances and indices of the K nearest rows of the bank, on the device of the patches."""
        self.check(patches_ND, num_neighbors)
        patches_ref = ray.put(patches_ND.float().cpu().numpy())
        piece_answers = ray.get([actor.nearest.remote(patches_ref, num_neighbors) for actor in self.bank_actors.actors])
        device = patches_ND.device
        answers = [
            (torch.tensor(distance).to(device), torch.tensor(index).to(device)) for distance, index in piece_answers
        ]
        return merge_answers(answers, [start for start, _ in self.pieces], num_neighbors)

    def rows(self, index_X: Tensor) -> Tensor:
        """Returns rows by their index in the whole bank, on the device of the indices."""
        index = index_X.cpu().numpy()
        rows_XD = np.empty((*index.shape, self.dims), dtype=np.float32)
        pending = []
        for actor, (start, stop) in zip(self.bank_actors.actors, self.pieces, strict=True):
            in_shard = (index >= start) & (index < stop)
            if in_shard.any():
                pending.append((in_shard, actor.rows.remote(index[in_shard] - start)))
        for in_shard, rows in pending:
            rows_XD[in_shard] = ray.get(rows)
        return torch.from_numpy(rows_XD).to(index_X.device)

    def to(self, device: torch.device) -> "RemoteSearch":
        """Returns itself; results are on the device of the query."""
        return self
