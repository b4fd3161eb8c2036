"""DifferNet: a normalising flow learns how likely the pooled features of an image are, at several scales and turned.

An image is as anomalous as its turned versions are unlikely on average; the gradient shows where that comes from.
With `head: difference` it is another detector on the same backbone: patches are compared with their nearest normal
patches, and a small network that is trained on simulated defects says how much each difference counts.

Source: Rudolph et al., "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows", WACV 2021,
arXiv 2008.12577, and its official code (marco-rudolph/differnet) for what the paper leaves open. `head: difference`
is no published method (`blocks/difference.py`).
Differs from the paper: the angles for scoring are evenly spread and the same for all images, not random, so that a
score can be repeated; light is not changed, as in the official code unless asked; the factor of the soft clamp is
2 / pi, where the official code has 0.636; gradients are turned back bilinearly, not by splines; no epoch is chosen on
the test set, the last one is used.

Shapes: B images, T angles, C channels, H W pixels, D feature dim, N patches, M bank rows, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raydetect.blocks.anomaly_map import smooth_upsampled
from raydetect.blocks.backbone import Backbone
from raydetect.blocks.coreset import Coreset, choose_coreset
from raydetect.blocks.difference import DifferenceNet, Differences, NormalPatches
from raydetect.blocks.image_flow import image_flow, negative_log_likelihood, turned_features, unlikeliness
from raydetect.blocks.planted import planted
from raydetect.blocks.pyramid import patch_embeddings
from raydetect.blocks.rows import FitState
from raydetect.blocks.seeding import keyed_generator, keyed_seed, keyed_unit
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Phase, Scores, Tick, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import ArtifactError

BACKBONE, HEAD, BANK, EMBEDDINGS = "backbone", "head", "bank", "embeddings"
DIFFERENCE, DIFFERENCE_UNITS, K_NEIGHBORS = "difference", 32, 5
DIFFERENCE_ONLY = ("k_neighbors", "train_difference")


class DifferNet(NetworkDetector):
    """Likelihood of an image's pooled features under a flow; or differences to the nearest normal patches."""

    info = DetectorInfo(
        title="DifferNet",
        paper="arXiv:2008.12577",
        venue="WACV 2021",
        summary="a normalising flow tells how likely an image's pooled features are, over many rotations",
        published="MVTec AD, AlexNet: 94.9 image AUROC; magnetic tile defects: 97.7 (paper, tables 1-2)",
    )
    phases: tuple[Phase, ...] = ("train",)
    smoke: ClassVar = {
        **{"backbone": "resnet18", "layers": ("layer2",), "image_size": (64, 64), "n_flows": 2, "hidden_dims": 64},
        **{"train_transforms": 2, "test_transforms": 4, "epochs": 12, "batch_size": 8, "learning_rate": 5e-3},
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of DifferNet; each head uses its own and those before them."""

        image_size: Annotated[
            tuple[int, int], Field(description="(height, width) in px that images are resized to (sec. 4.2)")
        ] = (448, 448)
        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.2)")] = "alexnet"
        layers: Annotated[
            tuple[str, ...],
            Field(
                description="levels, shallowest first; none named: for the flow the last of all, features or layer4 "
                "(sec. 3.2); for differences layer2 and layer3, of AlexNet the second and third pooling"
            ),
        ] = ()
        weights: WeightsName = "imagenet"
        batch_size: Annotated[int, Field(ge=1, description="images per step (sec. 4.2)")] = 24
        smoothing_sigma: Annotated[
            float, Field(ge=0, description="Gaussian smoothing of gradients, or of the map, in px (official code)")
        ] = 3.0
        head: Annotated[
            Literal["flow", "difference"],
            Field(
                description="flow: the published method; difference: nearest normal patches and a trained network, "
                "which stating k_neighbors or train_difference means too"
            ),
        ] = "flow"
        num_scales: Annotated[
            int, Field(ge=1, description="flow: image sizes, each half the one before (sec. 3.2)")
        ] = 3
        n_flows: Annotated[int, Field(ge=1, description="flow: its coupling blocks (sec. 4.2)")] = 8
        clamp: Annotated[float, Field(gt=0, description="flow: bound on its log-scales, alpha (sec. 3.1)")] = 3.0
        hidden_dims: Annotated[int, Field(ge=1, description="flow: width of its subnets (sec. 4.2)")] = 2048
        train_transforms: Annotated[
            int, Field(ge=1, description="flow: random angles of every image in a step (official code)")
        ] = 4
        test_transforms: Annotated[int, Field(ge=1, description="flow: T, angles that are averaged over (eq. 5)")] = 64
        max_degrees: Annotated[float, Field(ge=0, le=180, description="flow: largest angle, either way (sec. 4.2)")] = (
            180
        )
        epochs: Annotated[int, Field(ge=1, description="flow: passes over the images (official code)")] = 192
        learning_rate: Annotated[float, Field(gt=0, description="flow: of Adam (sec. 4.2)")] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="flow: of Adam (official code)")] = 1e-5
        k_neighbors: Annotated[
            int | None, Field(ge=1, description="difference: K, 5 unless stated; none with the flow")
        ] = None
        train_difference: Annotated[
            bool | None,
            Field(
                description="difference: true = a network trained on simulated defects (unless stated), false = the "
                "mean distance to the K nearest; none with the flow"
            ),
        ] = None
        coreset_sampling_ratio: Annotated[
            float, Field(gt=0, le=1, description="difference: share of normal patches that are compared with")
        ] = 0.1
        difference_epochs: Annotated[
            int, Field(ge=1, description="difference: passes over the images that train its network")
        ] = 10
        difference_rate: Annotated[float, Field(gt=0, description="difference: its learning rate, of Adam")] = 3e-2

        @model_validator(mode="before")
        @classmethod
        def _agree(cls, values: Any) -> Any:
            """Settles the head, and what follows from it; the record holds all."""
            stated = [name for name in DIFFERENCE_ONLY if values.get(name) is not None]
            head = values.get("head") or (DIFFERENCE if stated else "flow")
            if head == "flow" and stated:
                raise ValueError(f"{stated[0]} is of no use to head: flow; leave it out, or set head: difference")
            values = {**values, "head": head}
            if not values.get("layers"):
                values["layers"] = usual_layers(str(values.get("backbone", "alexnet")), head)
            usual = dict(zip(DIFFERENCE_ONLY, (K_NEIGHBORS, True), strict=True)) if head == DIFFERENCE else {}
            return {**usual, **{name: value for name, value in values.items() if value is not None}}

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Keeps the parameters; the head decides which phases a fit has."""
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
        backbone, said = load_backbone(self.params.backbone, self.params.layers, self.params.weights, self.seed)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        if self.params.head == "flow":
            blank_1CHW = torch.zeros(1, 3, *self.params.image_size, dtype=torch.uint8, device=self.device)
            turned_features(backbone, blank_1CHW, [0.0], self.params.num_scales)
        return said

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone, and the flow or the network of differences."""
        backbone = Backbone(self.params.backbone, self.params.layers, self.seed)
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
        """A fresh flow, or a fresh network of differences whose unit is the spread of the bank."""
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
        """One step: features of randomly turned images, or differences of images with planted defects."""
        with torch.no_grad():
            return [self._turned(batch) if self.params.head == "flow" else self._planted(batch)]

    def training_loss(self, piece: Any) -> Tensor:
        """Flow: eq. 4, the negative log-likelihood. Differences: cross-entropy between planted and normal patches."""
        head = self.networks[HEAD]
        return head.loss(piece) if isinstance(head, DifferenceNet) else negative_log_likelihood(*head(piece)).mean()

    def end_training(self) -> None:
        """Freezes the head."""
        self.freeze()

    def score(self, images_BCHW: Tensor) -> Scores:
        """Scores by the chosen head.

        Raises:
            NotFittedError: the detector is not fitted.
            SpecError: the images are too small for the backbone.
        """
        self.require_fitted()
        return self._by_flow(images_BCHW) if self.params.head == "flow" else self._by_difference(images_BCHW)

    def _turned(self, batch: Batch) -> Tensor:
        """Features of every image at each of its random angles, (T * B, D)."""
        found = []
        for number in range(self.params.train_transforms):
            units = [keyed_unit(self.seed, "angle", key, batch.epoch, number) for key in batch.keys]
            degrees = [self.params.max_degrees * (2 * unit - 1) for unit in units]
            found.append(turned_features(self._backbone(), batch.images_BCHW, degrees, self.params.num_scales))
        return torch.cat(found)

    def _by_flow(self, images_BCHW: Tensor) -> Scores:
        """Eq. 5 and sec. 3.4 over evenly spread angles, 0 among them."""
        params, count = self.params, self.params.test_transforms
        degrees = [2 * params.max_degrees * (number - count // 2) / count for number in range(count)]
        head, sigma = self.networks[HEAD], params.smoothing_sigma
        return Scores(*unlikeliness(self._backbone(), head, images_BCHW, params.num_scales, degrees, sigma))

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Patch embeddings of every image."""
        if "collect" not in self.phases:
            return super().collect(batch)
        return {EMBEDDINGS: patch_embeddings(self._backbone()(batch.images_BCHW)).flatten(1, 2)}

    def finish(self, state: FitState, tick: Tick) -> None:
        """Keeps a coreset of all patches to compare with."""
        rows, k = state.rows[EMBEDDINGS], self.params.k_neighbors or K_NEIGHBORS
        count = min(rows.total(), max(k, round(rows.total() * self.params.coreset_sampling_ratio)))
        self.coreset = choose_coreset(
            rows, count, seed=self.seed, device=self.device, tick=lambda more: tick(more, count)
        )
        self.normal = NormalPatches(self.coreset.rows_MD.to(self.device), k, self.coreset.keys_M)
        if "train" not in self.phases:
            self.freeze()

    def _normal(self) -> NormalPatches:
        assert self.normal is not None
        return self.normal

    def _planted(self, batch: Batch) -> Differences:
        """Patches in planted defects and some of those beside them, against the patches of other images."""
        draws = [keyed_generator(self.seed, "defect", batch.epoch, key) for key in batch.keys]
        images, masks = zip(*map(planted, batch.images_BCHW, draws), strict=True)
        embeddings_BhwD = patch_embeddings(self._backbone()(torch.stack(images)))
        return self._normal().taught(embeddings_BhwD, masks, batch.keys, draws)

    @torch.inference_mode()
    def _by_difference(self, images_BCHW: Tensor) -> Scores:
        """The network's logit of every patch, or its mean distance to the K nearest; the largest of the map."""
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
        """How the patches to compare with were chosen."""
        return {} if self.coreset is None else {"coreset": self.coreset.facts()}

    def tensors(self) -> dict[str, Tensor]:
        """The networks, and the patches to compare with."""
        return super().tensors() | ({} if self.normal is None else {BANK: self.normal.bank})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores both."""
        if self.params.head == DIFFERENCE:
            if BANK not in tensors:
                raise ArtifactError(f"the artifact has no tensor {BANK!r}. Fit again.")
            self.normal = NormalPatches(tensors[BANK].to(self.device), self.params.k_neighbors or K_NEIGHBORS)
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "DifferNet":
        """Moves networks and bank."""
        super().to(device)
        if self.normal is not None:
            self.normal.to(device)
        return self


def usual_layers(backbone: str, head: str) -> tuple[str, ...]:
    """The layers of a backbone when none are named."""
    if head == "flow":
        return ("features",) if backbone.startswith(("alexnet", "vgg")) else ("layer4",)
    return ("features.5", "features.12") if backbone == "alexnet" else ("layer2", "layer3")
