"""CLIP models of open_clip: an image tower that can embed subsets of its tokens, and a text tower. Loads no weights.

Shapes: B images or texts, P patches, T tokens (the class token and patches), C width, D embedding dim, W windows.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetect.blocks.seeding import keyed_seed
from raydetect.config.validation import nearest
from raydetect.errors import ArtifactError, SpecError

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's; a few open_clip weights use others
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
BLOCK_TOKENS = 1 << 14  # tokens per forward pass of the transformer
TINY = "tiny"  # for tests
TINY_WORDS: Mapping[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SIZES = {"layers", "width", "mlp_ratio", "ls_init_value"}
PLAIN = {
    "vision_cfg": {*SIZES, "image_size", "head_width", "patch_size"},
    "text_cfg": {*SIZES, "context_length", "vocab_size", "heads"},
}
IMAGE = "visual."
POSITIONS = "visual.positional_embedding"


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Configuration of a CLIP model with a vision transformer.

    Attributes:
        name: the model's name in open_clip.
        settings: its open_clip configuration.
    """

    name: str
    settings: Mapping[str, Any]

    @property
    def patch_px(self) -> int:
        """Side of a patch in px."""
        return int(self.settings["vision_cfg"]["patch_size"])

    @property
    def num_blocks(self) -> int:
        """Blocks of the image tower."""
        return int(self.settings["vision_cfg"]["layers"])

    @property
    def width(self) -> int:
        """Dims of a token of the image tower, C."""
        return int(self.settings["vision_cfg"]["width"])

    @property
    def embed_dim(self) -> int:
        """Dims of an embedding, D."""
        return int(self.settings["embed_dim"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in px of the training images."""
        side = int(self.settings["vision_cfg"]["image_size"])
        return side, side


@cache
def clip_config(name: str) -> ClipConfig:
    """The configuration of a CLIP model; `ViT-B/32` means `ViT-B-32`. Reads one file without importing open_clip.

    Raises:
        SpecError: open_clip has no such model, or it has no plain vision transformer with a class token.
    """
    bare = name.replace("/", "-")
    if bare == TINY:
        return ClipConfig(bare, TINY_WORDS)
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise SpecError("clip_model requires the package open_clip_torch. Install it.")
    folder = Path(found.origin).parent / "model_configs"
    known = {path.stem: path for path in folder.glob("*.json")}
    if bare not in known:
        raise SpecError(f"clip_model {name!r} is unknown to open_clip.{nearest(bare, sorted(known))}")
    config = json.loads(known[bare].read_text())
    unusual = set(config) - {"embed_dim", "quick_gelu", *PLAIN}
    unusual |= {key for part, plain in PLAIN.items() for key in set(config[part]) - plain}
    if unusual or not isinstance(config["vision_cfg"]["layers"], int):
        raise SpecError(
            f"clip_model {name!r} is not a plain CLIP with a vision transformer "
            f"({', '.join(sorted(unusual)) or 'layers'}). Use a model such as ViT-B-16-plus-240, ViT-B-32 or ViT-L-14."
        )
    return ClipConfig(bare, config)


class ImageTower(nn.Module):
    """The image tower: tokens of images, and embeddings of all tokens or of subsets."""

    def __init__(self, visual: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Wraps open_clip's vision transformer; pixel mean and std, for pixels in [0, 1], are saved with it."""
        super().__init__()
        self.visual: Any = visual
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(mean))
        self.register_buffer("pixel_std", torch.tensor(std))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches."""
        height, width = self.visual.grid_size
        return int(height), int(width)

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """Input tokens of the transformer for uint8 RGB images, class token first, (B, T, C)."""
        normal = (images_BCHW.float() / 255 - self.pixel_mean.view(3, 1, 1)) / self.pixel_std.view(3, 1, 1)
        patches_BPC = self.visual.conv1(normal).flatten(2).transpose(1, 2)
        class_B1C = self.visual.class_embedding.expand(len(patches_BPC), 1, -1)
        tokens_BTC = torch.cat([class_B1C, patches_BPC], 1) + self.visual.positional_embedding
        normed_BTC: Tensor = self.visual.ln_pre(tokens_BTC)
        return normed_BTC

    def embed(self, tokens_BTC: Tensor, norm_patches: bool = True) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and the last block's patch tokens (B, T - 1, C), both L2-normalised.

        Args:
            tokens_BTC: output of `tokens`.
            norm_patches: whether the patch tokens are those after CLIP's last norm, as the embeddings always are.
        """
        last_BTC = self.visual.transformer(tokens_BTC)
        out_BTC = self.visual.ln_post(last_BTC)
        embeddings_BD = (out_BTC[:, 0] @ self.visual.proj).float()
        patches_BPC = (out_BTC if norm_patches else last_BTC)[:, 1:].float()
        return F.normalize(embeddings_BD, dim=-1), F.normalize(patches_BPC, dim=-1)

    def embed_blocks(self, tokens_BTC: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """L2-normalised embeddings (B, D), and the patch tokens (B, T - 1, C) after some blocks, as they leave them.

        Args:
            tokens_BTC: output of `tokens`.
            blocks: numbers of blocks, from 1, ascending.
        """
        indices = [number - 1 for number in blocks]
        last_BTC, found = self.visual.transformer.forward_intermediates(tokens_BTC, indices=indices)
        embeddings_BD = (self.visual.ln_post(last_BTC[:, 0]) @ self.visual.proj).float()
        return F.normalize(embeddings_BD, dim=-1), [block_BTC[:, 1:].float() for block_BTC in found]

    def embed_windows(self, tokens_BTC: Tensor, patches_WK: Tensor) -> Tensor:
        """L2-normalised embeddings of windows, (B, W, D), each from the class token and the window's patches only.

        Dropping the tokens outside a window is equivalent to masking them in every attention layer.

        Args:
            tokens_BTC: output of `tokens`.
            patches_WK: patch indices of every window.
        """
        index_WT = F.pad(patches_WK + 1, (1, 0)).to(tokens_BTC.device)
        step = max(1, BLOCK_TOKENS // (len(tokens_BTC) * index_WT.shape[1]))
        found = []
        for part_WT in index_WT.split(step):
            windows = tokens_BTC[:, part_WT]
            found.append(self.embed(windows.flatten(0, 1))[0].view(*windows.shape[:2], -1))
        return torch.cat(found, 1)


class TextTower(nn.Module):
    """The text tower with open_clip's tokenizer, whose vocabulary ships with the package."""

    def __init__(self, clip: nn.Module) -> None:
        """Wraps an open_clip CLIP model without its image tower."""
        super().__init__()
        self.clip: Any = clip

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, D), not normalised.

        Positions after the longest text are dropped; attention is causal, so they have no effect.

        Raises:
            SpecError: a text exceeds the context length.
        """
        tokenizer = _tokenizer()
        for text in texts:
            if len(tokenizer.encode(text)) > self.clip.context_length - 2:
                raise SpecError(f"the prompt {text!r} is longer than {self.clip.context_length} tokens. Shorten it.")
        ids_BT = tokenizer(list(texts), self.clip.context_length).to(self.clip.positional_embedding.device)
        ends_B = ids_BT.argmax(1)  # the end token has the highest id
        length = int(ends_B.max()) + 1
        tokens = self.clip.token_embedding(ids_BT[:, :length]) + self.clip.positional_embedding[:length]
        out = self.clip.transformer(tokens, attn_mask=self.clip.attn_mask[:length, :length])
        embeddings: Tensor = self.clip.ln_final(out)[torch.arange(len(ends_B)), ends_B] @ self.clip.text_projection
        return embeddings


@cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def build_clip(
    config: ClipConfig,
    image_size: tuple[int, int],
    seed: int,
    quick_gelu: bool = False,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
) -> tuple[ImageTower, TextTower]:
    """Both towers with random weights keyed by the seed, in eval mode.

    Args:
        config: from `clip_config`.
        image_size: (height, width), multiples of the patch size.
        seed: seed of the weights.
        quick_gelu: use QuickGELU even if the configuration does not; some weights need it.
        mean: pixel mean, for pixels in [0, 1].
        std: pixel std, for pixels in [0, 1].
    """
    from open_clip import CLIP  # slow

    settings = {**config.settings, "vision_cfg": {**config.settings["vision_cfg"], "image_size": image_size}}
    settings["quick_gelu"] = quick_gelu or settings.get("quick_gelu", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "clip", config.name))
        clip = CLIP(**settings).eval().requires_grad_(False)
    visual = clip.visual
    del clip.visual, clip.logit_scale
    return ImageTower(visual, mean, std), TextTower(clip)


def load_clip(image: ImageTower, text: TextTower, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads both towers' tensors, under open_clip's names, from `weights`; others are ignored.

    Position embeddings of a different grid are interpolated, bicubic and antialiased, as in open_clip.

    Raises:
        ArtifactError: a tensor is missing or has the wrong shape; the message names it.
    """
    chosen = {name: value for name, value in weights.items() if name != POSITIONS}
    if POSITIONS in weights:
        chosen[POSITIONS] = _on_grid(weights[POSITIONS], image.grid)
    for module, prefix in ((image.visual, IMAGE), (text.clip, "")):
        own = module.state_dict()
        for name, value in own.items():
            if prefix + name not in chosen:
                raise ArtifactError(f"{source}: has no tensor {prefix + name!r}, which this CLIP needs.")
            if chosen[prefix + name].shape != value.shape:
                raise ArtifactError(
                    f"{source}: tensor {prefix + name!r} has shape {tuple(chosen[prefix + name].shape)}, expected "
                    f"{tuple(value.shape)}."
                )
        module.load_state_dict({name: chosen[prefix + name] for name in own})


def _on_grid(positions_TC: Tensor, grid: tuple[int, int]) -> Tensor:
    side = round((len(positions_TC) - 1) ** 0.5)
    if side * side != len(positions_TC) - 1 or (side, side) == grid:
        return positions_TC
    square = positions_TC[1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions_TC[:1].float(), resized[0].flatten(1).T])
