"""APRIL-GAN: compares CLIP's patch tokens of several depths with text prompts, through linear layers that are trained.

The linear layers learn from images of another data set with masks of its defects; given k normal images, patches are
also compared with theirs. There is no GAN in it.

Source: Chen, Han and Zhang, "APRIL-GAN: A Zero-/Few-Shot Anomaly Classification and Segmentation Method for CVPR 2023
VAND Workshop Challenge Tracks 1 & 2", arXiv 2305.17382, and the authors' code (ByChelsea/VAND-APRIL-GAN).
Differs from the paper: with normal images, its image score takes the highest value of the map on a scale of the lowest
and highest of all test images of a category. Here 0 is what the k normal images reach, each compared with the others,
and 1 is twice the number of layers: text that is certain, and patches orthogonal to all normal ones, in every layer.
Differs from the authors' code: CLIP runs with the activation that its weights were trained with (the code runs OpenAI's
with GELU at a size that is not their own); normal images are drawn without replacement; a mosaic has images of one size
and draws them from a category, not first a kind of defect.

Shapes: B images, P patches on a grid h w, L layers, C token width, D embedding dim, K normal images, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.augment.mosaic import mosaic
from raydetect.blocks.backbones.clip import clip_config
from raydetect.blocks.backbones.prompts import NORMAL_STATES, SCENE_ANOMALOUS_STATES, SCENE_TEMPLATES, compose
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.networks.losses import dice_loss, focal_loss
from raydetect.blocks.search.matrix_product import product
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.blocks.seeding import keyed_seed, keyed_unit, shuffled
from raydetect.detectors._base import (
    Batch,
    DetectorInfo,
    ImageSize,
    Known,
    ProgressCallback,
    Scores,
    TrainingPlan,
)
from raydetect.detectors._clip import ClipDetector, checked_config, require_whole_patches
from raydetect.detectors._weights import RANDOM
from raydetect.errors import SpecError

ADAPTERS, MEMORY, NORMAL_LEVEL = "adapters", "memory.", "normal_level"
BETAS = (0.5, 0.999)  # of Adam
QUARTERS = 4


class AprilGAN(ClipDetector):
    """Similarity of adapted patch tokens to text prompts, and their distance to those of a few normal images."""

    info = DetectorInfo(
        title="APRIL-GAN",
        paper="arXiv:2305.17382",
        venue="CVPR 2023 VAND challenge",
        summary="similarity of CLIP's patches to text prompts, by layers trained on another data set's masks, and "
        "distance to a few normal images",
        images="none or a few normal",
        auxiliary="labelled masks",
        published="MVTec AD, ViT-L/14-336, trained on VisA, zero-shot: 86.1 image AUROC, 87.6 pixel AUROC, 44.0 PRO; "
        "with four normal images 92.8, 95.9, 91.8; VisA, trained on MVTec AD: 78.0, 94.2, 86.8; with four 92.6, 96.2, "
        "90.2 (arXiv 2305.17382)",
    )
    phases = ("train", "collect")
    smoke: ClassVar = {
        "image_size": (64, 64),
        "clip_model": "tiny",
        "weights": RANDOM,
        "layers": (1, 2),
        "epochs": 20,
        "learning_rate": 1e-2,
    }

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(ClipDetector.Params):
        """Parameters of APRIL-GAN."""

        image_size: Annotated[
            ImageSize, Field(description="(height, width) in px that images are resized to, multiples of the patch")
        ] = (518, 518)
        clip_model: Annotated[str, Field(description="open_clip name of a CLIP model with a vision transformer")] = (
            "ViT-L-14-336"
        )
        weights: Annotated[
            str, Field(description='open_clip weights tag, "random", or path or URL of a file with its key names')
        ] = "openai"
        class_name: Annotated[
            str, Field(min_length=1, description="what the images of source show; auxiliary images have their category")
        ] = "object"
        prompts_normal: Annotated[
            tuple[str, ...] | None,
            Field(min_length=1, description="prompts for a normal part, {} is the class name; none = the authors' 245"),
        ] = None
        prompts_anomalous: Annotated[
            tuple[str, ...] | None,
            Field(min_length=1, description="prompts for a defect, {} is the class name; none = the authors' 175"),
        ] = None
        layers: Annotated[
            tuple[Annotated[int, Field(ge=1)], ...],
            Field(min_length=1, description="blocks of the image tower whose patch tokens are used, from 1"),
        ] = (6, 12, 18, 24)
        k_shot: Annotated[
            int,
            Field(ge=0, description="normal images to compare with, chosen by keyed hash; 0 = text only"),
        ] = 0
        temperature: Annotated[
            float, Field(gt=0, description="of the softmax over the two prompt classes; cosines are divided by it")
        ] = 0.01
        focal_gamma: Annotated[float, Field(ge=0, description="gamma of the focal loss")] = 2.0
        epochs: Annotated[
            int, Field(ge=1, description="passes over the auxiliary images; the authors' 15 on VisA, 3 on MVTec AD")
        ] = 15
        batch_size: Annotated[int, Field(ge=1, description="images per step")] = 8
        learning_rate: Annotated[float, Field(gt=0, description="of Adam")] = 1e-3
        mosaic_ratio: Annotated[
            float,
            Field(
                ge=0,
                le=1,
                description="share of training images that are replaced by a mosaic of four of their category; the "
                "authors' 0.2 on MVTec AD, 0 on VisA",
            ),
        ] = 0.0

        def __post_init__(self) -> None:
            config = checked_config("aprilgan", self)
            require_whole_patches(self.image_size, config)
            if sorted(set(self.layers)) != list(self.layers) or self.layers[-1] > config.num_blocks:
                raise ValueError(
                    f"layers {list(self.layers)} are not ascending numbers of the {config.num_blocks} blocks of "
                    f"{config.name}"
                )

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.memory: dict[str, Tensor] = {}
        self.searches: dict[str, BankSearch] = {}
        self.normal_level_1 = torch.zeros(1)
        self._words: dict[str, Tensor] = {}

    def num_collected(self) -> int:
        """`k_shot`."""
        return self.params.k_shot

    def default_prompts(self) -> tuple[Sequence[str], Sequence[str]]:
        """Every state in every template (authors' code)."""
        return compose(NORMAL_STATES, SCENE_TEMPLATES), compose(SCENE_ANOMALOUS_STATES, SCENE_TEMPLATES)

    def mean_embedding(self, embeddings_ND: Tensor) -> Tensor:
        """The normalised mean of normalised embeddings."""
        return F.normalize(F.normalize(embeddings_ND, dim=-1).mean(0), dim=-1)

    def load_weights(self) -> str:
        """Loads both towers and embeds the prompts."""
        self._words = {}
        return super().load_weights()

    def make_networks(self) -> dict[str, nn.Module]:
        """The stored towers and the linear layers, with random weights."""
        return super().make_networks() | {ADAPTERS: self._adapters()}

    def _adapters(self) -> nn.ModuleList:
        config = clip_config(self.params.clip_model)
        return nn.ModuleList(nn.Linear(config.width, config.embed_dim) for _ in self.params.layers)

    def begin_training(self, num_images: int) -> TrainingPlan:
        """Creates a linear layer for every block."""
        params = self.params
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, ADAPTERS))
            adapters = self._adapters().to(self.device)
        self.networks[ADAPTERS] = adapters
        optimizer = torch.optim.Adam(adapters.parameters(), lr=params.learning_rate, betas=BETAS)
        if not params.mosaic_ratio:
            return TrainingPlan(adapters, optimizer, params.epochs, params.batch_size)
        size = QUARTERS * params.batch_size
        return TrainingPlan(
            adapters, optimizer, params.epochs, size, batches=self.mosaic_batches, images_per_item=QUARTERS
        )

    def mosaic_batches(self, known: Mapping[str, Known], epoch: int) -> list[list[str]]:
        """An epoch's batches of items of four images: the quarters of a mosaic, or one image four times."""
        members: dict[str | None, list[str]] = {}
        for key in sorted(known):
            members.setdefault(known[key].category, []).append(key)
        order = shuffled(list(known), self.seed, epoch)
        items = [self._item(key, members[known[key].category], epoch, number) for number, key in enumerate(order)]
        count = -(-len(items) // self.params.batch_size)
        cuts = [len(items) * number // count for number in range(count + 1)]
        return [list(chain(*items[start:stop])) for start, stop in pairwise(cuts)]

    def _item(self, key: str, members: list[str], epoch: int, number: int) -> list[str]:
        if not self._is_mosaic(epoch, number):
            return [key] * QUARTERS
        units = [keyed_unit(self.seed, "quarter", epoch, number, quarter) for quarter in range(QUARTERS)]
        return [members[int(unit * len(members))] for unit in units]

    def _is_mosaic(self, epoch: int, number: int) -> bool:
        return keyed_unit(self.seed, "mosaic", epoch, number) < self.params.mosaic_ratio

    def training_pieces(self, batch: Batch) -> Sequence[Batch]:
        """The batch, with mosaics put together."""
        return [self._with_mosaics(batch) if self.params.mosaic_ratio else batch]

    def _with_mosaics(self, batch: Batch) -> Batch:
        assert batch.masks_BHW is not None
        items = []
        for start in range(0, len(batch.keys), QUARTERS):
            images_4CHW, masks_4HW = (x[start : start + QUARTERS] for x in (batch.images_BCHW, batch.masks_BHW))
            whole = self._is_mosaic(batch.epoch, batch.draws[start] // QUARTERS)
            items.append(mosaic(images_4CHW, masks_4HW) if whole else (images_4CHW[0], masks_4HW[0]))
        images_BCHW, masks_BHW = (torch.stack(part) for part in zip(*items, strict=True))
        first = slice(None, None, QUARTERS)
        keys, categories, draws = batch.keys[first], batch.categories[first], batch.draws[first]
        return Batch(images_BCHW, keys, None, batch.epoch, draws, masks_BHW, categories)

    def training_loss(self, piece: Batch) -> Tensor:
        """Sum over layers of the focal and the dice loss."""
        assert piece.masks_BHW is not None
        with torch.no_grad():
            _, levels = self._embed(piece.images_BCHW)
        words_B2D = torch.stack([self._words_of(category) for category in piece.categories])
        losses = []
        for map_BHW in self._text_maps(levels, words_B2D):
            losses += [focal_loss(map_BHW, piece.masks_BHW, self.params.focal_gamma)]
            losses += [dice_loss(map_BHW, piece.masks_BHW)]
        return torch.stack(losses).sum()

    def _words_of(self, category: str | None) -> Tensor:
        """Prompt embeddings (2, D) of an auxiliary image, by its category."""
        name = self.params.class_name if category is None else category
        if name not in self._words:
            self._words[name] = self.embed_words(name)
        return self._words[name].clone()  # outside of inference mode, for autograd

    def end_training(self) -> None:
        """Freezes the linear layers; normal images are collected afterwards."""
        self.networks[ADAPTERS].eval().requires_grad_(False)

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Patch tokens of normal images, by layer."""
        _, levels = self._embed(batch.images_BCHW)
        return dict(zip(self._memory_names(), levels, strict=True))

    def extend(self, state: FitState) -> None:
        """Keeps the linear layers; the memory becomes that of the new images alone.

        Raises:
            SpecError: there is no memory.
        """
        if not self.params.k_shot:
            raise SpecError("aprilgan: k_shot: 0 compares with no image, so there is no memory to replace. Fit it.")

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Gathers the normal images of all workers, and sets the scale of the image score."""
        height, width = self.tower().grid
        rows = state.rows if self.params.k_shot else {}
        self.memory = {
            name: kept.all_rows().unflatten(0, (-1, height * width)).to(self.device)
            for name, kept in sorted(rows.items())
        }
        self._index_memory()
        self.freeze()
        self.normal_level_1 = self._normal_level()
        count = sum(tokens_KPC.shape[0] * tokens_KPC.shape[1] for tokens_KPC in self.memory.values())
        on_progress(count, count)

    def _index_memory(self) -> None:
        self.searches = {
            name: BankSearch(F.normalize(tokens_KPC, dim=-1).flatten(0, 1)) for name, tokens_KPC in self.memory.items()
        }

    @torch.inference_mode()
    def _normal_level(self) -> Tensor:
        """Mean over the normal images of the highest value of the map, each image compared with the others, (1,).

        The only image is at no distance from itself.
        """
        if not self.memory:
            return torch.zeros(1, device=self.device)
        layers_LKPC = torch.stack([self.memory[name] for name in self._memory_names()])
        unit_LKPC = F.normalize(layers_LKPC, dim=-1)
        found = []
        for image in range(layers_LKPC.shape[1]):
            text_1HW = self._text_map([tokens_KPC[image : image + 1] for tokens_KPC in layers_LKPC])
            others = [other for other in range(layers_LKPC.shape[1]) if other != image] or [image]
            near = [
                torch.stack([1 - product(unit_KPC[image], unit_KPC[other]).amax(1) for other in others]).amin(0)
                for unit_KPC in unit_LKPC
            ]
            found.append((text_1HW + self._upsampled(torch.stack(near)).sum(0)).amax())
        return torch.stack(found).mean()[None]

    def set_class_name(self, name: str) -> None:
        """Sets the class name; a fitted detector keeps its linear layers and normal images."""
        super().set_class_name(name)
        if self.is_fitted:
            self.normal_level_1 = self._normal_level()

    def facts(self) -> dict[str, Any]:
        """Number of normal images in memory, and the level of the map that they reach."""
        images = next((len(tokens_KPC) for tokens_KPC in self.memory.values()), 0)
        return {"memory": {"images": images}, **({NORMAL_LEVEL: float(self.normal_level_1)} if images else {})}

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Maps by text and memory, summed over layers; image scores by text and the highest value of the map."""
        self.require_fitted()
        whole_BD, levels = self._embed(images_BCHW)
        assert self.words_2D is not None
        score_B, map_BHW = torch.sigmoid(self._logits(whole_BD, self.words_2D)), self._text_map(levels)
        if self.memory:
            map_BHW = map_BHW + self._memory_map(levels)
            spread_1 = (2 * len(levels) - self.normal_level_1).clamp(min=1)
            score_B = (score_B + (map_BHW.amax((1, 2)) - self.normal_level_1) / spread_1) / 2
        return Scores(score_B, map_BHW)

    def _embed(self, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """L2-normalised embeddings (B, D) of images, and their patch tokens (B, P, C) of every layer."""
        self.require_size(images_BCHW)
        tower = self.tower()
        whole_BD, levels = self.run(tower.embed_blocks, self.run(tower.tokens, images_BCHW), self.params.layers)
        return whole_BD, levels

    def _logits(self, unit_XD: Tensor, words_2D: Tensor) -> Tensor:
        """Logit of the anomaly probability: the difference of the cosines to the two prompt classes."""
        return (unit_XD * (words_2D[..., 1, :] - words_2D[..., 0, :])).sum(-1) / self.params.temperature

    def _text_map(self, levels: Sequence[Tensor]) -> Tensor:
        assert self.words_2D is not None
        return torch.stack(self._text_maps(levels, self.words_2D)).sum(0)

    def _text_maps(self, levels: Sequence[Tensor], words: Tensor) -> list[Tensor]:
        """Anomaly probabilities of every layer, (B, H, W); words are (2, D), or (B, 2, D) for each image its own."""
        adapters = self.networks[ADAPTERS]
        assert isinstance(adapters, nn.ModuleList)
        words = words if words.ndim == 2 else words[:, None]
        logits = [
            self._logits(F.normalize(adapter(tokens_BPC), dim=-1), words)
            for adapter, tokens_BPC in zip(adapters, levels, strict=True)
        ]
        return [torch.sigmoid(self._upsampled(logits_BP)) for logits_BP in logits]

    def _memory_map(self, levels: Sequence[Tensor]) -> Tensor:
        """Sum over layers of 1 - cosine to the nearest normal patch, (B, H, W)."""
        maps = []
        for name, tokens_BPC in zip(self._memory_names(), levels, strict=True):
            distance_N1, _ = self.searches[name].nearest(F.normalize(tokens_BPC, dim=-1).flatten(0, 1))
            maps.append(self._upsampled(distance_N1.square().view(tokens_BPC.shape[:2]) / 2))
        return torch.stack(maps).sum(0)

    def _upsampled(self, scores_BP: Tensor) -> Tensor:
        return upsample(scores_BP.unflatten(1, self.tower().grid), self.params.image_size, align_corners=True)

    def _memory_names(self) -> list[str]:
        return [f"{MEMORY}{layer}" for layer in self.params.layers]

    def tensors(self) -> dict[str, Tensor]:
        """Towers, prompt embeddings, linear layers, memory, and its level."""
        return super().tensors() | self.memory | {NORMAL_LEVEL: self.normal_level_1}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores all of them."""
        needed = self._memory_names() if self.params.k_shot else []
        self.require_tensors(tensors, NORMAL_LEVEL, *needed)
        self.memory = {name: tensors[name].float() for name in needed}
        self.normal_level_1 = tensors[NORMAL_LEVEL].float().reshape(1)
        self._index_memory()
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "AprilGAN":
        """Moves all of them."""
        super().to(device)
        self.memory = {name: tokens_KPC.to(device) for name, tokens_KPC in self.memory.items()}
        self.searches = {name: search.to(device) for name, search in self.searches.items()}
        self.normal_level_1 = self.normal_level_1.to(device)
        return self
