"""MemSeg: a U-Net head trained on simulated defects segments them from feature differences to stored normal images.

The feature pyramids of normal images form a memory; the head's input includes the difference to the nearest one.

Source: Yang et al., "MemSeg: A semi-supervised method for image surface defect detection using differences and
commonalities", arXiv 2205.00908. Its authors published no code: layers, optimizer and schedule follow the public
implementation TooTouch/MemSeg ("code" below).
Differs from the paper: during training, an image is not matched with its own memory entry, since scored images are not
in the memory; the stem is frozen with the levels, so the memory stays consistent with the head's input; the foreground
is the convex hull of what differs from a plain border in colour instead of a binarised picture; without `textures`,
procedural textures replace DTD; images are resized without a crop; the last step is used instead of one chosen on test
images.

Shapes: B images, M memory entries, K neighbours, C channels, h w feature grid, H W pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from raydetect.blocks.augment.foreground import foreground
from raydetect.blocks.augment.synthesis import blend, perlin_mask, shuffled_tiles, uniform
from raydetect.blocks.augment.textures import Textures, adjusted
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.networks.fusion import MaskDecoder, Memory, MultiScaleFusion, deepest_stage
from raydetect.blocks.networks.losses import focal_loss
from raydetect.blocks.networks.unet import keyed_init
from raydetect.blocks.seeding import SkipInitialisation, keyed_generator
from raydetect.detectors._base import Batch, Detector, DetectorInfo, ProgressCallback, Scores, TrainingPlan, UsedIf
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._textures import load_textures
from raydetect.detectors._weights import WeightsName, load_backbone
from raydetect.errors import SpecError

BACKBONE, MEMORY, STAGE, FUSION, DECODER = "backbone", "memory", "stage", "fusion", "decoder"
FOREGROUND = "foreground"
STRIDES = (2, 4, 8, 16)  # of the stem and the three levels
MULTIPLE = 32
TILES = (4, 8)
LEAST_OPACITY = 0.15
FOCAL_GAMMA = 4.0
WARM_UP = 0.1


class MemSeg(NetworkDetector):
    """Segmentation by feature differences to a memory of normal images, trained on simulated defects."""

    info = DetectorInfo(
        title="MemSeg",
        paper="arXiv:2205.00908",
        venue="arXiv 2022",
        summary="a network trained on simulated defects segments differences from stored normal images",
        published="MVTec AD, ResNet-18: 99.56 image AUROC, 98.84 pixel AUROC (paper, abstract)",
    )
    phases = ("collect", "train")
    smoke: ClassVar = {
        "image_size": (64, 64),
        "backbone": "test_resnet",
        "stem": "act1",
        "deepest_layer": None,
        "memory_size": 6,
        "feature_dim": 64,
        "anomalous_ratio": 1.0,
        "foreground": "none",
        "epochs": 25,
        "learning_rate": 1e-2,
        "top_pixels": 20,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of MemSeg."""

        backbone: Annotated[str, Field(description="torchvision or timm name; its levels are frozen (sec. 3.2)")] = (
            "resnet18"
        )
        stem: Annotated[str, Field(description="the backbone's first output, at half the image size (sec. 3.3)")] = (
            "relu"
        )
        layers: Annotated[
            tuple[str, str, str], Field(description="levels stored in memory, shallowest first (sec. 3.2)")
        ] = ("layer1", "layer2", "layer3")
        deepest_layer: Annotated[
            str | None,
            Field(description="trained stage below the decoder (sec. 3.2); none = two new ResNet blocks"),
        ] = "layer4"
        weights: WeightsName = "imagenet"
        memory_size: Annotated[
            int,
            Field(ge=1, description="normal images in memory (sec. 4), 1.8 MB each at 256 px; all if fewer"),
        ] = 30
        k_neighbors: Annotated[
            int,
            Field(
                ge=1,
                description="memory entries to compare with: 1 = the nearest (sec. 3.2); with more, each position "
                "attends to the entries closest to it",
            ),
        ] = 1
        feature_dim: Annotated[
            int,
            Field(
                ge=MULTIPLE,
                multiple_of=MULTIPLE,
                description="input channels of the decoder, halved at each level; default as ResNet-18's layer4 "
                "(sec. 3.3), other values add a trained 1 x 1 convolution",
            ),
        ] = 512
        textures: Annotated[
            str | None,
            Field(
                description="folder or archive of texture images for defects, such as DTD (sec. 3.1); none = procedural"
            ),
            UsedIf("texture_ratio", unless=(0,)),
        ] = None
        texture_ratio: Annotated[
            float,
            Field(
                ge=0, le=1, description="share of defects from textures; the others use the image's own tiles (code)"
            ),
        ] = 0.5
        anomalous_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of images given a simulated defect (code)")
        ] = 0.5
        foreground: Annotated[
            Literal["auto", "none"],
            Field(
                description="region for defects: auto = the convex hull of what differs from a plain border (after "
                "sec. 3.1), none = anywhere"
            ),
        ] = "auto"
        l1_weight: Annotated[float, Field(ge=0, description="lambda of the L1 loss (sec. 3.4)")] = 0.6
        focal_weight: Annotated[float, Field(ge=0, description="lambda of the focal loss (sec. 3.4)")] = 0.4
        training_steps: Annotated[
            int, Field(ge=1, description="steps, rounded up to whole epochs (code)"), UsedIf("epochs", (None,))
        ] = 5000
        epochs: Annotated[
            int | None, Field(ge=1, description="passes over the images, overrides training_steps; none = unused")
        ] = None
        batch_size: Annotated[int, Field(ge=1, description="images per step (code)")] = 8
        learning_rate: Annotated[
            float, Field(gt=0, description="peak of AdamW, after a tenth of the steps; then cosine decay (code)")
        ] = 3e-3
        last_learning_rate: Annotated[float, Field(ge=0, description="at the start and the end (code)")] = 1e-4
        weight_decay: Annotated[float, Field(ge=0, description="of AdamW (code)")] = 5e-4
        top_pixels: Annotated[
            int, Field(ge=1, description="number of largest map values averaged for the image score (code)")
        ] = 100

        def __post_init__(self) -> None:
            if any(size % MULTIPLE for size in self.image_size):
                raise ValueError(f"image_size {self.image_size} must be multiples of {MULTIPLE}")
            if self.k_neighbors > self.memory_size:
                raise ValueError(f"k_neighbors {self.k_neighbors} is more than memory_size {self.memory_size}")
            if self.last_learning_rate > self.learning_rate:
                raise ValueError(f"last_learning_rate {self.last_learning_rate} is above {self.learning_rate}")

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self._textures = Textures()
        self._stage_weights: dict[str, Tensor] = {}
        self._memory_keys: list[str] = []
        self._num_memories = params.memory_size
        self._foreground_share = 1.0

    def load_weights(self) -> str:
        """Loads the backbone and the initial weights of the trained stage, and reads the textures."""
        p, used = self.params, (self.params.stem, *self.params.layers)
        wanted = used if p.deepest_layer is None else (*used, p.deepest_layer)
        whole, source = load_backbone(p.backbone, wanted, p.weights, self.seed, p.precision)
        weights, prefix = whole.weights(), f"{p.deepest_layer}."
        with SkipInitialisation():
            backbone = Backbone(p.backbone, used, self.seed, precision=p.precision)
        backbone.load(weights, p.weights)
        self._shapes(backbone)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        self._stage_weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if p.textures is None:
            return source
        images, textures = load_textures(p.textures, p.image_size)
        self._textures = Textures(images)
        return f"{source}, {textures}"

    def _shapes(self, backbone: Backbone) -> list[tuple[int, ...]]:
        """(C, h, w) of the stem and the levels, each half the size of the previous one."""
        p, shapes = self.params, backbone.shapes(self.params.image_size)
        wanted = [(p.image_size[0] // stride, p.image_size[1] // stride) for stride in STRIDES]
        if [shape[1:] for shape in shapes] != wanted:
            raise SpecError(
                f"memseg: {p.backbone} has grids {[shape[1:] for shape in shapes]} at {[p.stem, *p.layers]}, but they "
                f"must be {wanted}. Choose other layers."
            )
        return shapes

    def make_networks(self) -> dict[str, nn.Module]:
        """All networks: trained parts initialised from the seed, the memory filled with zeros."""
        p = self.params
        backbone = Backbone(p.backbone, (p.stem, *p.layers), self.seed, precision=p.precision)
        levels = self._shapes(backbone)[1:]
        memory = Memory([torch.zeros(self._num_memories, h, w, channels) for channels, h, w in levels])
        return {BACKBONE: backbone, MEMORY: memory, **self._trained_parts(backbone)}

    def _trained_parts(self, backbone: Backbone) -> dict[str, nn.Module]:
        """Stage, fusion and decoder, initialised from the seed; the stage starts from its loaded weights."""
        p, (stem, *widths) = self.params, (shape[0] for shape in self._shapes(backbone))
        with keyed_init(self.seed, "memseg"):
            return {
                STAGE: deepest_stage(p.backbone, p.deepest_layer, self._stage_weights, widths[-1], p.feature_dim),
                FUSION: MultiScaleFusion(widths),
                DECODER: MaskDecoder(stem, widths, p.feature_dim),
            }

    def num_collected(self) -> int:
        """The memory's size."""
        return self.params.memory_size

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The levels of every image, one row per position, and the share of its foreground."""
        levels = self.networks[BACKBONE](batch.images_BCHW)[1:]
        rows = {f"level{i}": level.flatten(2).transpose(1, 2) for i, level in enumerate(levels)}
        shares = [float(self._region(image).float().mean()) for image in batch.images_BCHW.cpu()]
        return rows | {FOREGROUND: torch.tensor(shares)[:, None, None]}

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Stores the images of all workers in the memory."""
        self.is_fitted = False
        self._memory_keys = state.rows["level0"].all_keys()
        self._num_memories = len(self._memory_keys)
        if self._num_memories < self.params.k_neighbors:
            raise SpecError(
                f"memseg: {self._num_memories} images are in memory, k_neighbors is {self.params.k_neighbors}. "
                "Lower it or add images."
            )
        height, width = self.params.image_size
        levels = [
            state.rows[f"level{i}"].all_rows().view(self._num_memories, height // stride, width // stride, -1)
            for i, stride in enumerate(STRIDES[1:])
        ]
        self.networks[MEMORY] = Memory(levels).to(self.device)
        self._foreground_share = float(state.rows[FOREGROUND].all_rows().mean())
        on_progress(self._num_memories, self._num_memories)

    def facts(self) -> dict[str, Any]:
        """How many images are in memory, and which share of them simulated defects may lie on, on average."""
        return {"memory_images": self._num_memories, "foreground_share": round(self._foreground_share, 4)}

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A new stage and head, optimised by AdamW for enough epochs to reach `training_steps`."""
        self.is_fitted = False
        p, backbone = self.params, self.networks[BACKBONE]
        assert isinstance(backbone, Backbone)
        parts = nn.ModuleDict(self._trained_parts(backbone))
        parts.to(self.device).to(memory_format=torch.channels_last).train()
        self.networks |= dict(parts.items())
        optimizer = torch.optim.AdamW(parts.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay, fused=True)
        steps_per_epoch = -(-num_images // p.batch_size)
        epochs = p.epochs or -(-p.training_steps // steps_per_epoch)
        least = p.last_learning_rate / p.learning_rate
        return TrainingPlan(parts, optimizer, epochs, p.batch_size, lambda done: warm_cosine(done / epochs, least))

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        """See `_simulated`."""
        return self._simulated(image_3HW, keyed_generator(self.seed, "memseg", key, epoch))

    def training_loss(self, piece: Batch) -> Tensor:
        """L1 and focal losses of the masks of simulated defects (sec. 3.4)."""
        images, masks = piece.prepared
        anomalous = self._forward(255 * images, self._themselves(piece.keys))
        l1 = (anomalous - masks).abs().mean()
        focal = focal_loss(anomalous, masks, FOCAL_GAMMA)
        return self.params.l1_weight * l1 + self.params.focal_weight * focal

    def _themselves(self, keys: Sequence[str]) -> Tensor | None:
        """Mask of the memory entries of the images themselves, (B, M) bool; None if too few others would remain."""
        if self._num_memories <= self.params.k_neighbors:
            return None
        same_BM = [[key == kept for kept in self._memory_keys] for key in keys]
        return torch.tensor(same_BM, device=self.device)

    def end_training(self) -> None:
        """Freezes all networks."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """The probability map; the image score is the mean of its largest values."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if size_px != self.params.image_size:
            raise SpecError(
                f"memseg: an image of {size_px[0]} x {size_px[1]} px does not fit a memory of images of "
                f"{self.params.image_size[0]} x {self.params.image_size[1]} px. Resize it, or fit at that size."
            )
        map_BHW = self._forward(images_BCHW)
        largest = map_BHW.flatten(1).topk(min(self.params.top_pixels, map_BHW[0].numel())).values
        return Scores(largest.mean(1), map_BHW)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores all networks; the memory may be smaller than `memory_size`."""
        self._num_memories = len(tensors.get(f"{MEMORY}.level0", ())) or self.params.memory_size
        super().load_tensors(tensors)

    def _simulated(self, image_3HW: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """An image in [0, 1], with or without a simulated defect, and the defect's mask (sec. 3.1)."""
        image, size_px = image_3HW.float() / 255, (image_3HW.shape[-2], image_3HW.shape[-1])
        if uniform(0, 1, generator) >= self.params.anomalous_ratio:
            return image, torch.zeros(size_px)
        mask = perlin_mask(size_px, generator)
        mask &= self._region(image_3HW)
        if uniform(0, 1, generator) < self.params.texture_ratio:
            source = self._textures.draw(size_px, generator)
        else:
            source = shuffled_tiles(adjusted(image, generator), TILES, generator)
        return blend(image, source, mask, uniform(LEAST_OPACITY, 1, generator)), mask.float()

    def _region(self, image_3HW: Tensor) -> Tensor:
        """Where simulated defects may lie, (H, W) bool."""
        if self.params.foreground == "auto":
            return foreground(image_3HW)
        return torch.ones(image_3HW.shape[1:], dtype=torch.bool)

    def _forward(self, images_B3HW: Tensor, excluded_BM: Tensor | None = None) -> Tensor:
        """Anomaly probability, float32 (B, H, W), of images in [0, 255]; ignores the memory entries `excluded_BM`."""
        memory = self.networks[MEMORY]
        assert isinstance(memory, Memory)
        with torch.no_grad():
            stem, *levels = self.networks[BACKBONE](images_B3HW)
            remembered = memory.recall(levels, self.params.k_neighbors, excluded_BM)
            differences = [(level - other).square() for level, other in zip(levels, remembered, strict=True)]
        fused, deepest = (
            self.run(self.networks[FUSION], levels, differences),
            self.run(self.networks[STAGE], levels[-1]),
        )
        logits_B2HW = self.run(self.networks[DECODER], deepest, stem, fused)
        anomalous_BHW: Tensor = logits_B2HW.softmax(1)[:, 1]
        return anomalous_BHW


def warm_cosine(done: float, least: float) -> float:
    """Learning rate factor at share `done` of the training: warm-up from `least` over a tenth, then cosine decay."""
    if done < WARM_UP:
        return least + (1 - least) * done / WARM_UP
    return least + (1 - least) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
