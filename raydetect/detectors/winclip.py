"""WinCLIP: compares CLIP embeddings of small windows with text prompts for defective and for normal parts.

Given k normal images (WinCLIP+), windows and patches are also compared with those of these images.

Source: Jeong et al., "WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation", CVPR 2023, arXiv 2303.14814:
the compositional prompt ensemble (sec. 4.1), windows and harmonic means, eq. 4 (sec. 4.2), association with normal
images, eqs. 5-7 (sec. 4.3).
Differs from the paper: images are resized bilinearly (CLIP: bicubic). Where the paper is silent, these are our choices:
text embeddings are averaged before normalisation, the temperature is 0.07, patches are the last block's tokens before
the projection, and the two maps of WinCLIP+ are averaged. Whether CLIP's last norm is applied to the patches is
`norm_patches`: it is in the tokens that open_clip 3 returns.

Shapes: B images, P patches on a grid h w, W windows, D embedding dim, C token width, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raydetect.blocks.backbones.prompts import ANOMALOUS_STATES, NORMAL_STATES, compose
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.device_constants import kept_on_device
from raydetect.blocks.maps.anomaly_map import upsample
from raydetect.blocks.maps.windows import harmonic_mean, spread_harmonic, window_patches
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.detectors._base import Batch, DetectorInfo, ImageSize, ProgressCallback, Scores, UsedIf
from raydetect.detectors._clip import ClipDetector, checked_config, require_whole_patches
from raydetect.detectors._weights import RANDOM

MEMORY, PATCHES = "memory.", "memory.patches"


class WinCLIP(ClipDetector):
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
    class Params(ClipDetector.Params):
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
        norm_patches: Annotated[
            bool,
            Field(
                description="with k_shot: compare patches after CLIP's last norm (as in the tokens of open_clip 3); "
                "false = before it"
            ),
            UsedIf("k_shot", unless=(0,)),
        ] = True
        temperature: Annotated[
            float, Field(gt=0, description="of the softmax over the two prompt classes (eq. 1); CLIP's initial value")
        ] = 0.07

        def __post_init__(self) -> None:
            config = checked_config("winclip", self)
            square = (self.window_size or 0, self.window_size or 0)
            size = next((given for given in (self.image_size, square) if any(given)), config.image_size)
            if any(square) and size != square:
                raise ValueError(f"window_size {self.window_size} contradicts image_size {list(size)}")
            require_whole_patches(size, config)
            if max(self.scales) * config.patch_px > min(size):
                raise ValueError(f"scales {list(self.scales)}: windows are larger than an image_size of {list(size)}")
            object.__setattr__(self, "image_size", size)

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.memory: dict[str, BankSearch] = {}

    def num_collected(self) -> int:
        """`k_shot`."""
        return self.params.k_shot

    def default_prompts(self) -> tuple[Sequence[str], Sequence[str]]:
        """Every state in every template (sec. 4.1)."""
        return compose(NORMAL_STATES), compose(ANOMALOUS_STATES)

    def mean_embedding(self, embeddings_ND: Tensor) -> Tensor:
        """The mean, normalised."""
        return F.normalize(embeddings_ND.mean(0), dim=-1)

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
        height, width = self.tower().grid
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
        grid, score_1 = self.tower().grid, self._anomaly_probability(whole_1D)
        spread = [spread_harmonic(self._anomaly_probability(found), grid, side) for side, found in windows.items()]
        return score_1, harmonic_mean([score_1[:, None, None], *spread])

    def _by_memory(self, patches_BPC: Tensor, windows: Mapping[int, Tensor]) -> Tensor:
        """Mean distance of patches and windows to the normal images (eqs. 5-6), (B, h, w)."""
        grid = self.tower().grid
        near = [self._distance(PATCHES, patches_BPC).view(-1, *grid)]
        near += [spread_harmonic(self._distance(f"{MEMORY}{s}", found), grid, s) for s, found in windows.items()]
        return torch.stack(near).mean(0)

    def _embed(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Embeddings of whole images, their patches, and their windows at every scale."""
        self.require_size(images_BCHW)
        tower = self.tower()
        tokens_BTC = self.run(tower.tokens, images_BCHW)
        sides = self.params.scales
        windows = {
            side: self.run(tower.embed_windows, tokens_BTC, _window_patches(tokens_BTC.device, tower.grid, side))
            for side in sides
        }
        return *self.run(tower.embed, tokens_BTC, self.params.norm_patches), windows

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
        return super().tensors() | {name: search.bank() for name, search in self.memory.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores towers, prompt embeddings, and memory."""
        needed = [PATCHES, *(f"{MEMORY}{side}" for side in self.params.scales)] if self.params.k_shot else []
        self.require_tensors(tensors, *needed)
        self.memory = {name: BankSearch(tensors[name]) for name in needed}
        super().load_tensors(tensors)

    def to(self, device: torch.device) -> "WinCLIP":
        """Moves towers, prompt embeddings, and memory."""
        super().to(device)
        self.memory = {name: search.to(device) for name, search in self.memory.items()}
        return self


_window_patches = kept_on_device(window_patches)
