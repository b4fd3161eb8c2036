"""Draws the pictures of docs/explanation/ from simulations: `python -m jobs.docs.figures` writes them as SVG.

Every simulation has a fixed seed and decides by the functions that jobs use. Scores are drawn from normal
distributions; what the pictures show holds for any.
"""

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from scipy.ndimage import find_objects, gaussian_filter, label

from raydetect.metrics.conformal import p_value, p_values, required_size, threshold_for
from raydetect.metrics.discovery import Discovery, discover

FOLDER = Path(__file__).parents[2] / "docs" / "explanation"
BLUE, RED, GREY = "#1565c0", "#c62828", "#9e9e9e"
STYLE = {
    "svg.hashsalt": "raydetect",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}
NUM_CALIBRATION, NEW_SCORE = 99, 2.0
ARCHIVE, ANOMALOUS, ARCHIVE_CALIBRATION = 10_000, 50, 49_999
ALPHA, FDR = 0.01, 0.05
MAP_PX, NORMAL_MAPS = 96, 199


def rates_of_draws(num_calibration: int, alpha: float, draws: int = 4000) -> np.ndarray:
    """The share of all normal images that is flagged, for each of many draws of the calibration images.

    Scores are uniform in [0, 1], so that the share above a threshold t is 1 - t.
    """
    random = np.random.default_rng(num_calibration)
    scores_RM = np.sort(random.random((draws, num_calibration)), axis=1)
    return np.array([1.0 - threshold_for(scores_M, alpha) for scores_M in scores_RM])


def draw_p_values(left: Axes, right: Axes) -> None:
    """One p-value, and the shares of normal images that many fits flag at 5 %."""
    scores_M = np.sort(np.random.default_rng(5).normal(size=NUM_CALIBRATION))
    edges = np.linspace(-3, 3, 25)
    left.hist(scores_M[scores_M < NEW_SCORE], edges, color=GREY, label="calibration images below")
    left.hist(scores_M[scores_M >= NEW_SCORE], edges, color=RED, label="calibration images at or above")
    left.axvline(NEW_SCORE, color=BLUE)
    above = int((scores_M >= NEW_SCORE).sum())
    value = p_value(scores_M.tolist(), NEW_SCORE)
    text = f"new image:\np = (1 + {above}) / (1 + {NUM_CALIBRATION}) = {value:.2f}"
    arrow = {"arrowstyle": "->", "color": BLUE}
    left.annotate(text, (NEW_SCORE, 15.5), (-2.9, 14.6), color=BLUE, arrowprops=arrow)
    left.set(xlabel="image score", ylabel="images", ylim=(0, 21), title="One p-value")
    left.legend(loc="upper left", frameon=False, fontsize=8)
    rates = 100 * rates_of_draws(NUM_CALIBRATION, 0.05)
    right.hist(rates, np.arange(0, 16, 0.5), color=GREY)
    right.axvline(rates.mean(), color=BLUE)
    right.text(rates.mean() + 0.2, right.get_ylim()[1] * 0.95, f"mean {rates.mean():.1f} %", color=BLUE)
    right.set(xlabel="normal images flagged at alpha = 5 %, in %", ylabel="draws of 99 calibration images")
    right.set_title("The promise holds on average")


def draw_levels(left: Axes, right: Axes) -> None:
    """The smallest level by the number of images, and how far the share of flagged images spreads around 1 %."""
    sizes = np.unique(np.geomspace(10, 20_000, 200).astype(int))
    left.loglog(sizes, 100.0 / (sizes + 1), color=BLUE)
    for alpha in (0.05, 0.01, 0.001):
        size = required_size(alpha)
        left.plot(size, 100 * alpha, "o", color=RED)
        left.annotate(f"{100 * alpha:g} %: {size:,} images", (size, 100 * alpha), (8, 4), textcoords="offset points")
    left.set(
        xlabel="normal images to calibrate on",
        ylabel="smallest level, in %",
        title="What can be asked for",
        xlim=(8, 90_000),
    )
    counts = (99, 199, 499, 999, 2999, 9999)
    low, middle, high = np.transpose([np.percentile(100 * rates_of_draws(n, ALPHA), (5, 50, 95)) for n in counts])
    right.fill_between(counts, low, high, color=BLUE, alpha=0.2, linewidth=0, label="90 of 100 fits")
    right.semilogx(counts, middle, color=BLUE, label="median")
    right.axhline(100 * ALPHA, color=RED, linestyle=":", label="alpha")
    right.set(xlabel="normal images to calibrate on", ylabel="normal images flagged, in %", ylim=(0, 3.2))
    right.set_title("What one fit gets at alpha = 1 %")
    right.legend(frameon=False, fontsize=8)


def archive() -> tuple[np.ndarray, np.ndarray, Discovery]:
    """p-values of an archive, which of its images are anomalous, and what Benjamini-Hochberg flags."""
    random = np.random.default_rng(3)
    scores_M = np.sort(random.normal(size=ARCHIVE_CALIBRATION))
    is_anomalous_N = np.arange(ARCHIVE) < ANOMALOUS
    scores_N = random.normal(size=ARCHIVE) + 4.5 * is_anomalous_N
    values_N = p_values(scores_M, scores_N)
    return values_N, is_anomalous_N, discover(Counter(values_N.tolist()), FDR, ARCHIVE_CALIBRATION)


def draw_false_discoveries(left: Axes, right: Axes) -> None:
    """Sorted p-values with the line of Benjamini-Hochberg, and what each rule flags."""
    values_N, is_anomalous_N, found = archive()
    order = np.argsort(values_N, kind="stable")[:160]
    ranks = np.arange(1, len(order) + 1)
    for is_wanted, color, name in ((False, GREY, "normal"), (True, RED, "anomalous")):
        kept = is_anomalous_N[order] == is_wanted
        left.plot(ranks[kept], values_N[order][kept], ".", color=color, markersize=4, label=name)
    left.plot(ranks, FDR * ranks / ARCHIVE, color=BLUE, label=f"{FDR:g} x rank / images")
    left.axvline(found.flagged + 0.5, color=BLUE, linestyle=":")
    left.set(xlabel="rank of the image", ylabel="p-value", ylim=(-0.0002, 0.012), title="The smallest 160 of 10,000")
    left.axhline(ALPHA, color="black", linewidth=0.8, linestyle="--", label=f"alpha = {ALPHA:g}")
    left.legend(frameon=False, fontsize=8, loc=(0.56, 0.09))
    rules = (f"alpha: {ALPHA:g}", values_N <= ALPHA), (f"fdr: {FDR:g}", values_N <= (found.p_threshold or 0.0))
    for place, (_, flagged_N) in enumerate(rules):
        right.bar(place, (flagged_N & is_anomalous_N).sum(), color=RED, width=0.6)
        right.bar(place, (flagged_N & ~is_anomalous_N).sum(), bottom=(flagged_N & is_anomalous_N).sum(), color=GREY,
                  width=0.6)  # fmt: skip
        false = int((flagged_N & ~is_anomalous_N).sum())
        right.text(place, flagged_N.sum() + 2, f"{flagged_N.sum()} flagged,\n{false} of them normal", ha="center")
    right.set_xticks(range(len(rules)), [name for name, _ in rules])
    right.set(ylabel="images flagged", ylim=(0, 195), title="What each rule flags")


def normal_map(seed: int) -> np.ndarray:
    """A smooth random map."""
    noise_HW = gaussian_filter(np.random.default_rng(seed).normal(size=(MAP_PX, MAP_PX)), 3)
    return noise_HW / noise_HW.std()


def draw_regions(left: Axes, right: Axes) -> None:
    """The highest pixels of normal maps with the threshold at 1 %, and the regions of a map with two defects."""
    peaks_M = np.sort([normal_map(seed).max() for seed in range(NORMAL_MAPS)])
    threshold = threshold_for(peaks_M, ALPHA)
    left.hist(peaks_M, 25, color=GREY)
    left.axvline(threshold, color=BLUE)
    left.text(threshold - 0.02, 16, "threshold\nat 1 %", color=BLUE, ha="right")
    left.set(xlabel="highest pixel of the map", ylabel="normal images", title=f"{NORMAL_MAPS} normal images")
    rows, columns = np.mgrid[:MAP_PX, :MAP_PX]
    map_HW = normal_map(NORMAL_MAPS + 1)
    for row, column, height, spread in ((30, 25, 9.0, 5.0), (68, 64, 7.0, 3.5)):
        map_HW = map_HW + height * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))
    right.imshow(map_HW, cmap="Greys", vmin=-1, vmax=10)
    right.contour(map_HW, [threshold], colors=[BLUE], linewidths=1)
    regions, _ = label(map_HW >= threshold, np.ones((3, 3)))
    for down, across in find_objects(regions):
        size = across.stop - across.start, down.stop - down.start
        right.add_patch(Rectangle((across.start - 1, down.start - 1), size[0] + 1, size[1] + 1, fill=False, color=RED))
    right.axis("off")
    right.set_title("A flagged image: outlines and boxes")


FIGURES = {
    "p-values": draw_p_values,
    "levels": draw_levels,
    "false-discoveries": draw_false_discoveries,
    "regions": draw_regions,
}


def write(folder: Path = FOLDER) -> None:
    """Writes every picture as SVG; the same bytes on every run."""
    matplotlib.use("svg")
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
            draw(left, right)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    write()
