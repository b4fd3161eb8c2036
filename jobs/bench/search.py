"""PatchCore scoring compared with anomalib's torch prediction: same images, weights, bank and threads, in one process.

Uses real images and weights if RAYDETECT_DATA and RAYDETECT_WEIGHTS are set, else generated images, random weights.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.bench.record import alternate, ratio, write
from raydetect.blocks.coresets.coreset import choose_coreset
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import KeyedRows
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.patchcore import PatchCore
from tests.builders.images import defect_image, normal_image

BANKS = (2_000, 20_000)
BATCH = 8
SIZE_PX = 256
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def images(split: str, count: int) -> torch.Tensor:
    """Images as uint8 (B, 3, H, W), channels last in memory, like decoder output."""
    root = os.environ.get("RAYDETECT_DATA")
    if root:
        paths = sorted((Path(root) / "mvtec_bottle_256" / "bottle" / split).rglob("*.png"))
        chosen = paths[:: max(1, len(paths) // count)][:count]
        arrays = [np.array(Image.open(path).convert("RGB")) for path in chosen]
    elif split == "train":
        arrays = [normal_image(i, SIZE_PX) for i in range(count)]
    else:
        arrays = [defect_image(i, "blob", SIZE_PX)[0] for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def resnet18() -> PatchCore:
    """An unfitted PatchCore with a ResNet-18; weights from RAYDETECT_WEIGHTS if set, else random."""
    folder = os.environ.get("RAYDETECT_WEIGHTS")
    weights = str(Path(folder) / "resnet18_imagenet_layer1-3.safetensors") if folder else "random"
    detector = build_detector("patchcore", {"backbone": "resnet18", "weights": weights})
    assert isinstance(detector, PatchCore)
    detector.load_weights()
    return detector


def peer(detector: PatchCore) -> Any:
    """anomalib's PatchCore with the same backbone weights."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=["layer2", "layer3"], backbone="resnet18", pre_trained=False).eval()
    assert detector.backbone is not None
    loaded = model.feature_extractor.feature_extractor.load_state_dict(detector.backbone.weights(), strict=False)
    assert not [name for name in loaded.missing_keys if not name.endswith("num_batches_tracked")], loaded.missing_keys
    return model


def error_against_float64(detector: PatchCore, batch_BCHW: torch.Tensor) -> tuple[float, float]:
    """(largest relative error of a patch distance, share of patches whose row is not nearest within 1e-6)."""
    assert detector.search is not None
    with torch.inference_mode():
        patches_ND = detector._embed(batch_BCHW).flatten(0, 2)[::5]
        distance_N1, index_N1 = detector.search.nearest(patches_ND)
        exact_NM = torch.cdist(
            patches_ND.double(), detector.search.bank().double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
    best_N = exact_NM.min(1).values
    chosen_N = exact_NM.gather(1, index_N1)[:, 0]
    relative = ((distance_N1[:, 0] - best_N).abs() / best_N.clamp_min(1e-9)).max()
    return float(relative), float((chosen_N > best_N * (1 + 1e-6)).float().mean())


def main() -> None:
    """Runs the benchmark and writes its results."""
    warnings.filterwarnings("ignore")
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    detector = resnet18()
    with torch.inference_mode():
        training = images("train", 200)
        embeddings_BND = torch.cat([detector._embed(part).flatten(1, 2) for part in training.split(BATCH)])
    print(f"Choosing a coreset of {BANKS[-1]} among {embeddings_BND.flatten(0, 1).shape[0]} embeddings", flush=True)
    rows = KeyedRows(embeddings_BND.shape[2], Group())
    for number, part_ND in enumerate(embeddings_BND.clone()):
        rows.add(f"{number:04d}", part_ND)
    rows_MD = choose_coreset(rows, BANKS[-1], seed=0, projected_dims=128).rows_MD
    model, batch_BCHW = peer(detector), images("test", BATCH)
    figures: dict[str, Any] = {"images": "real" if "RAYDETECT_DATA" in os.environ else "generated", "threads": threads}

    def theirs() -> Any:
        with torch.inference_mode():
            return model((batch_BCHW.float() / 255 - MEAN) / STD)

    for size in BANKS:  # the first rows of a greedy coreset are the smaller coreset
        detector.search = BankSearch(rows_MD[:size])
        model.memory_bank = detector.search.bank()
        their_seconds, our_seconds = alternate(theirs, lambda: detector.score(batch_BCHW))
        difference = (theirs().pred_score.flatten() - detector.score(batch_BCHW).image_score_B).abs().max()
        relative, wrong = error_against_float64(detector, batch_BCHW)
        figures[f"bank_{size}"] = {
            "anomalib_over_raydetect": ratio(their_seconds, our_seconds),
            "images_per_second": round(BATCH / sorted(our_seconds)[len(our_seconds) // 2], 1),
            "largest_difference_of_image_scores": float(difference),
            "largest_relative_error_of_a_distance": relative,
            "share_of_wrong_neighbours": wrong,
        }
    write("search", "make bench", figures)


if __name__ == "__main__":
    main()
