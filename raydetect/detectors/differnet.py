"""DifferNet: a normalising flow models the likelihood of an image's pooled features at several scales and rotations.

The anomaly score is the mean negative log-likelihood over rotations of the image; its gradient localises the defect.
`head: difference` selects a different detector on the same backbone: patches are compared with their nearest normal
patches, and a small network trained on simulated defects weights the differences.

Source: Rudolph et al., "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows", WACV 2021,
arXiv 2008.12577, and its official code (marco-rudolph/differnet) where the paper is silent. `head: difference` is
not a published method (`blocks/search/difference.py`).
Differs from the paper: scoring uses evenly spaced angles, the same for all images, instead of random ones, so scores
are reproducible; brightness is not augmented, which is the official code's default; the factor of the soft clamp is
2 / pi, where the official code has 0.636; gradients are rotated back bilinearly, not by splines; the last epoch is used
instead of one chosen on the test set.

Shapes: B images, T angles, C channels, H W pixels, D feature dim, N patches, M bank rows, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raydetect.blocks.augment.simulated_defect import simulate_defect
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.backbones.patch_embeddings import patch_embeddings
from raydetect.blocks.coresets.coreset import Coreset, choose_coreset
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.anomaly_map import smooth_upsampled, smoothing_reach
from raydetect.blocks.networks.image_flow import (
    image_flow,
    negative_log_likelihood,
    rotated_features,
    scores_and_gradient_maps,
)
from raydetect.blocks.search.difference import DifferenceNet, Differences, NormalPatches
from raydetect.blocks.seeding import keyed_generator, keyed_seed, keyed_unit
from raydetect.detectors._base import (
    Batch,
    Detector,
    DetectorInfo,
    ImageSize,
    PatchGrid,
    Phase,
    ProgressCallback,
    Scores,
    TrainingPlan,
    UsedIf,
)
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import ArtifactError

BACKBONE, HEAD, BANK, EMBEDDINGS = "backbone", "head", "bank", "embeddings"
DIFFERENCE, DIFFERENCE_UNITS, K_NEIGHBORS = "difference", 32, 5
FLOW_ONLY, DIFFERENCE_HEAD = UsedIf("head", ("flow",)), UsedIf("head", (DIFFERENCE,))
TRAINED_DIFFERENCE = UsedIf("train_difference", (True,))
DIFFERENCE_ONLY = ("k_neighbors", "train_difference")


class DifferNet(NetworkDetector):
    """Likelihood of an image's pooled features under a flow; or differences to the nearest normal patches."""

    info = DetectorInfo(
        title="DifferNet",
        paper="arXiv:2008.12577",
        venue="WACV 2021",
        summary="a normalising flow models the likelihood of an image's pooled features, over many rotations",
        published="MVTec AD, AlexNet: 94.9 image AUROC; magnetic tile defects: 97.7 (paper, tables 1-2)",
    )
    phases: tuple[Phase, ...] = ("train",)
    smoke: ClassVar = {
        **{"backbone": "resnet18", "layers": ("layer2",), "image_size": (64, 64), "n_flows": 2, "hidden_dims": 64},
        **{"train_transforms": 2, "test_transforms": 4, "epochs": 12, "batch_size": 8, "learning_rate": 5e-3},
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of DifferNet; those prefixed with a head's name apply to that head only."""

        image_size: Annotated[
            ImageSize, Field(description="(height, width) in px that images are resized to (sec. 4.2)")
        ] = (448, 448)
        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.2)")] = "alexnet"
        layers: Annotated[
            tuple[str, ...],
            Field(
                description="levels, shallowest first; empty = for flow the last one, features or layer4 (sec. 3.2); "
                "for difference layer2 and layer3, or AlexNet's second and third pooling"
            ),
        ] = ()
        weights: WeightsName = "imagenet"
        batch_size: Annotated[
            int, Field(ge=1, description="images per step (sec. 4.2)"), UsedIf("train_difference", unless=(False,))
        ] = 24
        smoothing_sigma: Annotated[
            float,
            Field(ge=0, le=1000, description="Gaussian smoothing of gradients, or of the map, in px (official code)"),
        ] = 3.0
        head: Annotated[
            Literal["flow", "difference"],
            Field(
                description="flow: the published method; difference: nearest normal patches and a trained network; "
                "setting k_neighbors or train_difference implies it"
            ),
        ] = "flow"
        num_scales: Annotated[
            int, Field(ge=1, description="flow: image sizes, each half the previous one (sec. 3.2)"), FLOW_ONLY
        ] = 3
        n_flows: Annotated[int, Field(ge=1, description="flow: coupling blocks (sec. 4.2)"), FLOW_ONLY] = 8
        clamp: Annotated[
            float, Field(gt=0, description="flow: bound on the log-scales, alpha (sec. 3.1)"), FLOW_ONLY
        ] = 3.0
        hidden_dims: Annotated[int, Field(ge=1, description="flow: width of the subnets (sec. 4.2)"), FLOW_ONLY] = 2048
        train_transforms: Annotated[
            int, Field(ge=1, description="flow: random rotations per image and step (official code)"), FLOW_ONLY
        ] = 4
        test_transforms: Annotated[
            int, Field(ge=1, description="flow: T, rotations averaged when scoring (eq. 5)"), FLOW_ONLY
        ] = 64
        max_degrees: Annotated[
            float, Field(ge=0, le=180, description="flow: maximum rotation in either direction (sec. 4.2)"), FLOW_ONLY
        ] = 180
        epochs: Annotated[int, Field(ge=1, description="flow: passes over the images (official code)"), FLOW_ONLY] = 192
        learning_rate: Annotated[float, Field(gt=0, description="flow: of Adam (sec. 4.2)"), FLOW_ONLY] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="flow: of Adam (official code)"), FLOW_ONLY] = 1e-5
        k_neighbors: Annotated[
            int | None, Field(ge=1, description="difference: K, default 5; none for the flow"), DIFFERENCE_HEAD
        ] = None
        train_difference: Annotated[
            bool | None,
            Field(
                description="difference: true (default) = a network trained on simulated defects, false = the mean "
                "distance to the K nearest, which needs no training and localised better on bottles; none for the flow"
            ),
            DIFFERENCE_HEAD,
        ] = None
        coreset_sampling_ratio: Annotated[
            float,
            Field(gt=0, le=1, description="difference: share of normal patches kept for comparison"),
            DIFFERENCE_HEAD,
        ] = 0.1
        difference_epochs: Annotated[
            int, Field(ge=1, description="difference: passes over the images to train the network"), TRAINED_DIFFERENCE
        ] = 10
        difference_rate: Annotated[
            float, Field(gt=0, description="difference: learning rate of Adam"), TRAINED_DIFFERENCE
        ] = 3e-2

        @model_validator(mode="before")
        @classmethod
        def _agree(cls, values: Any) -> Any:
            """Resolves the head and the defaults that depend on it; the record holds all."""
            given = [name for name in DIFFERENCE_ONLY if values.get(name) is not None]
            head = values.get("head") or (DIFFERENCE if given else "flow")
            values = {**values, "head": head}
            if not values.get("layers"):
                values["layers"] = default_layers(str(values.get("backbone", "alexnet")), head)
            defaults = dict(zip(DIFFERENCE_ONLY, (K_NEIGHBORS, True), strict=True)) if head == DIFFERENCE else {}
            return {**defaults, **{name: value for name, value in values.items() if value is not None}}

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters; the head determines the phases of a fit."""
        super().__init__(params, seed)
        self.normal: NormalPatches | None = None
        self.coreset: Coreset | None = None
        if params.head == DIFFERENCE:
            self.phases = ("collect", "train") if params.train_difference else ("collect",)

    def load_weights(self) -> str:
        """Loads the backbone.

        Raises:
            SpecError: the smallest scale of the images is too small for the backbone.
        """
        p = self.params
        backbone, source = load_backbone(p.backbone, p.layers, p.weights, self.seed, p.precision)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        if self.params.head == "flow":
            blank_1CHW = torch.zeros(1, 3, *self.params.image_size, dtype=torch.uint8, device=self.device)
            rotated_features(backbone, blank_1CHW, [0.0], self.params.num_scales)
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone, and the flow or the difference network."""
        backbone = Backbone(self.params.backbone, self.params.layers, self.seed, precision=self.params.precision)
        return {BACKBONE: backbone} | ({HEAD: self._head(backbone)} if "train" in self.phases else {})

    def _head(self, backbone: Backbone) -> nn.Module:
        dims, params = sum(backbone.widths()), self.params
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "head"))
            if params.head == DIFFERENCE:
                return DifferenceNet(dims, DIFFERENCE_UNITS)
            return image_flow(params.num_scales * dims, params.n_flows, params.hidden_dims, params.clamp, self.seed)

    def _backbone(self) -> Backbone:
        backbone = self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        return backbone

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new flow, or a new difference network scaled by the standard deviations of the bank."""
        self.is_fitted = False
        head, params = self._head(self._backbone()).to(self.device).train(), self.params
        self.networks[HEAD] = head
        if isinstance(head, DifferenceNet):
            head.measure_in_spreads_of(self._normal().bank)
            optimizer = torch.optim.Adam(head.parameters(), params.difference_rate)
            return TrainingPlan(head, optimizer, params.difference_epochs, params.batch_size)
        optimizer = torch.optim.Adam(
            head.parameters(), params.learning_rate, (0.8, 0.8), 1e-4, params.weight_decay, fused=True
        )
        return TrainingPlan(head, optimizer, params.epochs, params.batch_size)

    def training_pieces(self, batch: Batch) -> list[Any]:
        """One step: features of randomly rotated images, or differences of images with planted defects."""
        with torch.no_grad():
            return [self._rotated_features(batch) if self.params.head == "flow" else self._planted(batch)]

    def training_loss(self, piece: Any) -> Tensor:
        """Flow: negative log-likelihood (eq. 4). Difference: cross-entropy between planted and normal patches."""
        head = self.networks[HEAD]
        return head.loss(piece) if isinstance(head, DifferenceNet) else negative_log_likelihood(*head(piece)).mean()

    def end_training(self) -> None:
        """Freezes the head."""
        self.freeze()

    def score(self, images_BCHW: Tensor) -> Scores:
        """Scores with the selected head.

        Raises:
            NotFittedError: the detector is not fitted.
            SpecError: the images are too small for the backbone.
        """
        self.require_fitted()
        return self._by_flow(images_BCHW) if self.params.head == "flow" else self._by_difference(images_BCHW)

    def _rotated_features(self, batch: Batch) -> Tensor:
        """Features of every image at each of its random angles, (T * B, D)."""
        found = []
        for number in range(self.params.train_transforms):
            units = [keyed_unit(self.seed, "angle", key, batch.epoch, number) for key in batch.keys]
            degrees = [self.params.max_degrees * (2 * unit - 1) for unit in units]
            found.append(rotated_features(self._backbone(), batch.images_BCHW, degrees, self.params.num_scales))
        return torch.cat(found)

    def _by_flow(self, images_BCHW: Tensor) -> Scores:
        """Scores and maps over evenly spaced angles, including 0 (eq. 5, sec. 3.4)."""
        params, count = self.params, self.params.test_transforms
        degrees = [2 * params.max_degrees * (number - count // 2) / count for number in range(count)]
        head, sigma = self.networks[HEAD], params.smoothing_sigma
        return Scores(*scores_and_gradient_maps(self._backbone(), head, images_BCHW, params.num_scales, degrees, sigma))

    @property
    def scores_by_map(self) -> bool:
        """Whether patches are compared with those of normal images."""
        return "collect" in self.phases

    def patch_grids(self) -> dict[str, PatchGrid]:
        """The grid of the first layer."""
        _, height, width = self._backbone().shapes(self.params.image_size)[0]
        reach_px = smoothing_reach((height, width), self.params.image_size, self.params.smoothing_sigma)
        return {EMBEDDINGS: PatchGrid(height, width, reach_px)}

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Patch embeddings of every image."""
        if "collect" not in self.phases:
            return super().collect(batch)
        return {EMBEDDINGS: patch_embeddings(self._backbone()(batch.images_BCHW)).flatten(1, 2)}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Stores a coreset of all patches for comparison."""
        rows, k = state.rows[EMBEDDINGS], self.params.k_neighbors or K_NEIGHBORS
        count = min(rows.total(), max(k, round(rows.total() * self.params.coreset_sampling_ratio)))
        self.coreset = choose_coreset(
            rows, count, seed=self.seed, device=self.device, on_progress=lambda more: on_progress(more, count)
        )
        self.normal = NormalPatches(self.coreset.rows_MD.to(self.device), k, self.coreset.keys_M)
        if "train" not in self.phases:
            self.freeze()

    def _normal(self) -> NormalPatches:
        assert self.normal is not None
        return self.normal

    def _planted(self, batch: Batch) -> Differences:
        """Differences of patches inside and outside planted defects from the patches of other images."""
        draws = [keyed_generator(self.seed, "defect", batch.epoch, key) for key in batch.keys]
        images, masks = zip(*map(simulate_defect, batch.images_BCHW, draws), strict=True)
        embeddings_BhwD = patch_embeddings(self._backbone()(torch.stack(images)))
        return self._normal().training_differences(embeddings_BhwD, masks, batch.keys, draws)

    @torch.inference_mode()
    def _by_difference(self, images_BCHW: Tensor) -> Scores:
        """Map of the network's logits, or of the mean distances to the K nearest patches; the score is its maximum."""
        embeddings_BhwD, normal = patch_embeddings(self._backbone()(images_BCHW)), self._normal()
        patches_ND = embeddings_BhwD.flatten(0, 2)
        if self.params.train_difference:
            score_N = self.networks[HEAD](normal.difference(patches_ND))
        else:
            score_N = normal.distance(patches_ND)
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = smooth_upsampled(score_N.view(embeddings_BhwD.shape[:3]), size_px, self.params.smoothing_sigma)
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def facts(self) -> dict[str, Any]:
        """How the stored patches were chosen."""
        return {} if self.coreset is None else {"coreset": self.coreset.facts()}

    def tensors(self) -> dict[str, Tensor]:
        """The networks and the stored patches."""
        return super().tensors() | ({} if self.normal is None else {BANK: self.normal.bank})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the networks and the stored patches."""
        if self.params.head == DIFFERENCE:
            if BANK not in tensors:
                raise ArtifactError(f"the artifact has no tensor {BANK!r}. Fit again.")
            self.normal = NormalPatches(tensors[BANK].to(self.device), self.params.k_neighbors or K_NEIGHBORS)
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "DifferNet":
        """Moves the networks and the bank."""
        super().to(device)
        if self.normal is not None:
            self.normal.to(device)
        return self


def default_layers(backbone: str, head: str) -> tuple[str, ...]:
    """Default layers of a backbone."""
    if head == "flow":
        return ("features",) if backbone.startswith(("alexnet", "vgg")) else ("layer4",)
    return ("features.5", "features.12") if backbone == "alexnet" else ("layer2", "layer3")
