"""PatchCore: a coreset of normal patch embeddings; a patch's anomaly score is its distance to the nearest one.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265.
Differs from the paper: the greedy coreset uses integer-rounded projections, so it is identical on any machine. Unless
`preset: paper`, the levels are concatenated at their native widths, where the authors' code pools each level to 1024
dims and then all of them together (`embedding_dims`), and images are resized without a centre crop.

Shapes: B images, h w feature grid, N patches (B * h * w), M bank rows, D feature dim, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.backbones.patch_embeddings import patch_embeddings
from raydetect.blocks.coresets.coreset import Coreset, CoresetMode, choose_coreset
from raydetect.blocks.coresets.keyed_rows import FitState, KeyedRows
from raydetect.blocks.maps.anomaly_map import smooth_upsampled, smoothing_reach
from raydetect.blocks.search.faiss_search import BANK_INDEX, FaissSearch, IvfPqSearch, recall_at_1, require_faiss
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.blocks.search.search import Search
from raydetect.blocks.seeding import SkipInitialisation
from raydetect.detectors._base import Batch, Detector, DetectorInfo, NotFittedError, PatchGrid, ProgressCallback, Scores
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import ArtifactError

EMBEDDINGS = "embeddings"
BANK, BANK_SIZE = "bank", "num_embeddings"
EARLIER_BANK, BANK_PART = "earlier-bank:", 1 << 19
BACKBONE = "backbone."
RECALL_PATCHES = 2048


class PatchCore(Detector):
    """Nearest-neighbour distance to a coreset of locally aware patch embeddings."""

    info = DetectorInfo(
        title="PatchCore",
        paper="arXiv:2106.08265",
        venue="CVPR 2022",
        summary="distance of every patch to a coreset of normal patch embeddings",
        published="MVTec AD, WideResNet-50, 10 %: 99.0 image AUROC, 98.1 pixel AUROC, 93.5 PRO (paper, tables 1-3)",
    )
    phases = ("collect",)
    smoke: ClassVar = {"backbone": "resnet18", "image_size": (64, 64), "coreset_sampling_ratio": 0.05}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of PatchCore."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.1)")] = "wide_resnet50_2"
        layers: Annotated[
            tuple[str, ...], Field(min_length=1, description="used levels, shallowest first (sec. 3.1)")
        ] = ("layer2", "layer3")
        weights: WeightsName = "imagenet"
        embedding_dims: Annotated[
            int | None,
            Field(
                ge=1,
                description="dims to pool the 3x3 neighbourhoods of each level, then all levels together, to (authors' "
                "code: 1024, as in preset: paper); none = 3x3 means of the levels at their native widths",
            ),
        ] = None
        coreset_sampling_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of patch embeddings kept in the memory bank (sec. 3.2)")
        ] = 0.1
        max_bank_vectors: Annotated[
            int | None, Field(ge=1, description="maximum number of rows in the memory bank; none = no limit")
        ] = None
        coreset_mode: Annotated[
            CoresetMode,
            Field(
                description="exact: greedy k-center over all patches, identical for any number of workers; composable: "
                "two rounds, for banks larger than memory; random: for comparison"
            ),
        ] = "exact"
        projected_dims: Annotated[
            int | None, Field(ge=1, description="projected dims for choosing the coreset (sec. 3.2); none = all")
        ] = 384
        n_neighbors: Annotated[
            int, Field(ge=1, description="bank rows for re-weighting the image score (eq. 7, b); 1 = off")
        ] = 9
        search: Annotated[
            Literal["exact", "bfloat16", "faiss", "ivfpq"],
            Field(
                description="search of the bank: exact (torch, float32), bfloat16 (candidates refined in float32; for "
                "GPUs) and faiss (flat, on CPUs) give identical scores; ivfpq (faiss) is approximate, with its "
                "recall stored in the artifact"
            ),
        ] = "exact"
        smoothing_sigma: Annotated[
            float, Field(ge=0, le=1000, description="Gaussian smoothing of the anomaly map in px (sec. 3.3)")
        ] = 4.0

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.backbone: Backbone | None = None
        self.search: Search | None = None
        self.coreset: Coreset | None = None
        self.num_embeddings = 0
        self.recall: dict[str, Any] = {}

    def load_weights(self) -> str:
        """Loads the backbone."""
        if self.params.search in ("faiss", "ivfpq"):
            require_faiss()  # fail before a fit that may take hours
        p = self.params
        backbone, source = load_backbone(p.backbone, p.layers, p.weights, self.seed, p.precision)
        self.backbone = backbone.freeze().to(self.device)
        return source

    @property
    def scores_by_map(self) -> bool:
        """Yes; without pixels that are ignored, the image score is re-weighted besides (eq. 7)."""
        return True

    def patch_grids(self) -> dict[str, PatchGrid]:
        """The grid of the first layer."""
        assert self.backbone is not None
        _, height, width = self.backbone.shapes(self.params.image_size)[0]
        reach_px = smoothing_reach((height, width), self.params.image_size, self.params.smoothing_sigma)
        return {EMBEDDINGS: PatchGrid(height, width, reach_px)}

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Patch embeddings of every image."""
        return {EMBEDDINGS: self._embed(batch.images_BCHW).flatten(1, 2)}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Chooses the coreset over the images of all workers."""
        rows = state.rows[EMBEDDINGS]
        self.num_embeddings = rows.total_stands_for()
        wanted = max(1, round(self.num_embeddings * self.params.coreset_sampling_ratio))
        count = min(wanted, rows.total(), self.params.max_bank_vectors or wanted)
        self.coreset = choose_coreset(
            rows,
            count,
            seed=self.seed,
            mode=self.params.coreset_mode,
            projected_dims=self.params.projected_dims,
            device=self.device,
            on_progress=lambda more: on_progress(more, count),
        )
        self.search = self._make_search(self.coreset.rows_MD.to(self.device))
        self.recall = {} if self.search.exact else self._measured_recall(rows)

    def _make_search(self, bank_MD: Tensor, stored: Tensor | None = None) -> Search:
        """The search selected by the parameters; `stored` is the saved index for ivfpq."""
        match self.params.search:
            case "faiss":
                return FaissSearch(bank_MD)
            case "ivfpq":
                return IvfPqSearch(bank_MD, self.seed, stored)
            case "bfloat16":
                return BankSearch(bank_MD, "bfloat16")
            case "exact":
                return BankSearch(bank_MD)

    def _measured_recall(self, rows: KeyedRows) -> dict[str, Any]:
        """Recall of an approximate search, on a sample of embeddings that are not in the coreset."""
        assert self.search is not None
        bank_MD = self.search.bank().to(self.device)
        patches_ND = rows.sample(2 * RECALL_PATCHES, self.seed).to(self.device)
        held_out_ND = patches_ND[BankSearch(bank_MD).nearest(patches_ND)[0][:, 0] > 0][:RECALL_PATCHES]
        if not len(held_out_ND):
            return {}
        recall = recall_at_1(self.search, bank_MD, held_out_ND)
        return {"recall_at_1": round(recall, 4), "patches": len(held_out_ND)}

    def extend(self, state: FitState) -> None:
        """Adds the bank's rows as those of extra images; they stand for all embeddings they were chosen from."""
        if self.search is None:
            raise NotFittedError("patchcore: is not fitted, there is nothing to extend.")
        bank_MD = self.search.bank().cpu()
        for number, part_RD in enumerate(bank_MD.split(BANK_PART)):
            state.add([f"{EARLIER_BANK}{number}"], {EMBEDDINGS: part_RD[None]})
        state.rows[EMBEDDINGS].stands_for += self.num_embeddings - len(bank_MD)

    def facts(self) -> dict[str, Any]:
        """How the bank was chosen, from how many patch embeddings, and how it is searched, with measured recall."""
        chosen = {} if self.coreset is None else {"coreset": {**self.coreset.facts(), "of": self.num_embeddings}}
        return {**chosen, "search": {"kind": self.params.search, **self.recall}}

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Image scores (eq. 7) and maps of nearest-neighbour distances."""
        if self.search is None:
            raise NotFittedError("patchcore: is not fitted. Fit it or load an artifact first.")
        embeddings_BhwD = self._embed(images_BCHW)
        grid = embeddings_BhwD.shape[:3]
        patches_ND = embeddings_BhwD.flatten(0, 2)
        distance_N1, index_N1 = self.search.nearest(patches_ND)
        distance_BN = distance_N1.view(grid[0], -1)
        worst_B = distance_BN.argmax(1)
        row_B = torch.arange(grid[0], device=worst_B.device) * distance_BN.shape[1] + worst_B
        image_score_B = self._reweighted(patches_ND[row_B], distance_N1[row_B, 0], index_N1[row_B, 0])
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = smooth_upsampled(distance_N1.view(grid), size_px, self.params.smoothing_sigma)
        return Scores(image_score_B, map_BHW)

    def _reweighted(self, worst_BD: Tensor, distance_B: Tensor, index_B: Tensor) -> Tensor:
        """Eq. 7: s = (1 - exp(d*) / sum of exp(d) over the b rows nearest to m*) * d*, numerically stable."""
        assert self.search is not None
        count = min(self.params.n_neighbors, self.search.num_rows)
        if count == 1:
            return distance_B
        neighbours_BK = self.search.nearest(self.search.rows(index_B), count)[1]
        differences_BKD = self.search.rows(neighbours_BK) - worst_BD[:, None]
        distance_BK = differences_BKD.square().sum(-1).sqrt()
        share_B = torch.exp(distance_B - torch.logsumexp(distance_BK, 1))
        return (1.0 - share_B) * distance_B

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        if self.backbone is None:
            raise NotFittedError("patchcore: has no backbone yet. Call load_weights or load an artifact first.")
        return patch_embeddings(self.backbone(images_BCHW), self.params.embedding_dims)

    def tensors(self) -> dict[str, Tensor]:
        """Backbone weights and memory bank."""
        if self.search is None or self.backbone is None:
            raise NotFittedError("patchcore: is not fitted, there is nothing to save.")
        weights = {BACKBONE + name: value for name, value in self.backbone.weights().items()}
        size = torch.tensor([self.num_embeddings])
        return {BANK: self.search.bank(), BANK_SIZE: size, **self.search.tensors(), **weights}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the backbone and the memory bank."""
        needed = [BANK, BANK_SIZE, *([BANK_INDEX] if self.params.search == "ivfpq" else [])]
        for name in needed:
            if name not in tensors:
                raise ArtifactError(f"patchcore: the artifact has no tensor {name!r}. Fit again.")
        self.load_beside(tensors, self._make_search(tensors[BANK].to(self.device), tensors.get(BANK_INDEX)))

    def memory_bank(self) -> str | None:
        """The bank, unless its search is an index trained on the whole bank."""
        return None if self.params.search == "ivfpq" else BANK

    def piece_search(self, piece_MD: Tensor) -> Search:
        """A search over a contiguous run of rows."""
        return self._make_search(piece_MD)

    def load_beside(self, tensors: Mapping[str, Tensor], search: Search) -> None:
        """Restores the backbone; `search` holds the bank."""
        with SkipInitialisation():
            backbone = Backbone(self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
        backbone.load({name.removeprefix(BACKBONE): value for name, value in tensors.items()}, "the artifact")
        self.backbone = backbone.freeze().to(self.device)
        self.search = search
        self.num_embeddings = int(tensors[BANK_SIZE][0])

    def to(self, device: torch.device) -> "PatchCore":
        """Moves the backbone and the memory bank."""
        self.device = device
        if self.backbone is not None:
            self.backbone.to(device)
        if self.search is not None:
            self.search = self.search.to(device)
        return self
