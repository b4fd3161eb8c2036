"""Slow WinCLIP in float64: one window at a time with masked attention over the full sequence; means in loops."""

import copy
import math
from typing import Any

import numpy as np
import torch

Windows = dict[int, list[tuple[list[int], np.ndarray]]]


class Reference:
    """The image tower of a fitted detector in float64."""

    def __init__(self, visual: Any, mean: torch.Tensor, std: torch.Tensor, scales: tuple[int, ...]) -> None:
        """`visual` is open_clip's image tower."""
        self.visual = copy.deepcopy(visual).double().eval()
        self.mean, self.std, self.scales = mean.double(), std.double(), scales
        self.height, self.width = self.visual.grid_size

    def embedded(self, image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, Windows]:
        """(image embedding, patch embeddings, [(patches of a window, its embedding)] per scale), normalised."""
        picture = torch.from_numpy(image_HWC.astype(np.float64) / 255).permute(2, 0, 1)
        normal = (picture - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        whole, tokens = self._attended(normal[None], None)
        windows: Windows = {}
        for side in self.scales:
            windows[side] = []
            for row in range(self.height - side + 1):
                for column in range(self.width - side + 1):
                    inside = [(row + r) * self.width + column + c for r in range(side) for c in range(side)]
                    windows[side].append((inside, self._attended(normal[None], inside)[0]))
        return whole, tokens, windows

    def _attended(self, normal: torch.Tensor, inside: list[int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Class token embedding and patch tokens, with attention limited to the class token and patches `inside`."""
        count = self.height * self.width + 1
        mask = torch.zeros(count, count, dtype=torch.float64)
        if inside is not None:
            mask[:] = -torch.inf
            mask[:, [0, *(patch + 1 for patch in inside)]] = 0
        with torch.no_grad():
            out = self.visual.ln_post(self.visual.transformer(self.visual._embeds(normal), attn_mask=mask))[0]
            return unit((out[0] @ self.visual.proj).numpy()), np.stack([unit(token) for token in out[1:].numpy()])

    def scored(
        self, image: np.ndarray, words: np.ndarray, temperature: float, references: list[np.ndarray]
    ) -> tuple[float, np.ndarray]:
        """The image score and the anomaly map on the patch grid."""
        whole, tokens, windows = self.embedded(image)
        score = anomalous(whole, words, temperature)
        grid = np.empty((self.height, self.width))
        scored = {
            s: [(inside, anomalous(e, words, temperature)) for inside, e in found] for s, found in windows.items()
        }
        for patch in range(self.height * self.width):
            levels = [score, *(mean_of_windows(scored[side], patch) for side in self.scales)]
            grid.flat[patch] = harmonic(levels)
        if not references:
            return score, grid
        kept = [self.embedded(reference) for reference in references]
        near = np.empty_like(grid)
        distances = {
            side: [
                (inside, min(distance(e, other) for _, _, theirs in kept for _, other in theirs[side]))
                for inside, e in windows[side]
            ]
            for side in self.scales
        }
        for patch in range(self.height * self.width):
            levels = [min(distance(tokens[patch], other) for _, theirs, _ in kept for other in theirs)]
            levels += [mean_of_windows(distances[side], patch) for side in self.scales]
            near.flat[patch] = sum(levels) / len(levels)
        return (score + near.max()) / 2, (grid + near) / 2


def unit(vector: np.ndarray) -> np.ndarray:
    """Scales a vector to length 1."""
    return vector / math.sqrt(sum(x * x for x in vector))


def anomalous(embedding: np.ndarray, prompts: np.ndarray, temperature: float) -> float:
    """Softmax over the cosines with the (normal, anomalous) prompt embeddings."""
    powers = [math.exp(float(embedding @ prompt) / temperature) for prompt in prompts]
    return powers[1] / sum(powers)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Half of (1 - cosine)."""
    return (1 - float(a @ b)) / 2


def harmonic(values: list[float]) -> float:
    """Harmonic mean."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def mean_of_windows(scored: list[tuple[list[int], float]], patch: int) -> float:
    """Harmonic mean over the windows that contain a patch."""
    return harmonic([value for inside, value in scored if patch in inside])
