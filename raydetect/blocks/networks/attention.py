"""Multi-head attention over a grid of tokens, with a mask of neighbours and dropout that belongs to each image.

Shapes: B images, N tokens, D dims, h w grid of tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.seeding import mixed_hash

PER_HASH, CHANCES = 4, 1 << 16  # every hash of 64 bits decides about four values


class KeyedDropout:
    """Dropout whose choices depend on a seed for each image alone, not on its batch, worker, device or threads.

    A value is dropped if 16 bits of the hash of its number, among all values of the image since the seed was given, are
    low; so `ratio` is rounded to a multiple of 1 / 65,536, and what is kept is scaled by the rounded share.
    """

    def __init__(self, ratio: float = 0.0, seeds_B: Tensor | None = None) -> None:
        """Stores the share of values to drop, in [0, 1), and the seeds, int64; no seeds = drops nothing."""
        self.dropped, self.seeds_B, self.used = round(ratio * CHANCES), seeds_B, 0

    def __call__(self, values_BX: Tensor) -> Tensor:
        """`values_BX` with some values replaced by 0 and the others scaled, for one seed per row."""
        if self.seeds_B is None or not self.dropped:
            return values_BX
        count = values_BX[0].numel()
        hashes = -(-count // PER_HASH)
        numbers_1M = torch.arange(self.used, self.used + hashes, device=values_BX.device)[None]
        self.used += hashes
        chances_BX = mixed_hash(numbers_1M, self.seeds_B[:, None]).view(torch.int16)[:, :count].view(values_BX.shape)
        kept_BX = chances_BX >= self.dropped - CHANCES // 2
        return values_BX * kept_BX * (CHANCES / (CHANCES - self.dropped))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, sec. 3.2), with queries, keys and values of the same width.

    Initialised as torch's `MultiheadAttention`, apart from the last projection, which is uniform after Glorot too.
    """

    def __init__(self, dims: int, num_heads: int) -> None:
        """Builds the projections; `dims` is a multiple of `num_heads`."""
        super().__init__()
        self.num_heads = num_heads
        self.inputs = nn.Linear(dims, 3 * dims)  # of queries, keys and values
        self.outputs = nn.Linear(dims, dims)
        for layer in (self.inputs, self.outputs):
            glorot(layer)

    def forward(
        self, queries_BND: Tensor, keys_BND: Tensor, values_BND: Tensor, mask_NN: Tensor, drop: KeyedDropout
    ) -> Tensor:
        """Weighted values, (B, N, D).

        Args:
            queries_BND: what attends.
            keys_BND: what is attended to.
            values_BND: what is summed.
            mask_NN: added to the scaled products; -inf excludes a key (column) for a query (row).
            drop: of the attention's weights.
        """
        parts = zip(
            (queries_BND, keys_BND, values_BND), self.inputs.weight.chunk(3), self.inputs.bias.chunk(3), strict=True
        )
        queries, keys, values = (self._heads(F.linear(*part)) for part in parts)
        products_BHNN = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        weights_BHNN = drop((products_BHNN + mask_NN).softmax(-1))
        found: Tensor = self.outputs((weights_BHNN @ values).transpose(1, 2).flatten(2))
        return found

    def _heads(self, tokens_BND: Tensor) -> Tensor:
        """Tokens of every head, (B, heads, N, D / heads)."""
        return tokens_BND.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def glorot(layer: nn.Linear) -> None:
    """Uniform weights after Glorot and Bengio (2010), and zero biases."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def neighbor_mask(grid: tuple[int, int], size: int) -> Tensor:
    """Excludes a token's neighbours and itself: -inf within the square around it, 0 elsewhere, (N, N) float32.

    Args:
        grid: (height, width) in tokens, which are numbered row by row.
        size: side of the square in tokens, odd; it is cut off at the border of the grid.
    """
    rows_N, columns_N = (index.flatten() for index in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    apart = [(index_N[:, None] - index_N[None]).abs() for index_N in (rows_N, columns_N)]
    near_NN = torch.maximum(*apart) <= size // 2
    return torch.zeros(near_NN.shape).masked_fill(near_NN, -torch.inf)
