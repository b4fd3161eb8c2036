"""PatchCore: normal patch embeddings, thinned to a coreset; a patch is as anomalous as it is far from all of them.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265.
Differs from the paper: the levels are concatenated at their own widths instead of being pooled to 1024 dims, and the
deeper ones are upsampled bilinearly after the 3x3 averaging; the greedy coreset works on integer-rounded projections,
so that it is the same on any machine; images are resized, not resized and centre-cropped.

Shapes: B images, h w feature grid, N patches (B * h * w), M bank rows, D feature dim, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from raydetect.blocks.anomaly_map import smooth, upsample
from raydetect.blocks.backbone import Backbone
from raydetect.blocks.coreset import greedy_coreset
from raydetect.blocks.neighbors import BankSearch
from raydetect.blocks.pyramid import patch_embeddings
from raydetect.detectors._base import Batch, Detector, DetectorInfo, FitState, NotFittedError, Scores
from raydetect.detectors._weights import load_backbone
from raydetect.errors import ArtifactError

EMBEDDINGS = "embeddings"
BACKBONE = "backbone."


class PatchCore(Detector):
    """Nearest-neighbour distance to a coreset of locally aware patch embeddings."""

    info = DetectorInfo(
        title="PatchCore",
        paper="arXiv:2106.08265",
        venue="CVPR 2022",
        summary="distance of every patch to a coreset of normal patch embeddings",
        published="MVTec AD, WideResNet-50, 10 %: 99.1 image AUROC, 98.1 pixel AUROC, 94.3 PRO (paper, tables 1-3)",
    )
    phases = ("collect",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of PatchCore."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.1)")] = "wide_resnet50_2"
        layers: Annotated[
            tuple[str, ...], Field(min_length=1, description="used levels, shallowest first (sec. 3.1)")
        ] = ("layer2", "layer3")
        weights: Annotated[str, Field(description='"imagenet", "random", or a path or URL of a weights file')] = (
            "imagenet"
        )
        coreset_sampling_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of patch embeddings kept in the memory bank (sec. 3.2)")
        ] = 0.1
        max_bank_vectors: Annotated[
            int | None, Field(ge=1, description="upper bound on rows of the memory bank; none = no bound")
        ] = None
        projected_dims: Annotated[
            int | None, Field(ge=1, description="dims the coreset is chosen in (sec. 3.2); none = all")
        ] = 128
        n_neighbors: Annotated[
            int, Field(ge=1, description="bank rows that re-weight the image score (eq. 7, b); 1 = off")
        ] = 9
        smoothing_sigma: Annotated[
            float, Field(ge=0, description="Gaussian smoothing of the anomaly map in px (sec. 3.3)")
        ] = 4.0

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Keeps the parameters."""
        super().__init__(params, seed)
        self.raw: Backbone | None = None
        self.backbone: Backbone | None = None
        self.search: BankSearch | None = None

    def load_weights(self) -> str:
        """Loads the backbone."""
        raw, said = load_backbone(self.params.backbone, self.params.layers, self.params.weights, self.seed)
        self._set_backbone(raw)
        return said

    def collect(self, batch: Batch) -> FitState:
        """Patch embeddings of every image."""
        embeddings_BhwD = self._embed(batch.images_BCHW)
        flat_BND = embeddings_BhwD.flatten(1, 2).cpu()
        return FitState({key: {EMBEDDINGS: flat_BND[i].clone()} for i, key in enumerate(batch.keys)})

    def finish(self, state: FitState) -> None:
        """Chooses the coreset over all images, in order of keys."""
        embeddings_ND = state.stacked(EMBEDDINGS)
        count = max(1, round(len(embeddings_ND) * self.params.coreset_sampling_ratio))
        count = min(count, self.params.max_bank_vectors or count)
        rows_M = greedy_coreset(embeddings_ND, count, seed=self.seed, projected_dims=self.params.projected_dims)
        self.search = BankSearch(embeddings_ND[rows_M].to(self.device))

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Image scores by eq. 7 and maps of nearest distances."""
        if self.search is None:
            raise NotFittedError("patchcore: is not fitted. Fit it or load an artifact first.")
        embeddings_BhwD = self._embed(images_BCHW)
        grid = embeddings_BhwD.shape[:3]
        patches_ND = embeddings_BhwD.flatten(0, 2)
        distance_N1, index_N1 = self.search.nearest(patches_ND)
        distance_BN = distance_N1.view(grid[0], -1)
        worst_B = distance_BN.argmax(1)
        place_B = torch.arange(grid[0], device=worst_B.device) * distance_BN.shape[1] + worst_B
        image_score_B = self._reweighted(patches_ND[place_B], distance_N1[place_B, 0], index_N1[place_B, 0])
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = smooth(upsample(distance_N1.view(grid), size_px), self.params.smoothing_sigma)
        return Scores(image_score_B, map_BHW)

    def _reweighted(self, worst_BD: Tensor, distance_B: Tensor, index_B: Tensor) -> Tensor:
        """Eq. 7: s = (1 - exp(d*) / sum over the b rows nearest to m* of exp(d)) * d*, in a stable form."""
        assert self.search is not None
        count = min(self.params.n_neighbors, len(self.search.bank_MD))
        if count == 1:
            return distance_B
        neighbours_BK = self.search.nearest(self.search.bank_MD[index_B], count)[1]
        differences_BKD = self.search.bank_MD[neighbours_BK] - worst_BD[:, None]
        distance_BK = differences_BKD.square().sum(-1).sqrt()
        share_B = torch.exp(distance_B - torch.logsumexp(distance_BK, 1))
        return (1.0 - share_B) * distance_B

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        if self.backbone is None:
            raise NotFittedError("patchcore: has no backbone yet. Call load_weights or load an artifact first.")
        return patch_embeddings(self.backbone(images_BCHW))

    def _set_backbone(self, raw: Backbone) -> None:
        self.raw = raw
        self.backbone = raw.frozen().to(self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Backbone weights and memory bank."""
        if self.search is None or self.raw is None:
            raise NotFittedError("patchcore: is not fitted, there is nothing to save.")
        weights = {BACKBONE + name: value for name, value in self.raw.weights().items()}
        return {"bank": self.search.bank_MD, **weights}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores backbone and memory bank."""
        if "bank" not in tensors:
            raise ArtifactError("patchcore: the artifact has no tensor 'bank'. Fit again.")
        raw = Backbone(self.params.backbone, self.params.layers, self.seed)
        raw.load({name.removeprefix(BACKBONE): value for name, value in tensors.items()}, "the artifact")
        self._set_backbone(raw)
        self.search = BankSearch(tensors["bank"].to(self.device))

    def to(self, device: torch.device) -> "PatchCore":
        """Moves backbone and memory bank."""
        self.device = device
        if self.backbone is not None:
            self.backbone.to(device)
        if self.search is not None:
            self.search = self.search.to(device)
        return self
