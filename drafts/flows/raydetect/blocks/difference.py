"""How a patch differs from its nearest normal patches, and a small network that says how anomalous that is.

Shapes: N patches, M bank rows, D feature dim, K neighbours, U hidden units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

NORMAL_PATCHES = 128  # of every image and step; its planted patches are all taken
WHOLLY = 0.5  # share of a patch that a defect must cover


@dataclass(frozen=True, slots=True)
class Differences:
    """Patches and how they differ from normal ones.

    Attributes:
        values_ND: see `mean_difference`.
        planted_N: 1 in a planted defect, else 0; float.
        weight_N: what its loss counts; those of an image sum to one.
    """

    values_ND: Tensor
    planted_N: Tensor
    weight_N: Tensor


class DifferenceNet(nn.Module):
    """Logit of being anomalous, from the absolute differences to normal features.

    A weighted sum of the differences, and a hidden layer that bends it. All weights are positive (a softplus of free
    ones) and hidden units rise everywhere, so that to differ more always means to be more anomalous, whatever the
    defects that it is trained on.
    """

    def __init__(self, dims: int, hidden: int) -> None:
        """Draws weights from torch's global generator; `scale_D` is what differences are measured in."""
        super().__init__()
        self.raw_1D = nn.Parameter(0.5 * torch.randn(1, dims))
        self.raw_UD = nn.Parameter(0.5 * torch.randn(hidden, dims))
        self.bias_U = nn.Parameter(torch.linspace(-2.0, 2.0, hidden))
        self.raw_1U = nn.Parameter(0.5 * torch.randn(1, hidden))
        self.bias_1 = nn.Parameter(torch.full((1,), -1.0))
        self.scale_D: Tensor
        self.register_buffer("scale_D", torch.ones(dims))

    def forward(self, differences_ND: Tensor) -> Tensor:
        """Logits, (N,)."""
        scaled_ND = differences_ND / self.scale_D
        hidden_NU = F.softplus(_positive(scaled_ND, self.raw_UD) + self.bias_U)
        return (_positive(scaled_ND, self.raw_1D) + _positive(hidden_NU, self.raw_1U) + self.bias_1)[:, 0]


def _positive(values: Tensor, raw: Tensor) -> Tensor:
    """A linear map with positive weights, as a mean over what comes in."""
    return F.linear(values, F.softplus(raw) / raw.shape[1])


def mean_difference(patches_ND: Tensor, bank_MD: Tensor, index_NK: Tensor) -> Tensor:
    """Absolute difference of every dim, averaged over the K neighbours, (N, D); memory for one neighbour at a time."""
    total_ND = torch.zeros_like(patches_ND)
    for index_N in index_NK.unbind(1):
        total_ND += (patches_ND - bank_MD[index_N]).abs()
    return total_ND / index_NK.shape[1]


def nearest_others(patches_ND: Tensor, bank_MD: Tensor, own_M: Tensor, num_neighbors: int) -> Tensor:
    """The K rows nearest to each patch among those that do not come from its own image, int64 (N, K).

    An image in the bank finds itself there; a new one does not. Without its own rows it is as a new one would be.
    """
    distance_NM = torch.cdist(patches_ND, bank_MD).masked_fill(own_M, torch.inf)
    return distance_NM.topk(num_neighbors, largest=False).indices


def labelled_differences(
    patches_ND: Tensor, covered_N: Tensor, bank_MD: Tensor, own_M: Tensor, num_neighbors: int, generator: Generator
) -> Differences:
    """What an image with a planted defect teaches.

    Args:
        patches_ND: all patches of the image.
        covered_N: which share of each the defect covers; patches that it covers by less than a half are left out.
        bank_MD: normal patches.
        own_M: which of them come from this image.
        num_neighbors: K.
        generator: chooses among the patches beside the defect.

    Returns:
        The patches in the defect and as many as NORMAL_PATCHES beside it; both groups count the same in all.
    """
    inside, outside = (covered_N >= WHOLLY).nonzero()[:, 0], (covered_N == 0).nonzero()[:, 0]
    order = torch.randperm(len(outside), generator=generator)[:NORMAL_PATCHES]
    chosen_ND = patches_ND[torch.cat([inside, outside[order.to(outside.device)]])]
    planted_N = (torch.arange(len(chosen_ND), device=chosen_ND.device) < len(inside)).float()
    counts = torch.stack([1 - planted_N, planted_N]).sum(1)
    weight_N = (1 / counts)[planted_N.long()] / (counts > 0).sum()
    index_NK = nearest_others(chosen_ND, bank_MD, own_M, num_neighbors)
    return Differences(mean_difference(chosen_ND, bank_MD, index_NK), planted_N, weight_N)


def joined(parts: Sequence[Differences]) -> Differences:
    """Those of several images as one."""
    return Differences(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("values_ND", "planted_N", "weight_N"))
    )
