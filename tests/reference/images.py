"""Slow, simple reference implementations for images: loops over pixels in float64."""

import math

import numpy as np


def ssim_map(first_HW: np.ndarray, second_HW: np.ndarray) -> np.ndarray:
    """Structural similarity of two planes in [0, 1], with 11 x 11 Gaussian windows and zero padding."""
    weights = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)])
    weights /= weights.sum()
    x, y = (np.pad(plane.astype(np.float64), 5) for plane in (first_HW, second_HW))
    found = np.empty(first_HW.shape)
    for r, c in np.ndindex(*first_HW.shape):
        a, b = x[r : r + 11, c : c + 11], y[r : r + 11, c : c + 11]
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variance_a = (weights * a * a).sum() - mean_a**2
        variance_b = (weights * b * b).sum() - mean_b**2
        covariance = (weights * a * b).sum() - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        contrast_structure = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
        found[r, c] = luminance * contrast_structure
    return found


def gms_map(first_3HW: np.ndarray, second_3HW: np.ndarray) -> np.ndarray:
    """Gradient magnitude similarity with Prewitt filters on grey values and edge padding."""
    across = np.array([[1, 0, -1]] * 3) / 3
    lengths = []
    for image in (first_3HW, second_3HW):
        grey = np.pad(image.astype(np.float64).mean(0), 1, mode="edge")
        length = np.empty(image.shape[1:])
        for r, c in np.ndindex(*length.shape):
            window = grey[r : r + 3, c : c + 3]
            length[r, c] = math.hypot((window * across).sum(), (window * across.T).sum())
        lengths.append(length)
    x, y = lengths
    return (2 * x * y + 0.0026) / (x**2 + y**2 + 0.0026)


def halved(image_3HW: np.ndarray) -> np.ndarray:
    """Means over 2 x 2 blocks; drops the last row or column if odd."""
    height, width = image_3HW.shape[1] // 2, image_3HW.shape[2] // 2
    found = np.empty((3, height, width))
    for r, c in np.ndindex(height, width):
        found[:, r, c] = image_3HW[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2))
    return found


def msgms_loss(first_3HW: np.ndarray, second_3HW: np.ndarray) -> float:
    """Mean over four scales of 1 minus the mean gradient magnitude similarity."""
    losses = []
    for _ in range(4):
        losses.append(1 - gms_map(first_3HW, second_3HW).mean())
        first_3HW, second_3HW = halved(first_3HW), halved(second_3HW)
    return float(np.mean(losses))


def focal_loss(anomalous_HW: np.ndarray, mask_HW: np.ndarray, gamma: float) -> float:
    """Mean of -(1 - p)^gamma log p over pixels, with p the probability of the true class."""
    total = 0.0
    for p, anomalous in zip(anomalous_HW.ravel(), mask_HW.ravel(), strict=True):
        right = p if anomalous else 1 - p
        total -= (1 - right) ** gamma * math.log(right)
    return total / anomalous_HW.size


def perlin_noise(size_px: tuple[int, int], angles: np.ndarray) -> np.ndarray:
    """Gradient noise, pixel by pixel; `angles` are the gradient angles at the cell corners."""
    cells = angles.shape[0] - 1, angles.shape[1] - 1
    found = np.empty(size_px)
    for r, c in np.ndindex(*size_px):
        y, x = r * cells[0] / size_px[0], c * cells[1] / size_px[1]
        row, column = int(y + 1e-9), int(x + 1e-9)
        y, x = y - row, x - column
        corners = {}
        for i in (0, 1):
            for j in (0, 1):
                angle = angles[row + i, column + j]
                corners[i, j] = math.cos(angle) * (x - j) + math.sin(angle) * (y - i)
        fade_y, fade_x = (6 * t**5 - 15 * t**4 + 10 * t**3 for t in (y, x))
        upper = corners[0, 0] * (1 - fade_x) + corners[0, 1] * fade_x
        lower = corners[1, 0] * (1 - fade_x) + corners[1, 1] * fade_x
        found[r, c] = math.sqrt(2) * (upper * (1 - fade_y) + lower * fade_y)
    return found
