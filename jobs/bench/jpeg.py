"""Decoding 12-megapixel JPEGs in full and at a reduced DCT scale: images/s, pixels, and the metrics of PatchCore.

Both rules are measured in one process, in turns. The AUROC needs the bottles and the ImageNet weights, in the folders
that RAYDETECT_DATA and RAYDETECT_WEIGHTS name.
"""

import io
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.bench.record import alternate, ratio, write
from raydetect.config import EvaluateSpec, FitSpec, JpegScale, ScoreSpec, parse_job
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.run import run_cell
from raydetect.images.decode import decode_member
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.records import Member
from tests.builders.archives import pack
from tests.builders.bottle import read_bottles
from tests.builders.images import normal_image

SIZE = (4000, 3000)
INPUT_PX = 256
JOB_PX = 64
IMAGES = 24
BOTTLE_PX = 2000
ROUNDS = 7
SCALES: tuple[JpegScale, JpegScale] = ("full", "at_least_2x")
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "clean, quality 75": (0, {"quality": 75}),
    "clean, quality 90": (0, {"quality": 90}),
    "grain, quality 90": (4, {"quality": 90}),
    "grain, quality 90, 4:4:4": (4, {"quality": 90, "subsampling": 0}),
    "grain, quality 90, progressive": (4, {"quality": 90, "progressive": True}),
}
JOB_KINDS = ("clean, quality 75", "grain, quality 90")
FIGURES = ("image_auroc", "image_ap", "pixel_auroc", "aupro_0.3")
WEIGHTS = "resnet18_imagenet_layer1-3.safetensors"


def photograph(kind: str, number: int) -> bytes:
    """A JPEG of SIZE: an enlarged image, with the grain of a sensor of so many levels in every px, if any."""
    levels, options = KINDS[kind]
    picture = Image.fromarray(normal_image(number, 1024)).resize(SIZE, Image.Resampling.BICUBIC)
    if levels:
        random = np.random.default_rng(number)
        grain_HW1 = levels * random.standard_normal((*picture.size[::-1], 1), dtype=np.float32)
        picture = Image.fromarray(np.clip(np.asarray(picture) + grain_HW1, 0, 255).astype(np.uint8))
    return jpeg(picture, **options)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    """Encodes a picture as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def decoded(member: Member, scale: JpegScale) -> np.ndarray:
    """Decodes an image to the input, uint8 RGB."""
    pixels = decode_member(member, DecodeRules(10**8, True), Preprocess((INPUT_PX, INPUT_PX), scale)).only_input
    assert pixels is not None
    return pixels


def decoder() -> dict[str, Any]:
    """Images/s of one thread from encoded bytes to the input, and how far the pixels of both rules differ."""
    found = {}
    for name in KINDS:
        member = Member("k", "u", data=photograph(name, 0))
        full, fast = alternate(partial(decoded, member, "full"), partial(decoded, member, "at_least_2x"), ROUNDS)
        levels = np.abs(decoded(member, "full").astype(int) - decoded(member, "at_least_2x"))
        found[name] = {
            "megabytes": round(len(member.data) / 1e6, 2),
            **{f"images_per_second_{s}": round(1 / median(t), 2) for s, t in zip(SCALES, (full, fast), strict=True)},
            "faster": ratio(full, fast),
            "levels_apart": {"mean": round(float(levels.mean()), 3), "most": int(levels.max())},
        }
    return {"input_px": INPUT_PX, "kinds": found}


def fitted(folder: Path, name: str, source: str, params: dict[str, Any], scale: JpegScale) -> str:
    """Fits PatchCore on a source by one rule and returns the artifact's folder."""
    values = {
        "kind": "fit",
        "source": {"uri": source},
        "detector": {"name": "patchcore", "params": params},
        "artifact": f"{folder}/{name}-{scale}",
        "preprocess": {"jpeg_scale": scale},
        "resources": {"cpus_per_worker": os.cpu_count()},
    }
    spec = parse_job(values, name)
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)
    return spec.artifact


def scored(folder: Path, artifact: str, results: str) -> int:
    """Runs a whole scoring job in this process, on one thread, and returns the number of scored images."""
    values = {
        "kind": "score",
        "source": {"uri": f"{folder}/day"},
        "artifact": artifact,
        "sink": {"uri": f"{folder}/{results}", "heatmaps": "none"},
        "flag": {"threshold": 0.0},
    }
    spec = parse_job(values, results)
    assert isinstance(spec, ScoreSpec)
    return int(jobs.score(plan_score(spec), lambda *_: None)["statuses"]["ok"])


@dataclass
class Runs:
    """Scoring jobs by one rule, each with results of its own."""

    folder: Path
    artifact: str
    done: int = 0

    def __call__(self) -> None:
        """Scores all photographs."""
        self.done += 1
        name = f"results-{self.artifact.rpartition('/')[2]}-{self.done}"
        assert scored(self.folder, self.artifact, name) == IMAGES


def whole_job(kind: str, folder: Path) -> dict[str, Any]:
    """Images/s of `score --local` over a tar of photographs, with a tiny detector and one thread."""
    files = [(f"{number:03d}.jpg", photograph(kind, number)) for number in range(IMAGES)]
    pack(f"file://{folder}/day", ".tar", files, 1)
    pack(f"file://{folder}/normal", ".tar", files[:8], 1)
    params = {"weights": "random", "image_size": [JOB_PX] * 2, "layers": ["layer1"], "max_bank_vectors": 200}
    runs = [Runs(folder, fitted(folder, "tiny", f"{folder}/normal", params, scale)) for scale in SCALES]
    full, fast = alternate(*runs, rounds=ROUNDS)
    rates = {f"images_per_second_{s}": round(IMAGES / median(t), 2) for s, t in zip(SCALES, (full, fast), strict=True)}
    return {"images": IMAGES, "detector_px": JOB_PX, **rates, "faster": ratio(full, fast)}


def write_bottles(folder: Path, data: Path) -> None:
    """Writes all bottles as JPEGs of BOTTLE_PX, and their masks, in the layout of MVTec AD."""
    for split in ("train", "test"):
        bottles = read_bottles(data, split, INPUT_PX)
        for number, defect in enumerate(bottles.defects):
            large = Image.fromarray(bottles.images_BHWC[number]).resize(
                (BOTTLE_PX, BOTTLE_PX), Image.Resampling.BICUBIC
            )
            place = folder / "bottle" / split / defect / f"{number:03d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(jpeg(large, quality=90))
            if bottles.labels[number]:
                mask = Image.fromarray(bottles.masks_BHW[number]).resize((BOTTLE_PX, BOTTLE_PX))
                place = folder / "bottle" / "ground_truth" / defect / f"{number:03d}_mask.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                mask.save(place)


def accuracy(folder: Path) -> dict[str, Any]:
    """Metrics of PatchCore (ResNet-18, 256 px) on enlarged bottles, fitted and evaluated by both rules."""
    data, weights = os.environ.get("RAYDETECT_DATA"), os.environ.get("RAYDETECT_WEIGHTS")
    if not data or not weights:
        return {"not_run": "RAYDETECT_DATA and RAYDETECT_WEIGHTS are not set"}
    write_bottles(folder / "data", Path(data))
    found: dict[str, Any] = {"stored_px": BOTTLE_PX, "detector_px": INPUT_PX}
    params = {"backbone": "resnet18", "weights": f"{weights}/{WEIGHTS}", "image_size": [INPUT_PX] * 2}
    for scale in SCALES:
        values = {
            "kind": "evaluate",
            "data": {"uri": f"{folder}/data", "layout": "mvtec_ad"},
            "output": f"{folder}/{scale}",
            "detectors": [{"name": "patchcore", "params": params}],
            "replicates": 0,
            "preprocess": {"jpeg_scale": scale},
            "resources": {"cpus_per_worker": os.cpu_count()},
        }
        spec = parse_job(values, scale)
        assert isinstance(spec, EvaluateSpec)
        evaluation = plan_evaluation(spec)
        cell = run_cell(evaluation, evaluation.cells[0], lambda *_: None)
        bottle = cell["categories"]["bottle"]
        found |= {"train": cell["fitted_images"], "test": cell["test_images"]}
        found[scale] = {name: round(bottle["figures"][name]["value"], 5) for name in FIGURES}
    found["difference"] = {name: round(abs(found[SCALES[0]][name] - found[SCALES[1]][name]), 5) for name in FIGURES}
    return found


def main() -> None:
    """Runs the benchmark and writes its results."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"stored_px": list(SIZE), "decoder": decoder(), "score_local": {}}
    for kind in JOB_KINDS:
        with tempfile.TemporaryDirectory(prefix="raydetect-bench-") as folder:
            figures["score_local"][kind] = whole_job(kind, Path(folder))
    with tempfile.TemporaryDirectory(prefix="raydetect-bench-") as folder:
        figures["bottles"] = accuracy(Path(folder))
    write("jpeg", "python -m jobs.bench.jpeg", figures)


if __name__ == "__main__":
    main()
