"""Metrics with error bounds and bootstrap intervals, for a whole category or one kind of defect."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from raydetect.metrics.curves import Estimate, ranking_figures
from raydetect.metrics.pixels import ANOMALOUS, COLUMNS, NORMAL, aupro_of
from raydetect.metrics.quality import BLOCK_BINS, IMAGE_BINS, PIXEL_BINS, Quality
from raydetect.metrics.score_bins import ScoreBins

FPR_LIMITS = (0.3, 0.05)
REPLICATES, CONFIDENCE = 200, 0.95


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric and its bootstrap interval; `spread` is None if there was too little data to resample."""

    estimate: Estimate
    spread: tuple[float, float] | None

    def plain(self) -> dict[str, float | None]:
        """Converts to JSON types: value, error bound of the binning, and interval."""
        low, high = self.spread or (None, None)
        return {"value": self.estimate.value, "error_bound": self.estimate.error, "ci_low": low, "ci_high": high}


def image_figures(quality: Quality, seed: int, replicates: int = REPLICATES) -> dict[str, Measured]:
    """`image_auroc` and the other image metrics, with percentile intervals from resampling images within each group.

    Resampling the images of a group is the same as drawing its counts by bin from a multinomial distribution.

    Raises:
        ValueError: a class is missing.
    """
    empty = ScoreBins.empty(IMAGE_BINS)
    groups = [[s.images.whole() for s in quality.summaries(label)] for label in (0, 1)]

    def figures(of: Callable[[ScoreBins], ScoreBins]) -> dict[str, Estimate]:
        normal, anomalous = (empty.merge(*[of(part) for part in parts]) for parts in groups)
        return ranking_figures(normal, anomalous)

    random = np.random.default_rng([seed, 1])
    drawn = [figures(lambda part: _drawn(part, random)) for _ in range(replicates)]
    whole = figures(lambda part: part)
    return {f"image_{name}": measured for name, measured in _with_spreads(whole, drawn, whole).items()}


def _drawn(part: ScoreBins, random: np.random.Generator) -> ScoreBins:
    counts_B = part.counts_BC[:, 0]
    resampled_B = random.multinomial(part.total, counts_B / counts_B.sum())
    return replace(part, counts_BC=resampled_B[:, None].astype(np.int64))


def pixel_figures(quality: Quality, seed: int, replicates: int = REPLICATES) -> dict[str, Measured]:
    """Pixel metrics (`pixel_auroc` and so on, `aupro_0.3`, `aupro_0.05`), with intervals from resampling image blocks.

    Each group's blocks are resampled with replacement. Blocks have coarser bins; the intervals are corrected for the
    difference this makes. Empty if no anomalous or no normal pixel is known.
    """
    whole = ScoreBins.empty(PIXEL_BINS, COLUMNS).merge(*[s.pixels.whole() for s in quality.summaries()])
    if not _has_both(whole):
        return {}
    groups = [[s.blocks[number].whole() for number in sorted(s.blocks)] for s in quality.summaries() if s.blocks]
    coarse, stack_NBC = _stacked([block for blocks in groups for block in blocks])
    random = np.random.default_rng([seed, 2])
    drawn = []
    for _ in range(replicates):
        times_N = np.concatenate([random.multinomial(len(g), np.full(len(g), 1 / len(g))) for g in groups])
        resampled = replace(coarse, counts_BC=np.tensordot(times_N, stack_NBC, 1))
        if _has_both(resampled):
            drawn.append(_pixel_figures(resampled))
    return _with_spreads(_pixel_figures(whole), drawn, _pixel_figures(coarse))


def _stacked(blocks: list[ScoreBins]) -> tuple[ScoreBins, np.ndarray]:
    """All blocks merged, and the counts of each block over the merged bins, (N, B, C)."""
    coarse = ScoreBins.empty(BLOCK_BINS, COLUMNS).merge(*blocks)
    stack_NBC = np.zeros((len(blocks), *coarse.counts_BC.shape), np.int64)
    for counts_BC, block in zip(stack_NBC, blocks, strict=True):
        part = block.coarsened(coarse.shift)
        counts_BC[np.searchsorted(coarse.bins_B, part.bins_B)] = part.counts_BC
    return coarse, stack_NBC


def _has_both(pixels: ScoreBins) -> bool:
    return bool(pixels.counts_BC[:, NORMAL].any() and pixels.counts_BC[:, ANOMALOUS].any())


def _pixel_figures(pixels: ScoreBins) -> dict[str, Estimate]:
    found = {f"pixel_{name}": f for name, f in ranking_figures(pixels, pixels, (NORMAL, ANOMALOUS)).items()}
    return found | {f"aupro_{limit}": aupro_of([pixels], limit) for limit in FPR_LIMITS}


def _with_spreads(
    figures: dict[str, Estimate], drawn: list[dict[str, Estimate]], centre: dict[str, Estimate]
) -> dict[str, Measured]:
    """Percentile intervals, shifted by the difference to `centre`: the metric without resampling, on the same bins."""
    if len(drawn) < 2:
        return {name: Measured(estimate, None) for name, estimate in figures.items()}
    found = {}
    for name, estimate in figures.items():
        values = np.array([replicate[name].value for replicate in drawn]) + estimate.value - centre[name].value
        low, high = np.clip(np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]), 0, 1)
        found[name] = Measured(estimate, (float(low), float(high)))
    return found
