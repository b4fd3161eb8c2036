"""Differences of a patch from its nearest normal patches, and a small network that maps them to an anomaly score.

The network is trained on simulated defects (`blocks/augment/simulated_defect.py`), so a constant output does not
minimise its loss. Not a published method.

Shapes: B images, H W pixels, h w feature grid, N patches, M bank rows, D feature dim, K neighbours, U hidden units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from raydetect.blocks.search.neighbors import BankSearch
from raydetect.blocks.seeding import keyed_seed

NORMAL_PATCHES = 128  # per image and step; all planted patches are used
WHOLLY = 0.5  # minimum share of a patch covered by a defect
LEAST_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class Differences:
    """Patches, as differences from normal ones.

    Attributes:
        values_ND: differences, see `mean_difference`.
        simulated_N: 1 in a planted defect, else 0; float.
        weight_N: loss weights; they sum to one per image.
    """

    values_ND: Tensor
    simulated_N: Tensor
    weight_N: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Differences"]) -> "Differences":
        """Concatenates the differences of several images."""
        values, simulate_defect, weights = zip(
            *((part.values_ND, part.simulated_N, part.weight_N) for part in parts), strict=True
        )
        return cls(torch.cat(values), torch.cat(simulate_defect), torch.cat(weights))


class DifferenceNet(nn.Module):
    """Anomaly logit from absolute differences to normal features.

    A weighted sum of the differences plus a nonlinear hidden layer. All weights are positive (softplus of free
    parameters) and the activation is increasing, so the logit is monotonic in every difference, whatever the training
    defects.
    """

    def __init__(self, dims: int, hidden: int) -> None:
        """Draws weights from torch's global generator; `scale_D` is the unit of the differences."""
        super().__init__()
        self.raw_1D = nn.Parameter(0.5 * torch.randn(1, dims))
        self.raw_UD = nn.Parameter(0.5 * torch.randn(hidden, dims))
        self.bias_U = nn.Parameter(torch.linspace(-2.0, 2.0, hidden))
        self.raw_1U = nn.Parameter(0.5 * torch.randn(1, hidden))
        self.bias_1 = nn.Parameter(torch.full((1,), -1.0))
        self.scale_D: Tensor
        self.register_buffer("scale_D", torch.ones(dims))

    def measure_in_spreads_of(self, bank_MD: Tensor) -> None:
        """Sets the unit of differences to the standard deviations of the bank's rows."""
        self.scale_D.copy_(bank_MD.std(0, correction=0).clamp_min(LEAST_SPREAD))

    def forward(self, differences_ND: Tensor) -> Tensor:
        """Logits, (N,)."""
        scaled_ND = differences_ND / self.scale_D
        hidden_NU = F.softplus(_positive(scaled_ND, self.raw_UD) + self.bias_U)
        return (_positive(scaled_ND, self.raw_1D) + _positive(hidden_NU, self.raw_1U) + self.bias_1)[:, 0]

    def loss(self, piece: Differences) -> Tensor:
        """Cross-entropy of planted versus normal patches, averaged over images that have any."""
        losses_N = F.binary_cross_entropy_with_logits(self(piece.values_ND), piece.simulated_N, reduction="none")
        return (losses_N * piece.weight_N).sum() / piece.weight_N.sum().clamp_min(1)


def _positive(values: Tensor, raw: Tensor) -> Tensor:
    """A linear map with positive weights, averaged over the inputs."""
    return F.linear(values, F.softplus(raw) / raw.shape[1])


def mean_difference(patches_ND: Tensor, bank_MD: Tensor, index_NK: Tensor) -> Tensor:
    """Absolute difference per dim, averaged over the K neighbours, (N, D); processes one neighbour at a time."""
    total_ND = torch.zeros_like(patches_ND)
    for index_N in index_NK.unbind(1):
        total_ND += (patches_ND - bank_MD[index_N]).abs()
    return total_ND / index_NK.shape[1]


def nearest_others(patches_ND: Tensor, bank_MD: Tensor, own_M: Tensor, num_neighbors: int) -> Tensor:
    """The K rows nearest to each patch, excluding rows of its own image, int64 (N, K).

    Excluding an image's own rows makes training images equivalent to new ones, which have no rows in the bank.
    """
    distance_NM = torch.cdist(patches_ND, bank_MD).masked_fill(own_M, torch.inf)
    return distance_NM.topk(num_neighbors, largest=False).indices


class NormalPatches:
    """Normal patches for comparison, and the image each comes from."""

    def __init__(self, bank_MD: Tensor, num_neighbors: int, keys_M: Sequence[str] = ()) -> None:
        """Stores the bank.

        Args:
            bank_MD: float32, not empty.
            num_neighbors: K; capped at the number of rows.
            keys_M: image keys, only needed for training.
        """
        self.search = BankSearch(bank_MD)
        self.num_neighbors = min(num_neighbors, len(bank_MD))
        self.owner_M = torch.tensor([_owner(key) for key in keys_M], dtype=torch.int64, device=bank_MD.device)

    @property
    def bank(self) -> Tensor:
        """The patches, (M, D)."""
        return self.search.bank_MD

    def distance(self, patches_ND: Tensor) -> Tensor:
        """Mean distance to the K nearest, (N,)."""
        return self.search.nearest(patches_ND, self.num_neighbors)[0].mean(1)

    def difference(self, patches_ND: Tensor) -> Tensor:
        """Mean absolute difference per dim from the K nearest, (N, D)."""
        return mean_difference(patches_ND, self.bank, self.search.nearest(patches_ND, self.num_neighbors)[1])

    def training_differences(
        self, embeddings_BhwD: Tensor, masks: Sequence[Tensor], keys: Sequence[str], generators: Sequence[Generator]
    ) -> Differences:
        """Training differences of images with planted defects, see `labelled_differences`."""
        columns = zip(embeddings_BhwD, masks, keys, generators, strict=True)
        return Differences.joined(
            [
                labelled_differences(
                    grid_hwD, mask_HW, self.bank, self.owner_M == _owner(key), self.num_neighbors, generator
                )
                for grid_hwD, mask_HW, key, generator in columns
            ]
        )

    def to(self, device: torch.device) -> "NormalPatches":
        """Moves the patches and returns itself."""
        self.search, self.owner_M = self.search.to(device), self.owner_M.to(device)
        return self


def _owner(key: str) -> int:
    """Integer id of an image key."""
    return keyed_seed(0, "owner", key)


def labelled_differences(
    embeddings_hwD: Tensor, mask_HW: Tensor, bank_MD: Tensor, own_M: Tensor, num_neighbors: int, generator: Generator
) -> Differences:
    """Training differences of an image with planted defects.

    Args:
        embeddings_hwD: embeddings of the image with the defects.
        mask_HW: defect mask; patches partially covered, but by less than half, are excluded.
        bank_MD: normal patches.
        own_M: True for the bank's rows of this image.
        num_neighbors: K.
        generator: selects among the patches outside the defects.

    Returns:
        The patches in defects and at most NORMAL_PATCHES outside them; both groups have equal total weight.
    """
    covered_N = F.adaptive_avg_pool2d(
        mask_HW[None].float(), (embeddings_hwD.shape[0], embeddings_hwD.shape[1])
    ).flatten()
    inside, outside = (covered_N >= WHOLLY).nonzero()[:, 0], (covered_N == 0).nonzero()[:, 0]
    order = torch.randperm(len(outside), generator=generator)[:NORMAL_PATCHES]
    chosen_ND = embeddings_hwD.flatten(0, 1)[torch.cat([inside, outside[order.to(outside.device)]])]
    simulated_N = (torch.arange(len(chosen_ND), device=chosen_ND.device) < len(inside)).float()
    counts = torch.stack([1 - simulated_N, simulated_N]).sum(1)
    weight_N = (1 / counts)[simulated_N.long()] / (counts > 0).sum()
    index_NK = nearest_others(chosen_ND, bank_MD, own_M, num_neighbors)
    return Differences(mean_difference(chosen_ND, bank_MD, index_NK), simulated_N, weight_N)
