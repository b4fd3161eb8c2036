"""DifferNet: a normalising flow learns how likely the pooled features of an image are, at several scales and turned.

An image is as anomalous as its transformed versions are unlikely on average; the gradient shows where that comes from.
With `head: difference` it is another detector on the same backbone: patches are compared with their nearest normal
patches, and a small network that is trained on planted defects says how much each difference counts.

Source: Rudolph et al., "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows", WACV 2021,
arXiv 2008.12577, and its official code (marco-rudolph/differnet) for what the paper leaves open. `head: difference`
is no published method.
Differs from the paper: transforms for scoring are evenly spread and the same for all images, not random, so that a
score can be repeated; the factor of the soft clamp is 2 / pi, where the official code has 0.636; gradients are turned
back bilinearly, not by splines; no epoch is chosen on the test set, the last one is used.

Shapes: B images, T transforms, D feature dim, N patches, M bank rows, K neighbours, H W pixels.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.anomaly_map import smooth, smooth_upsampled
from raydetect.blocks.backbone import Backbone
from raydetect.blocks.coreset import Coreset, choose_coreset
from raydetect.blocks.difference import DifferenceNet, Differences, joined, labelled_differences, mean_difference
from raydetect.blocks.flows import BothCoupling, Chain, Invertible, log_likelihood, random_permutation
from raydetect.blocks.neighbors import BankSearch
from raydetect.blocks.planted import plant
from raydetect.blocks.pyramid import mean_features, patch_embeddings
from raydetect.blocks.rows import FitState
from raydetect.blocks.seeding import keyed_generator, keyed_seed
from raydetect.blocks.transforms import Transforms, rotate
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Phase, Scores, Tick, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import load_backbone
from raydetect.errors import ArtifactError, SpecError

BACKBONE, HEAD, BANK, EMBEDDINGS = "backbone", "head", "bank", "embeddings"
HIDDEN_LAYERS, DIFFERENCE_UNITS = 3, 32
LEAST_SPREAD = 1e-6
FLOW_ONLY = (
    *("num_scales", "n_flows", "clamp", "hidden_dims", "train_transforms", "test_transforms", "max_degrees"),
    *("brightness", "contrast", "epochs", "learning_rate", "weight_decay"),
)
DIFFERENCE_ONLY = ("k_neighbors", "train_difference", "coreset_sampling_ratio")
TRAINED_ONLY = ("difference_epochs", "difference_rate")


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
        **{"train_transforms": 2, "test_transforms": 4, "epochs": 6, "batch_size": 8, "learning_rate": 5e-3},
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of DifferNet; those that the chosen head does not use are refused."""

        image_size: Annotated[
            tuple[int, int], Field(description="(height, width) in px that images are resized to (sec. 4.2)")
        ] = (448, 448)
        head: Annotated[
            Literal["flow", "difference"] | None,
            Field(
                description="flow: the published method; difference: nearest normal patches and a trained network; "
                "none stated: flow, or difference where k_neighbors or train_difference is stated"
            ),
        ] = None
        backbone: Annotated[str, Field(description="torchvision or timm name (sec. 4.2)")] = "alexnet"
        layers: Annotated[
            tuple[str, ...],
            Field(
                description="levels, shallowest first; none named: for the flow the last of all, features or layer4 "
                "(sec. 3.2); for differences layer2 and layer3, of AlexNet the second and third pooling"
            ),
        ] = ()
        weights: Annotated[str, Field(description='"imagenet", "random", or a path or URL of a weights file')] = (
            "imagenet"
        )
        batch_size: Annotated[int, Field(ge=1, description="images per step, each several times (sec. 4.2)")] = 24
        smoothing_sigma: Annotated[
            float, Field(ge=0, description="Gaussian smoothing of gradients, or of the map, in px (official code)")
        ] = 3.0
        num_scales: Annotated[int, Field(ge=1, description="image sizes, each half the one before (sec. 3.2)")] = 3
        n_flows: Annotated[int, Field(ge=1, description="coupling blocks of the flow (sec. 4.2)")] = 8
        clamp: Annotated[float, Field(gt=0, description="bound on the flow's log-scales, alpha (sec. 3.1)")] = 3.0
        hidden_dims: Annotated[int, Field(ge=1, description="width of its subnets' hidden layers (sec. 4.2)")] = 2048
        train_transforms: Annotated[
            int, Field(ge=1, description="random transforms of every image in a step of the flow (official code)")
        ] = 4
        test_transforms: Annotated[int, Field(ge=1, description="T, transforms that are averaged over (eq. 5)")] = 64
        max_degrees: Annotated[float, Field(ge=0, le=180, description="largest rotation, either way (sec. 4.2)")] = 180
        brightness: Annotated[float, Field(ge=0, lt=1, description="largest change of brightness (official code)")] = 0
        contrast: Annotated[float, Field(ge=0, lt=1, description="largest change of contrast (official code)")] = 0
        epochs: Annotated[int, Field(ge=1, description="passes over the images that train the flow (sec. 4.2)")] = 192
        learning_rate: Annotated[float, Field(gt=0, description="of the flow's Adam (sec. 4.2)")] = 2e-4
        weight_decay: Annotated[float, Field(ge=0, description="of the flow's Adam (official code)")] = 1e-5
        k_neighbors: Annotated[
            int | None, Field(ge=1, description="K of head difference, 5 if not stated; the flow has none")
        ] = None
        train_difference: Annotated[
            bool | None,
            Field(
                description="of head difference: train a network on planted defects (if not stated), or score the mean "
                "distance; the flow has none"
            ),
        ] = None
        coreset_sampling_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of normal patches that head difference compares with")
        ] = 0.1
        difference_epochs: Annotated[
            int, Field(ge=1, description="passes over the images that train the network of differences")
        ] = 10
        difference_rate: Annotated[float, Field(gt=0, description="its learning rate, of Adam")] = 3e-2

        def __post_init__(self) -> None:
            """Refuses what the chosen head does not use, and states what it does where that was left open."""
            object.__setattr__(self, "head", chosen_head(dataclasses.asdict(self)))
            unused = (*DIFFERENCE_ONLY, *TRAINED_ONLY) if self.head == "flow" else FLOW_ONLY
            unused = (*unused, *TRAINED_ONLY) if self.train_difference is False else unused
            for field in dataclasses.fields(self):
                if field.name in unused and getattr(self, field.name) != field.default:
                    used = "difference" if self.head == "flow" else "flow"
                    hint = "set train_difference" if field.name in TRAINED_ONLY else f"set head: {used}"
                    raise ValueError(f"{field.name} is of no use to head: {self.head}; leave it out, or {hint}")
            if self.head == "difference":
                object.__setattr__(self, "k_neighbors", self.k_neighbors or 5)
                object.__setattr__(self, "train_difference", self.train_difference is not False)
            if not self.layers:
                object.__setattr__(self, "layers", usual_layers(self.backbone, self.head))

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Keeps the parameters; the head decides which phases a fit has."""
        super().__init__(params, seed)
        self.search: BankSearch | None = None
        self.coreset: Coreset | None = None
        if params.head == "difference":
            self.phases = ("collect", "train") if params.train_difference else ("collect",)

    @classmethod
    def preset_for(cls, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The preset of the head that is asked for."""
        unused = FLOW_ONLY if chosen_head(params) == "difference" else ()
        return {name: value for name, value in cls.smoke.items() if name not in unused}

    def load_weights(self) -> str:
        """Loads the backbone.

        Raises:
            SpecError: the smallest scale of the images is too small for the backbone.
        """
        backbone, said = load_backbone(self.params.backbone, self.params.layers, self.params.weights, self.seed)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        if self.params.head == "flow":
            self._pooled(torch.zeros(1, 3, *self.params.image_size, device=self.device), backbone)
        return said

    def make_networks(self) -> dict[str, nn.Module]:
        """Backbone, and the flow or the network of differences."""
        backbone = Backbone(self.params.backbone, self.params.layers, self.seed)
        return {BACKBONE: backbone} | ({HEAD: self._head(backbone)} if "train" in self.phases else {})

    def _head(self, backbone: Backbone) -> nn.Module:
        dims = self._feature_dims(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "head"))
            if self.params.head == "difference":
                return DifferenceNet(dims, DIFFERENCE_UNITS)
            maps: list[Invertible] = []
            for number in range(self.params.n_flows):
                maps.append(random_permutation(dims, keyed_generator(self.seed, "permutation", number)))
                maps.append(BothCoupling(dims, partial(deep_subnet, self.params.hidden_dims), self.params.clamp))
            return Chain(maps)

    def _feature_dims(self, backbone: Backbone) -> int:
        """D of what the head sees."""
        scales = self.params.num_scales if self.params.head == "flow" else 1
        return scales * sum(shape[0] for shape in backbone.shapes(self.params.image_size))

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
            head.scale_D.copy_(self._bank().bank().std(0, correction=0).clamp_min(LEAST_SPREAD))
            optimizer = torch.optim.Adam(head.parameters(), params.difference_rate)
            return TrainingPlan(head, optimizer, params.difference_epochs, params.batch_size)
        optimizer = torch.optim.Adam(
            head.parameters(), params.learning_rate, (0.8, 0.8), 1e-4, params.weight_decay, fused=True
        )
        return TrainingPlan(head, optimizer, params.epochs, params.batch_size)

    def training_pieces(self, batch: Batch) -> list[Any]:
        """One step: features of randomly transformed images, or differences of images with planted defects."""
        with torch.no_grad():
            return [self._transformed(batch) if self.params.head == "flow" else self._planted(batch)]

    def training_loss(self, piece: Any) -> Tensor:
        """Flow: eq. 4, the negative log-likelihood without its constant, per dim. Differences: cross-entropy."""
        if isinstance(piece, Differences):
            logits_N = self.networks[HEAD](piece.values_ND)
            losses_N = F.binary_cross_entropy_with_logits(logits_N, piece.planted_N, reduction="none")
            return (losses_N * piece.weight_N).sum() / piece.weight_N.sum()
        z_ND, log_det_N = self.networks[HEAD](piece)
        return (0.5 * z_ND.square().sum(1) - log_det_N).mean() / z_ND.shape[1]

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

    def _pooled(self, normal_BCHW: Tensor, backbone: Backbone) -> Tensor:
        """Mean features of all scales, one after another, (B, D) (sec. 3.2)."""
        try:
            return mean_features(backbone.features, normal_BCHW, self.params.num_scales)
        except RuntimeError as error:
            height, width = normal_BCHW.shape[2:]
            raise SpecError(
                f"differnet: {self.params.backbone} does not take images of {height} x {width} px in "
                f"{self.params.num_scales} scales ({str(error).splitlines()[0][:120]}). Enlarge image_size or lower "
                "num_scales."
            ) from None

    def _transforms(self) -> Transforms:
        params = self.params
        return Transforms(self.seed, params.max_degrees, params.brightness, params.contrast)

    def _transformed(self, batch: Batch) -> Tensor:
        """Features of all transforms of a batch, (T * B, D); transforms are keyed by image, epoch and number."""
        backbone, found = self._backbone(), []
        for number in range(self.params.train_transforms):
            changed = self._transforms().random(batch.images_BCHW, batch.keys, batch.epoch, number)
            found.append(self._pooled(backbone.normalised(changed), backbone))
        return torch.cat(found)

    def _by_flow(self, images_BCHW: Tensor) -> Scores:
        """Eq. 5, per dim, over evenly spread transforms; sec. 3.4: squared mean size of smoothed gradients."""
        count, size, backbone = self.params.test_transforms, len(images_BCHW), self._backbone()
        with torch.inference_mode(False), torch.enable_grad():
            images_BCHW = images_BCHW.clone()
            score_B = torch.zeros(size, device=images_BCHW.device)
            map_BHW = torch.zeros(size, *images_BCHW.shape[2:], device=images_BCHW.device)
            for number in range(count):
                changed, degrees = self._transforms().even(images_BCHW, number, count)
                normal = backbone.normalised(changed).requires_grad_()
                z_BD, log_det_B = self.networks[HEAD](self._pooled(normal, backbone))
                (gradient,) = torch.autograd.grad(log_likelihood(z_BD, log_det_B).sum(), normal)
                score_B += 0.5 * (z_BD.detach().square().mean(1) + math.log(2 * math.pi)) / count
                back = rotate(gradient, [-degrees] * size, "bilinear")
                even = smooth(back.flatten(0, 1), self.params.smoothing_sigma).view(back.shape)
                map_BHW += even.abs().mean(1) / count
            return Scores(score_B, map_BHW.square())

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Patch embeddings of every image."""
        if "collect" not in self.phases:
            return super().collect(batch)
        return {EMBEDDINGS: patch_embeddings(self._backbone()(batch.images_BCHW)).flatten(1, 2)}

    def finish(self, state: FitState, tick: Tick) -> None:
        """Keeps a coreset of all patches to compare with."""
        rows = state.rows[EMBEDDINGS]
        wanted = max(self.params.k_neighbors or 1, round(rows.total() * self.params.coreset_sampling_ratio))
        count = min(wanted, rows.total())
        self.coreset = choose_coreset(
            rows, count, seed=self.seed, device=self.device, tick=lambda more: tick(more, count)
        )
        self.search = BankSearch(self.coreset.rows_MD.to(self.device))
        if "train" not in self.phases:
            self.freeze()

    def _bank(self) -> BankSearch:
        assert self.search is not None
        return self.search

    def _planted(self, batch: Batch) -> Differences:
        """Patches in planted defects and some of those beside them, against the patches of other images."""
        assert self.coreset is not None and self.params.k_neighbors is not None
        draws = [keyed_generator(self.seed, "defect", batch.epoch, key) for key in batch.keys]
        planted, masks = zip(*(plant(*each) for each in zip(batch.images_BCHW, draws, strict=True)), strict=True)
        embeddings_BhwD = patch_embeddings(self._backbone()(torch.stack(planted)))
        height, width = embeddings_BhwD.shape[1:3]
        covered_BN = F.adaptive_avg_pool2d(torch.stack(masks).float(), (height, width)).flatten(1)
        bank_MD, parts = self._bank().bank(), []
        columns = (batch.keys, embeddings_BhwD.flatten(1, 2), covered_BN, draws)
        for key, patches_ND, covered_N, draw in zip(*columns, strict=True):
            own_M = torch.tensor([owner == key for owner in self.coreset.keys_M], device=patches_ND.device)
            parts.append(labelled_differences(patches_ND, covered_N, bank_MD, own_M, self.params.k_neighbors, draw))
        return joined(parts)

    @torch.inference_mode()
    def _by_difference(self, images_BCHW: Tensor) -> Scores:
        """The network's logit of every patch, or its mean distance to the K nearest; the largest of the map."""
        assert self.params.k_neighbors is not None
        embeddings_BhwD = patch_embeddings(self._backbone()(images_BCHW))
        patches_ND = embeddings_BhwD.flatten(0, 2)
        distance_NK, index_NK = self._bank().nearest(patches_ND, self.params.k_neighbors)
        score_N = distance_NK.mean(1)
        if self.params.train_difference:
            score_N = self.networks[HEAD](mean_difference(patches_ND, self._bank().bank(), index_NK))
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        map_BHW = smooth_upsampled(score_N.view(embeddings_BhwD.shape[:3]), size_px, self.params.smoothing_sigma)
        return Scores(map_BHW.flatten(1).amax(1), map_BHW)

    def facts(self) -> dict[str, Any]:
        """How the patches to compare with were chosen."""
        return {} if self.coreset is None else {"coreset": self.coreset.facts()}

    def tensors(self) -> dict[str, Tensor]:
        """The networks, and the patches to compare with."""
        return super().tensors() | ({} if self.search is None else {BANK: self.search.bank()})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores both."""
        if self.params.head == "difference":
            if BANK not in tensors:
                raise ArtifactError(f"the artifact has no tensor {BANK!r}. Fit again.")
            self.search = BankSearch(tensors[BANK].to(self.device))
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "DifferNet":
        """Moves networks and bank."""
        super().to(device)
        if self.search is not None:
            self.search = self.search.to(device)
        return self


def chosen_head(params: Mapping[str, Any]) -> str:
    """The head that is stated, or whose parameters are."""
    words = (params.get(name) for name in ("k_neighbors", "train_difference"))
    return params.get("head") or ("difference" if any(word is not None for word in words) else "flow")


def usual_layers(backbone: str, head: str | None) -> tuple[str, ...]:
    """The layers of a backbone when none are named."""
    if head == "flow":
        return ("features",) if backbone.startswith(("alexnet", "vgg")) else ("layer4",)
    return ("features.5", "features.12") if backbone == "alexnet" else ("layer2", "layer3")


def deep_subnet(hidden_dims: int, inside: int, outside: int) -> nn.Module:
    """Three hidden layers with ReLU (official code)."""
    parts: list[nn.Module] = []
    for number in range(HIDDEN_LAYERS):
        parts += [nn.Linear(hidden_dims if number else inside, hidden_dims), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden_dims, outside))
