"""MemSeg: a U-Net head learns on simulated defects to tell them by how features differ from those of stored images.

Normal images leave their feature pyramids in a memory; the difference from the nearest one is shown to the head.

Source: Yang et al., "MemSeg: A semi-supervised method for image surface defect detection using differences and
commonalities", arXiv 2205.00908; layers, optimizer and schedule as in TooTouch/MemSeg.
Differs from the paper: the stem is frozen with the levels, so that the memory always equals what the head sees; the
foreground is found by Otsu's threshold and the image's border instead of a threshold per category; structural defects
take three of DRAEM's ten changes before their tiles are shuffled; without `textures`, procedural ones take DTD's place;
images are resized, not resized and cropped; the last step is kept, no test image chooses it.

Shapes: B images, M memories, K neighbours, C channels, h w feature grid, H W pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torchvision.models.resnet import BasicBlock

from raydetect.blocks.backbone import Backbone, stage_of
from raydetect.blocks.fusion import MaskDecoder, Memory, MultiScaleFusion
from raydetect.blocks.losses import focal_loss
from raydetect.blocks.rows import FitState
from raydetect.blocks.seeding import keyed_generator
from raydetect.blocks.synthesis import blend, foreground, perlin_mask, shuffled_tiles, uniform
from raydetect.blocks.textures import Textures, varied
from raydetect.blocks.unet import keyed_init
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, Tick, TrainingPlan
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._textures import load_textures
from raydetect.detectors._weights import load_backbone
from raydetect.errors import SpecError

BACKBONE, MEMORY, STAGE, FUSION, DECODER = "backbone", "memory", "stage", "fusion", "decoder"
MULTIPLE = 32
TILES = (4, 8)
LEAST_OPACITY = 0.15
FOCAL_GAMMA = 4.0
WARM_UP = 0.1
FIRST_STRIDE = 4
TRAINED = (STAGE, FUSION, DECODER)


class MemSeg(NetworkDetector):
    """Segmentation of simulated defects by differences from a memory of normal images."""

    info = DetectorInfo(
        title="MemSeg",
        paper="arXiv:2205.00908",
        venue="arXiv 2022",
        summary="a network learns on simulated defects to find them by their difference from stored normal images",
        published="MVTec AD, ResNet-18: 99.56 image AUROC, 98.84 pixel AUROC (paper, tables 1-2)",
    )
    phases = ("collect", "train")
    smoke: ClassVar = {
        "image_size": (64, 64),
        "backbone": "test_resnet",
        "stem": "act1",
        "deepest_layer": None,
        "memory_size": 6,
        "feature_dim": 32,
        "texture_ratio": 1.0,
        "training_steps": 120,
        "batch_size": 2,
        "learning_rate": 1e-2,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of MemSeg."""

        backbone: Annotated[str, Field(description="torchvision or timm name; its levels are frozen (sec. 3.2)")] = (
            "resnet18"
        )
        stem: Annotated[
            str, Field(description="the backbone's first output, a half of the image's size (sec. 3.2)")
        ] = "relu"
        layers: Annotated[
            tuple[str, str, str], Field(description="levels kept in memory, shallowest first (sec. 3.2)")
        ] = ("layer1", "layer2", "layer3")
        deepest_layer: Annotated[
            str | None,
            Field(
                description="trained stage that the decoder begins with, from `weights` (sec. 3.2); none = a fresh one"
            ),
        ] = "layer4"
        weights: Annotated[str, Field(description='"imagenet", "random", or a path or URL of a weights file')] = (
            "imagenet"
        )
        memory_size: Annotated[
            int,
            Field(
                ge=1,
                description="normal images in memory (sec. 4.2), 1.8 MB each at 256 px; all where there are fewer",
            ),
        ] = 30
        k_neighbors: Annotated[
            int,
            Field(
                ge=1,
                description="memories compared with: 1 = the nearest (sec. 3.2); of more, each position "
                "attends to those that are near it",
            ),
        ] = 1
        feature_dim: Annotated[
            int,
            Field(
                ge=MULTIPLE,
                multiple_of=MULTIPLE,
                description="channels that the decoder begins with, halved at each of its levels; ResNet-18's layer4 "
                "has the default (sec. 3.2), other widths are reached by a 1 x 1 convolution",
            ),
        ] = 512
        textures: Annotated[
            str | None,
            Field(
                description="folder or archive of images for defects, such as DTD (sec. 3.1); none = procedural ones"
            ),
        ] = None
        texture_ratio: Annotated[
            float,
            Field(ge=0, le=1, description="share of defects made of textures, the others of the image's own tiles"),
        ] = 0.5
        anomalous_ratio: Annotated[
            float, Field(gt=0, le=1, description="share of images that get a simulated defect (sec. 4.1)")
        ] = 0.5
        foreground: Annotated[
            Literal["auto", "none"],
            Field(description="where defects may lie: off a plain background (sec. 3.1), or none = anywhere"),
        ] = "auto"
        l1_weight: Annotated[float, Field(ge=0, description="lambda of the L1 loss (sec. 3.4)")] = 0.6
        focal_weight: Annotated[float, Field(ge=0, description="lambda of the focal loss (sec. 3.4)")] = 0.4
        training_steps: Annotated[int, Field(ge=1, description="batches, rounded up to whole passes (code)")] = 5000
        batch_size: Annotated[int, Field(ge=1, description="images per step (sec. 4.1)")] = 8
        learning_rate: Annotated[
            float, Field(gt=0, description="of AdamW, after a tenth of the steps; then down by a cosine (code)")
        ] = 3e-3
        last_learning_rate: Annotated[float, Field(ge=0, description="at the begin and end (code)")] = 1e-4
        weight_decay: Annotated[float, Field(ge=0, description="of AdamW (code)")] = 5e-4
        top_pixels: Annotated[
            int, Field(ge=1, description="the image score is the mean of so many of the largest values (sec. 4.1)")
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
        """Keeps the parameters."""
        super().__init__(params, seed)
        self.textures = Textures()
        self.num_memories = params.memory_size
        self.stage_weights: dict[str, Tensor] = {}

    def load_weights(self) -> str:
        """Loads the backbone and the stage that is trained on, and reads the textures."""
        used = (self.params.stem, *self.params.layers)
        top = self.params.deepest_layer
        whole, said = load_backbone(
            self.params.backbone, used if top is None else (*used, top), self.params.weights, self.seed
        )
        weights = whole.weights()
        backbone = Backbone(self.params.backbone, used, self.seed)
        backbone.load(weights, self.params.weights)
        self.networks = {BACKBONE: backbone.freeze().to(self.device)}
        start = f"{top}."
        self.stage_weights = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        if self.params.textures is None:
            return said
        images, of = load_textures(self.params.textures, self.params.image_size)
        self.textures = Textures(images)
        return f"{said}, {of}"

    def make_networks(self) -> dict[str, nn.Module]:
        """Everything, initialised by the seed, the memory with zeros."""
        words = self.params
        backbone = Backbone(words.backbone, (words.stem, *words.layers), self.seed).eval()
        with torch.no_grad():
            stem, *levels = (level[0].shape for level in backbone(torch.zeros(1, 3, *words.image_size)))
        if [words.image_size[0] // shape[1] for shape in (stem, *levels)] != [2, 4, 8, 16]:
            raise SpecError(
                f"memseg: {words.backbone} at {[words.stem, *words.layers]} does not halve from level to level."
            )
        widths = [shape[0] for shape in levels]
        with keyed_init(self.seed, "memseg"):
            stage = self._stage(widths[-1])
            fusion, decoder = MultiScaleFusion(widths), MaskDecoder(stem[0], widths, words.feature_dim)
        memory = Memory([torch.zeros(self.num_memories, *shape) for shape in levels])
        return {BACKBONE: backbone, MEMORY: memory, STAGE: stage, FUSION: fusion, DECODER: decoder}

    def _stage(self, in_channels: int) -> nn.Module:
        """The deepest, trained stage: the backbone's own, or two residual blocks as in a ResNet-18."""
        width = self.params.feature_dim
        if self.params.deepest_layer is None:
            shortcut = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            return nn.Sequential(BasicBlock(in_channels, width, 2, shortcut), BasicBlock(width, width))
        stage = stage_of(self.params.backbone, self.params.deepest_layer)
        if self.stage_weights:
            stage.load_state_dict(self.stage_weights, strict=False)
        with torch.no_grad():
            found = stage.eval()(torch.zeros(1, in_channels, 2, 2)).shape[1]
        return nn.Sequential(stage, nn.Identity() if found == width else nn.Conv2d(found, width, 1))

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """The levels of every image, a row for each position."""
        levels = self.networks[BACKBONE](batch.images_BCHW)[1:]
        return {f"level{i}": level.flatten(2).transpose(1, 2) for i, level in enumerate(levels)}

    def finish(self, state: FitState, tick: Tick) -> None:
        """Puts the images of all workers into the memory."""
        self.is_fitted = False
        rows = [state.rows[f"level{i}"].everything() for i in range(len(self.params.layers))]
        height, width = (size // FIRST_STRIDE for size in self.params.image_size)
        self.num_memories = len(rows[0]) // (height * width)
        if self.num_memories < self.params.k_neighbors:
            raise SpecError(
                f"memseg: {self.num_memories} images are in memory, k_neighbors is {self.params.k_neighbors}. Lower it "
                "or add images."
            )
        grids = [(height >> i, width >> i) for i in range(len(rows))]
        levels = [row.view(-1, *grid, row.shape[1]).permute(0, 3, 1, 2) for row, grid in zip(rows, grids, strict=True)]
        self.networks[MEMORY] = Memory([level.contiguous() for level in levels]).to(self.device)
        tick(self.num_memories, self.num_memories)

    def num_collected(self) -> int:
        """The memory's size."""
        return self.params.memory_size

    def begin_training(self, num_images: int) -> TrainingPlan:
        """A fresh stage and head under AdamW, with as many passes as make the stated number of steps."""
        self.is_fitted = False
        made = self.make_networks()
        head = {name: made[name].to(self.device).to(memory_format=torch.channels_last).train() for name in TRAINED}
        self.networks |= head
        module = nn.ModuleDict(head)
        rate, decay = self.params.learning_rate, self.params.weight_decay
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay, fused=True)
        epochs = -(-self.params.training_steps // -(-num_images // self.params.batch_size))
        least = self.params.last_learning_rate / rate
        return TrainingPlan(
            module, optimizer, epochs, self.params.batch_size, lambda done: warm_cosine(done / epochs, least)
        )

    def training_loss(self, piece: Batch) -> Tensor:
        """L1 and focal loss of the masks of simulated defects (sec. 3.4)."""
        words = zip(piece.images_BCHW.cpu(), piece.keys, strict=True)
        made = [self._simulated(image, keyed_generator(self.seed, "memseg", key, piece.epoch)) for image, key in words]
        images, masks = (torch.stack(parts).to(self.device) for parts in zip(*made, strict=True))
        anomalous = self._forward(255 * images)
        l1 = (anomalous - masks).abs().mean()
        focal = focal_loss(anomalous, masks, FOCAL_GAMMA)
        return self.params.l1_weight * l1 + self.params.focal_weight * focal

    def end_training(self) -> None:
        """Freezes everything."""
        self.freeze()

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """The map of probabilities; the image score is the mean of its largest values (sec. 4.1)."""
        self.require_fitted()
        size_px = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if size_px != self.params.image_size:
            raise SpecError(
                f"memseg: an image of {size_px[0]} x {size_px[1]} px does not fit a memory of images of "
                f"{self.params.image_size[0]} x {self.params.image_size[1]} px. Resize it, or fit at its size."
            )
        map_BHW = self._forward(images_BCHW)
        largest = map_BHW.flatten(1).topk(min(self.params.top_pixels, map_BHW[0].numel())).values
        return Scores(largest.mean(1), map_BHW)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores everything; the memory may be smaller than `memory_size`."""
        self.num_memories = len(tensors.get(f"{MEMORY}.level0", ())) or self.params.memory_size
        super().load_tensors(tensors)

    def _simulated(self, image_3HW: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """An image in [0, 1] with a simulated defect or without, and the defect's mask (sec. 3.1)."""
        image, size_px = image_3HW.float() / 255, (image_3HW.shape[-2], image_3HW.shape[-1])
        if uniform(0, 1, generator) >= self.params.anomalous_ratio:
            return image, torch.zeros(size_px)
        mask = perlin_mask(size_px, generator)
        if self.params.foreground == "auto":
            mask &= foreground(image_3HW)
        if uniform(0, 1, generator) < self.params.texture_ratio:
            source = self.textures.draw(size_px, generator)
        else:
            source = shuffled_tiles(varied(image, generator), TILES, generator)
        return blend(image, source, mask, uniform(LEAST_OPACITY, 1, generator)), mask.float()

    def _forward(self, images_B3HW: Tensor) -> Tensor:
        """Probability of being anomalous, float32 (B, H, W), from images in [0, 255]."""
        memory = self.networks[MEMORY]
        assert isinstance(memory, Memory)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # as exact as what is in memory
            stem, *levels = self.networks[BACKBONE](images_B3HW)
            remembered = memory.recall(levels, self.params.k_neighbors)
            differences = [(level - other).square() for level, other in zip(levels, remembered, strict=True)]
        fused = self.networks[FUSION](levels, differences)
        logits_B2HW = self.networks[DECODER](self.networks[STAGE](levels[-1]), stem, fused)
        return logits_B2HW.float().softmax(1)[:, 1]


def warm_cosine(done: float, least: float) -> float:
    """Factor of the learning rate after a share of the training: from `least` up for a tenth, and down by a cosine."""
    if done < WARM_UP:
        return least + (1 - least) * done / WARM_UP
    return least + (1 - least) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
