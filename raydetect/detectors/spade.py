"""SPADE: scores an image by its distance to the nearest normal images, and each position by its best match in them.

An image is compared with all normal images by one pooled feature; each of its positions is then matched to the most
similar position, anywhere, in the K nearest images, by the features of the whole pyramid.

Source: Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", arXiv 2005.02357:
eq. 2, d(y) = 1/K sum over the K nearest of |f - f_y|^2, and eq. 3 with kappa = 1, as in all of its experiments,
d(y, p) = min over q in the K images of |F(x, q) - F(y, p)|^2, where F concatenates the levels (sec. 3.4).
Differs from the paper: images are resized without a centre crop; every image gets a map, not only those whose image
score exceeds a threshold. The paper does not specify how levels of different size are concatenated; here a position
takes the features of the coarser cells that contain it. `align` is only discussed in the paper (sec. 5).

Shapes: B images, N gallery images, K nearest of them, L levels, R rows of a level, C channels, h w feature grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.anomaly_map import smooth_upsampled
from raydetect.blocks.search.correspondence import PyramidGallery, PyramidLayout
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.blocks.seeding import SkipInitialisation
from raydetect.detectors._base import Batch, Detector, DetectorInfo, NotFittedError, ProgressCallback, Scores
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import ArtifactError, SpecError

POOLED, GRIDS, LEVEL = "pooled", "grids", "level:"
BACKBONE = "backbone."
EARLIER = "earlier-image:"
ALIGNED_SHARE = 8  # `align: true` means 1 / ALIGNED_SHARE of the image height


class SPADE(Detector):
    """Distance to the nearest normal images, and of every position to its match in them."""

    info = DetectorInfo(
        title="SPADE",
        paper="arXiv:2005.02357",
        venue="arXiv 2020",
        summary="distance to the nearest normal images, and of every position to its most similar one in them",
        published="MVTec AD, WideResNet-50: 85.5 image AUROC, 96.0 pixel AUROC, 91.7 PRO (paper, tables 1-3)",
    )
    phases = ("collect",)
    smoke: ClassVar = {"backbone": "resnet18", "image_size": (64, 64), "k_neighbors": 8, "smoothing_sigma": 1.0}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of SPADE."""

        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 3.5)")] = "wide_resnet50_2"
        feature_levels: Annotated[
            tuple[str, ...], Field(min_length=1, description="levels to match, shallowest first (sec. 3.5)")
        ] = ("layer1", "layer2", "layer3")
        pooled_level: Annotated[
            str, Field(description="level whose spatial mean retrieves the nearest images (sec. 3.1)")
        ] = "layer4"
        weights: WeightsName = "imagenet"
        k_neighbors: Annotated[
            int, Field(ge=1, description="K, number of nearest normal images (sec. 3.5); all if fewer")
        ] = 50
        level_fusion: Annotated[
            Literal["concatenate", "average"],
            Field(
                description="concatenate: one match per position over all levels (sec. 3.4); average: one match per "
                "level and the mean of the unsquared distances, as in SPADE-pytorch"
            ),
        ] = "concatenate"
        align: Annotated[
            bool | Annotated[float, Field(gt=0)],
            Field(
                description="false: match anywhere (eq. 3); a number: only within this many px along rows and columns "
                "of the same position (locality, sec. 5); true: an eighth of the image height"
            ),
        ] = False
        image_score: Annotated[
            Literal["pooled", "map"],
            Field(description="pooled: eq. 2; map: the maximum of the anomaly map (not in the paper)"),
        ] = "pooled"
        max_gallery_images: Annotated[
            int | None, Field(ge=1, description="maximum number of images to store, chosen by keyed hash; none = all")
        ] = None
        smoothing_sigma: Annotated[
            float, Field(ge=0, le=1000, description="Gaussian smoothing of the anomaly map in px (sec. 3.5)")
        ] = 4.0

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.backbone: Backbone | None = None
        self.images: BankSearch | None = None
        self.galleries: tuple[PyramidGallery, ...] = ()

    def num_collected(self) -> int | None:
        """`max_gallery_images`."""
        return self.params.max_gallery_images

    def load_weights(self) -> str:
        """Loads the backbone."""
        p = self.params
        backbone, source = load_backbone(p.backbone, self._layers(), p.weights, self.seed, p.precision)
        self.backbone = backbone.freeze().to(self.device)
        return source

    def _layers(self) -> tuple[str, ...]:
        levels = self.params.feature_levels
        return levels if self.params.pooled_level in levels else (*levels, self.params.pooled_level)

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The pooled feature of every image, its pyramid, and the grid sizes of the pyramid."""
        levels, pooled_BC = self._features(batch.images_BCHW)
        rows = [rows for layout, part in self._groups(levels) for rows in layout.rows(part)]
        grids_BL2 = torch.tensor([level.shape[-2:] for level in levels]).float().expand(len(pooled_BC), -1, -1)
        return {POOLED: pooled_BC[:, None], GRIDS: grids_BL2, **self._named(rows)}

    def _named(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        return {LEVEL + name: rows for name, rows in zip(self.params.feature_levels, levels, strict=True)}

    def _groups(self, levels: Sequence[Tensor]) -> list[tuple[PyramidLayout, Sequence[Tensor]]]:
        """The levels grouped for matching: all together, or one by one."""
        parts = [levels] if self.params.level_fusion == "concatenate" else [[level] for level in levels]
        sizes = [tuple((level.shape[-2], level.shape[-1]) for level in part) for part in parts]
        return [(PyramidLayout.of(grids, levels[0].device), part) for grids, part in zip(sizes, parts, strict=True)]

    @property
    def scores_by_map(self) -> bool:
        """Whether `image_score` is the map."""
        return self.params.image_score == "map"

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Gathers the images of all workers."""
        tensors = {name: rows.all_rows() for name, rows in sorted(state.rows.items())}
        count = len(tensors[POOLED])
        grids_NL2 = tensors[GRIDS].view(count, -1, 2).long()
        if not (grids_NL2 == grids_NL2[0]).all():
            raise SpecError("spade: images of different sizes were collected. Use one image_size for all.")
        whole = {name: rows.view(count, -1, rows.shape[1]) for name, rows in tensors.items() if name[:6] == LEVEL}
        self._fill({POOLED: tensors[POOLED], GRIDS: grids_NL2[0], **whole})
        on_progress(count, count)

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Builds the searches."""
        grids = [(int(height), int(width)) for height, width in tensors[GRIDS]]
        levels = [tensors[LEVEL + name].to(self.device) for name in self.params.feature_levels]
        if self.params.level_fusion == "concatenate":
            self.galleries = (PyramidGallery(levels, PyramidLayout.of(tuple(grids), levels[0].device)),)
        else:
            pairs = zip(levels, grids, strict=True)
            self.galleries = tuple(PyramidGallery([x], PyramidLayout.of((grid,), x.device)) for x, grid in pairs)
        self.images = BankSearch(tensors[POOLED].to(self.device))

    def extend(self, state: FitState) -> None:
        """Adds the images of the gallery, under keys of their own."""
        tensors = self.tensors()
        for number, pooled_C in enumerate(tensors[POOLED]):
            rows = self._named([tensors[LEVEL + name][None, number] for name in self.params.feature_levels])
            state.add([f"{EARLIER}{number}"], {POOLED: pooled_C[None, None], GRIDS: tensors[GRIDS][None], **rows})

    def facts(self) -> dict[str, Any]:
        """How many images the gallery holds, and how many are searched per query."""
        return {} if self.images is None else {"gallery": {"images": self.images.num_rows, "searched": self._count()}}

    def _count(self) -> int:
        assert self.images is not None
        return min(self.params.k_neighbors, self.images.num_rows)

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Image scores (eq. 2) and maps (eq. 3)."""
        if self.images is None:
            raise NotFittedError("spade: is not fitted. Fit it or load an artifact first.")
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        levels, pooled_BC = self._features(images_BCHW)
        distance_BK, image_BK = self.images.nearest(pooled_BC, self._count())
        maps = []
        for gallery, (layout, part) in zip(self.galleries, self._groups(levels), strict=True):
            reach = self._reach(layout, gallery.layout, size_px)
            queries = zip(image_BK, *layout.rows(part), strict=True)
            square_Bhw = torch.stack([gallery.nearest(rows, layout, images, reach) for images, *rows in queries])
            distance_Bhw = square_Bhw if self.params.level_fusion == "concatenate" else square_Bhw.sqrt()
            maps.append(smooth_upsampled(distance_Bhw, size_px, self.params.smoothing_sigma))
        map_BHW = torch.stack(maps).mean(0)
        by_map = self.params.image_score == "map"
        return Scores(map_BHW.flatten(1).amax(1) if by_map else distance_BK.square().mean(1), map_BHW)

    def _reach(self, layout: PyramidLayout, gallery_layout: PyramidLayout, size_px: tuple[int, int]) -> float | None:
        """`align` converted to cells of the finest grid."""
        align, (rows, _) = self.params.align, layout.grids[0]
        if align is False:
            return None
        if layout.grids != gallery_layout.grids:
            raise SpecError(
                f"spade: align needs images of the size used for fitting, given {size_px[0]} x {size_px[1]} px. "
                "Resize them or set align: false."
            )
        return rows / ALIGNED_SHARE if align is True else float(align) * rows / size_px[0]

    def _features(self, images_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """The pyramid, and the spatial mean of the pooled level, (B, C)."""
        if self.backbone is None:
            raise NotFittedError("spade: has no backbone yet. Call load_weights or load an artifact first.")
        found = dict(zip(self.backbone.layers, self.backbone(images_BCHW), strict=True))
        pooled_BC = found[self.params.pooled_level].float().mean((2, 3))
        return [found[name] for name in self.params.feature_levels], pooled_BC

    def tensors(self) -> dict[str, Tensor]:
        """Backbone weights, pooled features, and the gallery's pyramids in search order."""
        if self.images is None or self.backbone is None:
            raise NotFittedError("spade: is not fitted, there is nothing to save.")
        weights = {BACKBONE + name: value for name, value in self.backbone.weights().items()}
        levels = [level for gallery in self.galleries for level in gallery.levels_NRC]
        grids = torch.tensor([grid for gallery in self.galleries for grid in gallery.layout.grids])
        return {POOLED: self.images.bank(), GRIDS: grids, **self._named(levels), **weights}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the backbone and the gallery."""
        for name in (POOLED, GRIDS, *(LEVEL + level for level in self.params.feature_levels)):
            if name not in tensors:
                raise ArtifactError(f"spade: the artifact has no tensor {name!r}. Fit again.")
        with SkipInitialisation():
            backbone = Backbone(self.params.backbone, self._layers(), self.seed, precision=self.params.precision)
        backbone.load({name.removeprefix(BACKBONE): value for name, value in tensors.items()}, "the artifact")
        self.backbone = backbone.freeze().to(self.device)
        self._fill(tensors)

    def to(self, device: torch.device) -> "SPADE":
        """Moves the backbone and the gallery."""
        self.device = device
        if self.backbone is not None:
            self.backbone.to(device)
        if self.images is not None:
            self.images = self.images.to(device)
            self.galleries = tuple(gallery.to(device) for gallery in self.galleries)
        return self
