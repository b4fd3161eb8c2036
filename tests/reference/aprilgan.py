"""APRIL-GAN by loops over blocks, patches and pixels, in float64; slow and obvious."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Reference:
    """Scores single images with one open_clip image tower and linear layers."""

    def __init__(self, visual: nn.Module, mean: Tensor, std: Tensor, adapters: Any, layers: Sequence[int]) -> None:
        """Copies the tower and the linear layers to float64."""
        self.visual: Any = copy.deepcopy(visual).double()
        self.adapters = [copy.deepcopy(adapter).double() for adapter in adapters]
        self.mean, self.std, self.layers = mean.double().numpy(), std.double().numpy(), layers
        self.seen: dict[int, Tensor] = {}
        for number, block in enumerate(self.visual.transformer.resblocks, 1):
            block.register_forward_hook(lambda _, __, out, number=number: self.seen.update({number: out}))

    def embed(self, image_HWC: np.ndarray) -> tuple[np.ndarray, list[Tensor]]:
        """The unit embedding of an image, and the patch tokens (P, C) after the chosen blocks."""
        pixels = torch.from_numpy(((image_HWC / 255.0 - self.mean) / self.std).transpose(2, 0, 1))[None]
        with torch.no_grad():
            whole_D = self.visual(pixels)[0].numpy()
        return whole_D / np.linalg.norm(whole_D), [self.seen[number][0, 1:] for number in self.layers]

    def text_maps(self, tokens: Sequence[Tensor], words_2D: Tensor, temperature: float, size: int) -> list[Tensor]:
        """For every layer, the softmax at each pixel over the cosines to both prompts, interpolated between patches."""
        maps = []
        for adapter, tokens_PC in zip(self.adapters, tokens, strict=True):
            found_PD = adapter(tokens_PC)
            unit_PD = found_PD / found_PD.norm(dim=1, keepdim=True)
            logits_P2 = unit_PD @ words_2D.T / temperature
            side = round(len(logits_P2) ** 0.5)
            wide_2HW = torch.stack([stretched(logits_P2[:, kind].view(side, side), size) for kind in (0, 1)])
            maps.append(torch.softmax(wide_2HW, 0)[1])
        return maps

    def memory_map(self, tokens: Sequence[Tensor], normal: Sequence[Sequence[Tensor]], size: int) -> Tensor:
        """Sum over layers of the distance of each patch to the most similar one of some normal images."""
        whole = torch.zeros(size, size, dtype=torch.float64)
        for layer, tokens_PC in enumerate(tokens):
            known_MC = torch.cat([image[layer] for image in normal])
            distances = [
                min(1 - float(torch.cosine_similarity(token_C, known_C, dim=0)) for known_C in known_MC)
                for token_C in tokens_PC
            ]
            side = round(len(distances) ** 0.5)
            whole += stretched(torch.tensor(distances, dtype=torch.float64).view(side, side), size)
        return whole


def stretched(grid_hw: Tensor, size: int) -> Tensor:
    """Bilinear interpolation where the centres of corner patches are those of corner pixels."""
    side = len(grid_hw)
    weights = torch.zeros(size, side, dtype=torch.float64)
    for pixel in range(size):
        place = pixel * (side - 1) / (size - 1)
        low = min(int(place), side - 2)
        weights[pixel, low], weights[pixel, low + 1] = 1 - (place - low), place - low
    return weights @ grid_hw.double() @ weights.T


def loss_of(map_HW: Tensor, mask_HW: Tensor, gamma: float) -> Tensor:
    """Focal and dice loss of one map, pixel by pixel."""
    smooth, focal = 1e-5, []
    for p, is_defect in zip(map_HW.flatten(), mask_HW.flatten().tolist(), strict=True):
        weights = (smooth, 1 - smooth) if is_defect else (1 - smooth, smooth)
        right = weights[0] * (1 - p) + weights[1] * p + smooth
        focal.append(-((1 - right) ** gamma) * torch.log(right))
    mask = mask_HW.double()
    dice = 1 - (2 * (map_HW * mask).sum() + 1) / (map_HW.sum() + mask.sum() + 1)
    return torch.stack(focal).mean() + dice
