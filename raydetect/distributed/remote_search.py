"""A search whose bank lies in pieces in other actors; the same answer as one search over the whole.

Shapes: N patches, D feature dim, K neighbours, X any leading shape.
"""

import numpy as np
import ray
import torch
from torch import Tensor

from raydetect.blocks.search import Search, cut_bank, merge_answers
from raydetect.distributed.bank import Bank


class RemoteSearch(Search):
    """Sends patches to every piece at once and merges what comes back.

    Cost that surprises: every call is a round trip that carries the patches; the actors serve one call at a time.
    """

    def __init__(self, bank: Bank) -> None:
        """Keeps the handles."""
        self.bank_actors = bank
        self.pieces = cut_bank(bank.num_rows, len(bank.actors))

    @property
    def num_rows(self) -> int:
        """Rows of all pieces."""
        return self.bank_actors.num_rows

    @property
    def dims(self) -> int:
        """D."""
        return self.bank_actors.dims

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """The K nearest rows of all pieces, on the device of the patches."""
        self.check(patches_ND, num_neighbors)
        sent = ray.put(patches_ND.float().cpu().numpy())
        found = ray.get([actor.nearest.remote(sent, num_neighbors) for actor in self.bank_actors.actors])
        device = patches_ND.device
        answers = [(torch.tensor(distance).to(device), torch.tensor(index).to(device)) for distance, index in found]
        return merge_answers(answers, [start for start, _ in self.pieces], num_neighbors)

    def rows(self, index_X: Tensor) -> Tensor:
        """Rows by their numbers in the whole bank, on the device of the numbers."""
        index = index_X.cpu().numpy()
        found = np.empty((*index.shape, self.dims), dtype=np.float32)
        waiting = []
        for actor, (start, stop) in zip(self.bank_actors.actors, self.pieces, strict=True):
            mine = (index >= start) & (index < stop)
            if mine.any():
                waiting.append((mine, actor.rows.remote(index[mine] - start)))
        for mine, rows in waiting:
            found[mine] = ray.get(rows)
        return torch.from_numpy(found).to(index_X.device)

    def to(self, device: torch.device) -> "RemoteSearch":
        """Itself: answers go to the device of the question."""
        return self
