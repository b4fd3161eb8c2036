"""WinCLIP: compares CLIP embeddings of small windows with text prompts for defective and for normal parts.

Given k normal images (WinCLIP+), windows and patches are also compared with those of these images.

Source: Jeong et al., "WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation", CVPR 2023, arXiv 2303.14814:
the compositional prompt ensemble (sec. 4.1), windows and harmonic means, eq. 4 (sec. 4.2), association with normal
images, eqs. 5-7 (sec. 4.3).
Differs from the paper: images are resized bilinearly (CLIP: bicubic). Where the paper is silent, as in public
reproductions: text embeddings are averaged before normalisation, the temperature is 0.07, patches are the last block's
tokens after its norm and before the projection, and the two maps of WinCLIP+ are averaged.

Shapes: B images, P patches on a grid h w, W windows, D embedding dim, C token width, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import tensors_digest
from raydetect.blocks.backbones.clip import (
    PIXEL_MEAN,
    PIXEL_STD,
    ImageTower,
    TextTower,
    build_clip,
    clip_config,
    load_clip,
)
from raydetect.blocks.backbones.prompts import ANOMALOUS_STATES, NORMAL_STATES, compose
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.device_constants import kept_on_device
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.maps.windows import harmonic_mean, spread_harmonic, window_patches
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.detectors._base import Batch, Detector, DetectorInfo, ImageSize, ProgressCallback, Scores
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import RANDOM, clip_facts, clip_weights
from raydetect.errors import ArtifactError, SpecError

IMAGE, TEXT = "image", "text"
TEXT_EMBEDDINGS, QUICK_GELU, MEMORY, PATCHES = "text_embeddings", "quick_gelu", "memory.", "memory.patches"


class WinCLIP(NetworkDetector):
    """Similarity of windows to text prompts, and their distance to windows of a few normal images."""

    info = DetectorInfo(
        title="WinCLIP",
        paper="arXiv:2303.14814",
        venue="CVPR 2023",
        summary="similarity of CLIP windows to text prompts for defects, and distance to a few normal images",
        images="none or a few normal",
        published="MVTec AD, ViT-B/16+, zero-shot: 91.8 image AUROC, 85.1 pixel AUROC, 64.6 PRO; with one normal image "
        "93.1, 95.2, 87.1; with four 95.2, 96.2, 89.0 (paper, tables 1-4)",
    )
    phases = ("collect",)
    smoke: ClassVar = {"clip_model": "tiny", "weights": RANDOM}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of WinCLIP."""

        image_size: Annotated[
            ImageSize,
            Field(description="(height, width) in px that images are resized to; (0, 0) = the CLIP model's own size"),
        ] = (0, 0)
        window_size: Annotated[
            int | None, Field(ge=1, description="side of square images in px; none = use image_size")
        ] = None
        clip_model: Annotated[
            str, Field(description="open_clip name of a CLIP model with a vision transformer, or ViT-B/32 (sec. 5)")
        ] = "ViT-B-16-plus-240"
        weights: Annotated[
            str, Field(description='open_clip weights tag, "random", or path or URL of a file with its key names')
        ] = "laion400m_e32"
        scales: Annotated[
            tuple[Annotated[int, Field(ge=1)], ...],
            Field(min_length=1, description="window sides in patches, in addition to the whole image (sec. 4.2)"),
        ] = (2, 3)
        k_shot: Annotated[
            int,
            Field(ge=0, description="normal images to compare with, chosen by keyed hash (sec. 4.3); 0 = text only"),
        ] = 0
        class_name: Annotated[str, Field(min_length=1, description="what the images show (sec. 4.1)")] = "object"
        prompts_normal: Annotated[
            tuple[str, ...] | None,
            Field(min_length=1, description="prompts for a normal part, {} is the class name; none = the paper's 154"),
        ] = None
        prompts_anomalous: Annotated[
            tuple[str, ...] | None,
            Field(min_length=1, description="prompts for a defect, {} is the class name; none = the paper's 88"),
        ] = None
        temperature: Annotated[
            float, Field(gt=0, description="of the softmax over the two prompt classes (eq. 1); CLIP's initial value")
        ] = 0.07
        keep_text_tower: Annotated[
            bool, Field(description="store the text tower, which set_class_name needs; false = smaller artifact")
        ] = True

        def __post_init__(self) -> None:
            try:
                config = clip_config(self.clip_model)
                if self.class_name != "object":
                    require_named(self.prompts_normal, self.prompts_anomalous)
            except SpecError as error:
                raise ValueError(str(error)) from None
            square = (self.window_size or 0, self.window_size or 0)
            size = next((given for given in (self.image_size, square) if any(given)), config.image_size)
            if any(square) and size != square:
                raise ValueError(f"window_size {self.window_size} contradicts image_size {list(size)}")
            if min(size) < 1 or size[0] % config.patch_px or size[1] % config.patch_px:
                raise ValueError(
                    f"image_size {list(size)} is not a multiple of {config.patch_px} px, {config.name}'s patch"
                )
            if max(self.scales) * config.patch_px > min(size):
                raise ValueError(f"scales {list(self.scales)}: windows are larger than an image_size of {list(size)}")
            object.__setattr__(self, "image_size", size)

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.words_2D: Tensor | None = None
        self.memory: dict[str, BankSearch] = {}
        self.quick_gelu = False

    def num_collected(self) -> int:
        """`k_shot`."""
        return self.params.k_shot

    def load_weights(self) -> str:
        """Loads both towers and embeds the prompts."""
        config, weights = clip_config(self.params.clip_model), self.params.weights
        facts = {} if weights == RANDOM else clip_facts(config.name, weights)
        self.quick_gelu = bool(facts.get("quick_gelu", False))
        found = None if weights == RANDOM else clip_weights(config.name, weights)
        pixels = facts.get("mean", PIXEL_MEAN), facts.get("std", PIXEL_STD)
        image, text = build_clip(config, self.params.image_size, self.seed, self.quick_gelu, *pixels)
        if found is not None:
            load_clip(image, text, found, weights)
        source = f"random seed:{self.seed}" if weights == RANDOM else weights
        source += f" sha256:{tensors_digest({**image.state_dict(), **text.state_dict()})}"
        self.networks = {IMAGE: image, TEXT: text}
        self.to(self.device)
        self.words_2D = self._embed_prompts(text)
        if not self.params.keep_text_tower:
            del self.networks[TEXT]
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """The stored towers, with random weights."""
        config = clip_config(self.params.clip_model)
        image, text = build_clip(config, self.params.image_size, self.seed, self.quick_gelu)
        return {IMAGE: image, TEXT: text} if self.params.keep_text_tower else {IMAGE: image}

    def prompts(self) -> tuple[list[str], list[str]]:
        """Prompts for normal parts and for defects: every state in every template (sec. 4.1), or the user's."""
        texts = (
            self.params.prompts_normal or compose(NORMAL_STATES),
            (self.params.prompts_anomalous or compose(ANOMALOUS_STATES)),
        )
        normal, anomalous = ([text.replace("{}", self.params.class_name) for text in part] for part in texts)
        return normal, anomalous

    @torch.inference_mode()
    def _embed_prompts(self, text: TextTower) -> Tensor:
        return torch.stack([F.normalize(self.run(text.embed, texts).mean(0), dim=-1) for texts in self.prompts()])

    def set_class_name(self, name: str) -> None:
        """Sets the class name; a fitted detector keeps its normal images.

        Raises:
            SpecError: the name is empty, there is no text tower, or no user prompt contains {}.
        """
        if not name.strip():
            raise SpecError("winclip: an empty class name was given. Name what the images show, such as 'screw'.")
        require_named(self.params.prompts_normal, self.params.prompts_anomalous)
        text = self.networks.get(TEXT)
        if self.words_2D is not None and text is None:
            raise SpecError("winclip: has no text tower to embed a class name. Fit with keep_text_tower: true.")
        self.params = replace(self.params, class_name=name)
        if isinstance(text, TextTower):
            self.words_2D = self._embed_prompts(text)

    def collect(self, batch: Batch) -> dict[str, Tensor]:
        """Patches and windows of normal images."""
        found = [self._embed(image) for image in batch.images_BCHW.split(1)]
        patches_BPC = torch.cat([patches for _, patches, _ in found])
        sides = self.params.scales
        return {
            PATCHES: patches_BPC,
            **{f"{MEMORY}{s}": torch.cat([windows[s] for *_, windows in found]) for s in sides},
        }

    def finish(self, state: FitState, on_progress: ProgressCallback) -> None:
        """Gathers the normal images of all workers."""
        rows = state.rows if self.params.k_shot else {}
        gathered = {name: kept.all_rows().to(self.device) for name, kept in sorted(rows.items())}
        self.memory = {name: BankSearch(rows_ND) for name, rows_ND in gathered.items()}
        self.freeze()
        count = sum(map(len, gathered.values()))
        on_progress(count, count)

    def facts(self) -> dict[str, Any]:
        """Number of normal images in memory."""
        if PATCHES not in self.memory:
            return {"memory": {"images": 0}}
        height, width = self._tower().grid
        return {"memory": {"images": self.memory[PATCHES].num_rows // (height * width)}}

    @torch.inference_mode()
    def score(self, images_BCHW: Tensor) -> Scores:
        """Image scores (eqs. 1, 7) and maps (eqs. 4-6).

        Embeds one image at a time, since its windows already form a batch, and searches the memory for all at once.
        """
        self.require_fitted()
        found = [self._embed(image) for image in images_BCHW.split(1)]
        by_text = [self._by_text(whole_1D, windows) for whole_1D, _, windows in found]
        score_B, map_Bhw = (torch.cat(parts) for parts in zip(*by_text, strict=True))
        if self.memory:
            near_Bhw = self._by_memory(
                torch.cat([patches_1PC for _, patches_1PC, _ in found]),
                {side: torch.cat([windows[side] for *_, windows in found]) for side in self.params.scales},
            )
            score_B, map_Bhw = (score_B + near_Bhw.amax((1, 2))) / 2, (map_Bhw + near_Bhw) / 2
        return Scores(score_B, upsample(map_Bhw, self.params.image_size))

    def _by_text(self, whole_1D: Tensor, windows: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """(image score, map on the grid of patches) of one image, from the prompts (eqs. 1-4)."""
        grid, score_1 = self._tower().grid, self._anomaly_probability(whole_1D)
        spread = [spread_harmonic(self._anomaly_probability(found), grid, side) for side, found in windows.items()]
        return score_1, harmonic_mean([score_1[:, None, None], *spread])

    def _by_memory(self, patches_BPC: Tensor, windows: Mapping[int, Tensor]) -> Tensor:
        """Mean distance of patches and windows to the normal images (eqs. 5-6), (B, h, w)."""
        grid = self._tower().grid
        near = [self._distance(PATCHES, patches_BPC).view(-1, *grid)]
        near += [spread_harmonic(self._distance(f"{MEMORY}{s}", found), grid, s) for s, found in windows.items()]
        return torch.stack(near).mean(0)

    def _embed(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Embeddings of whole images, their patches, and their windows at every scale."""
        tower, size = self._tower(), self.params.image_size
        if (images_BCHW.shape[-2], images_BCHW.shape[-1]) != size:
            raise SpecError(
                f"winclip: expects images of {size[0]} x {size[1]} px, given {images_BCHW.shape[-2]} x "
                f"{images_BCHW.shape[-1]}. Resize them."
            )
        tokens_BTC = self.run(tower.tokens, images_BCHW)
        sides = self.params.scales
        windows = {
            side: self.run(tower.embed_windows, tokens_BTC, _window_patches(tokens_BTC.device, tower.grid, side))
            for side in sides
        }
        return *self.run(tower.embed, tokens_BTC), windows

    def _tower(self) -> ImageTower:
        tower = self.networks.get(IMAGE)
        if not isinstance(tower, ImageTower):
            self.require_fitted()
        assert isinstance(tower, ImageTower)
        return tower

    def _anomaly_probability(self, embeddings_XD: Tensor) -> Tensor:
        """Anomaly probability: softmax over the cosines to the two prompt classes (eqs. 1-2)."""
        assert self.words_2D is not None
        cosine_X2 = embeddings_XD @ self.words_2D.T
        return torch.sigmoid((cosine_X2[..., 1] - cosine_X2[..., 0]) / self.params.temperature)

    def _distance(self, name: str, embeddings_BXD: Tensor) -> Tensor:
        """(1 - cosine) / 2 to the nearest memory entry (eq. 5): a quarter of the squared distance of unit vectors."""
        distance_N1, _ = self.memory[name].nearest(embeddings_BXD.flatten(0, 1))
        return distance_N1.square().view(embeddings_BXD.shape[:2]) / 4

    def tensors(self) -> dict[str, Tensor]:
        """Towers, prompt embeddings, and memory."""
        found = super().tensors()
        assert self.words_2D is not None
        memory = {name: search.bank() for name, search in self.memory.items()}
        return {**found, TEXT_EMBEDDINGS: self.words_2D, QUICK_GELU: torch.tensor([self.quick_gelu]), **memory}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores towers, prompt embeddings, and memory."""
        needed = [PATCHES, *(f"{MEMORY}{side}" for side in self.params.scales)] if self.params.k_shot else []
        for name in (TEXT_EMBEDDINGS, QUICK_GELU, *needed):
            if name not in tensors:
                raise ArtifactError(f"winclip: the artifact has no tensor {name!r}. Fit again.")
        self.quick_gelu = bool(tensors[QUICK_GELU])
        self.words_2D = tensors[TEXT_EMBEDDINGS]
        self.memory = {name: BankSearch(tensors[name]) for name in needed}
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "WinCLIP":
        """Moves towers, prompt embeddings, and memory."""
        super().to(device)
        self.words_2D = None if self.words_2D is None else self.words_2D.to(device)
        self.memory = {name: search.to(device) for name, search in self.memory.items()}
        return self


def require_named(*prompts: Sequence[str] | None) -> None:
    """Rejects user prompts that do not depend on the class name.

    Raises:
        SpecError: both prompt lists are the user's, and none contains {}.
    """
    if all(texts is not None and not any("{}" in text for text in texts) for texts in prompts):
        raise SpecError(
            "winclip: the class name would change nothing. Put {} into prompts_normal or prompts_anomalous."
        )


_window_patches = kept_on_device(window_patches)
