"""Networks in bfloat16 against float32: images/s and AUROC of every detector on bottles, in one process.

Both precisions get the same short fit, far from the papers' settings: the columns of a detector are to be compared with
each other, not with other tables. Short trainings that round differently end apart, as other seeds do; so the float32
fit is also scored in bfloat16, which shows what rounding does to the scores of the same weights. Fits and AUROC are at
128 px; scoring is timed in turns at 256 px, where the detector takes that size, in batches of 8. All of it is on one
thread. Detectors that learn from other categories are left out, as there are bottles alone. Needs the bottles and the
ImageNet weights of a ResNet-18 up to layer3, in the folders that RAYDETECT_DATA and RAYDETECT_WEIGHTS name.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from jobs.bench.record import alternate, ratio, write
from raydetect.config import Precision
from raydetect.detectors._base import Detector
from raydetect.detectors._registry import build_detector, detector_class
from raydetect.errors import SpecError
from tests.builders.bottle import Bottles, aurocs, fit_in_memory, read_bottles

SIZE_PX, SPEED_PX, BATCH, ROUNDS = 128, 256, 8, 5
TRAIN = 48  # normal images, evenly spaced
LABELLED = 8  # defects for detectors that learn from some; they are left out of the test
PRECISIONS: tuple[Precision, Precision] = ("float32", "bfloat16")
WEIGHTS = "resnet18_imagenet_layer1-3.safetensors"
RESNET = {"backbone": "resnet18", "weights": WEIGHTS}
DETECTORS: dict[str, dict[str, Any]] = {
    "cflow": {**RESNET, "layers": ["layer2", "layer3"], "epochs": 1, "sub_epochs": 1, "warm_up_epochs": 0}
    | {"learning_rate": 1e-3},
    "cutpaste": {**RESNET, "last_layer": "layer3", "epochs": 2, "steps_per_epoch": 8, "batch_size": 24},
    "devnet": {**RESNET, "last_layer": "layer3", "epochs": 4, "steps_per_epoch": 5, "batch_size": 16},
    "differnet": {**RESNET, "head": "difference", "layers": ["layer2", "layer3"], "coreset_sampling_ratio": 0.05}
    | {"difference_epochs": 1},
    "draem": {"base_width": 8, "epochs": 10, "learning_rate": 2e-3},
    "fastflow": {**RESNET, "epochs": 3, "batch_size": 16},
    "memseg": {**RESNET, "deepest_layer": None, "training_steps": 24},
    "patchcore": {**RESNET, "coreset_sampling_ratio": 0.05},
    "pyramidflow": {**RESNET, "epochs": 1, "learning_rate": 1e-3},
    "reverse_distillation_pp": {**RESNET, "epochs": 6, "batch_size": 16, "smoothing_sigma": 2.0},
    "riad": {"base_width": 8, "grid_size": [8], "epochs": 8, "learning_rate": 3e-3},
    "simplenet": {**RESNET, "embedding_dims": None, "epochs": 4},
    "spade": {**RESNET, "pooled_level": "layer3", "k_neighbors": 10},
    "stfpm": {**RESNET, "epochs": 12, "learning_rate": 0.1},
    "uniad": {**RESNET, "layers": ["layer1", "layer2", "layer3"], "neighbor_size": 5, "hidden_dims": 128}
    | {"n_encoder_layers": 2, "n_decoder_layers": 2, "feedforward_dims": 512, "epochs": 20, "learning_rate": 1e-3},
}
WINCLIP = {"clip_model": "ViT-B-32", "weights": "random"}  # no weights at hand: only its speed


def made(name: str, precision: Precision, weights: Path) -> Detector:
    """An unfitted detector."""
    params = {**DETECTORS[name], "image_size": [SIZE_PX, SIZE_PX], "precision": precision}
    if "weights" in params:
        params["weights"] = str(weights / WEIGHTS)
    return build_detector(name, params)


def fitted(name: str, precision: Precision, train: Bottles, weights: Path) -> tuple[Detector, float]:
    """A detector fitted at a precision, and the seconds that took."""
    detector = made(name, precision, weights)
    detector.load_weights()
    start = perf_counter()
    fit_in_memory(detector, train)
    return detector, perf_counter() - start


def accuracy(detector: Detector, test: Bottles) -> dict[str, float]:
    """AUROC of images and pixels."""
    image_auroc, pixel_auroc = aurocs(detector, test, BATCH)
    return {"image_auroc": round(image_auroc, 4), "pixel_auroc": round(pixel_auroc, 4)}


def speed(detectors: list[Detector], images_BCHW: torch.Tensor) -> dict[str, Any]:
    """Images/s of scoring at both precisions, in turns, and how much faster the second is."""
    with torch.inference_mode():
        whole, half = alternate(*(partial(detector.score, images_BCHW) for detector in detectors), rounds=ROUNDS)
    rates = [round(len(images_BCHW) / median(seconds), 2) for seconds in (whole, half)]
    return {
        "px": images_BCHW.shape[-1],
        "images_per_second": dict(zip(PRECISIONS, rates, strict=True)),
        "faster": ratio(whole, half),
    }


def compared(name: str, train: Bottles, test: Bottles, large: Bottles, weights: Path) -> dict[str, Any]:
    """Speed, on large images, and AUROC of a detector at both precisions."""
    if detector_class(name).info.labels != "none":
        shown = np.flatnonzero(test.labels)[:: max(1, int(test.labels.sum()) // LABELLED)][:LABELLED]
        train = train.joined(test.only(shown))
        test = test.only(np.setdiff1d(np.arange(len(test.names)), shown))
    fits = [fitted(name, precision, train, weights) for precision in PRECISIONS]
    found: dict[str, Any] = {"params": DETECTORS[name], "test": len(test.names)}
    for precision, (detector, seconds) in zip(PRECISIONS, fits, strict=True):
        found[precision] = {"fit_seconds": round(seconds, 1), **accuracy(detector, test)}
    other = made(name, "bfloat16", weights)
    other.load_tensors(fits[0][0].tensors())
    found["float32_fit_in_bfloat16"] = accuracy(other, test)
    detectors = [detector for detector, _ in fits]
    try:
        return found | speed(detectors, batch(large))
    except SpecError:  # its layer norms or its memory have one size
        return found | speed(detectors, batch(test))


def batch(bottles: Bottles) -> torch.Tensor:
    """The first images, uint8 (B, 3, H, W)."""
    return torch.from_numpy(bottles.images_BHWC[:BATCH]).permute(0, 3, 1, 2)


def winclip(large: Bottles) -> dict[str, Any]:
    """Speed of WinCLIP with random weights, at its own size."""
    detectors = []
    for precision in PRECISIONS:
        detector = build_detector("winclip", {**WINCLIP, "precision": precision})
        detector.load_weights()
        detector.freeze()  # type: ignore[attr-defined]
        detectors.append(detector)
    side = detectors[0].params.image_size[0]
    images_BCHW = torch.from_numpy(large.images_BHWC[:1, :side, :side].copy()).permute(0, 3, 1, 2)
    return {"params": WINCLIP, **speed(detectors, images_BCHW)}


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="DETECTOR", help="only these, printed and not written")
    chosen = parser.parse_args().names
    data, weights = os.environ.get("RAYDETECT_DATA"), os.environ.get("RAYDETECT_WEIGHTS")
    if not data or not weights:
        sys.exit("Set RAYDETECT_DATA to the folder that contains mvtec_bottle_256, and RAYDETECT_WEIGHTS.")
    train, test = (read_bottles(Path(data), split, SIZE_PX) for split in ("train", "test"))
    large = read_bottles(Path(data), "test", SPEED_PX)
    torch.set_num_threads(1)
    train = train.only(np.linspace(0, len(train.names) - 1, TRAIN).round().astype(int))
    found = {}
    for name in chosen or sorted([*DETECTORS, "winclip"]):
        start = perf_counter()
        found[name] = winclip(large) if name == "winclip" else compared(name, train, test, large, Path(weights))
        print(f"{name}: {perf_counter() - start:.0f} s, {found[name]}", flush=True)
    if not chosen:
        setting = {"fit_px": SIZE_PX, "batch": BATCH, "train": TRAIN, "threads": 1, "seed": 0}
        write("precision", "python -m jobs.bench.precision", {**setting, "detectors": found})


if __name__ == "__main__":
    main()
