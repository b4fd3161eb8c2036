"""Real images for one small run per detector: MVTec bottle, fitted in one process and scored against its masks."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from raydetect import local
from raydetect.spec import FitSpec, parse_job
from raydetect.storage import Storage
from raydetect.worker.artifact import load_artifact


def auroc_on_bottle(folder: Path, name: str, params: dict[str, Any], every: int = 1) -> tuple[float, float]:
    """Image and pixel AUROC of a detector fitted on the good images.

    Args:
        folder: of the data sets.
        name: detector.
        params: its parameters.
        every: of the training and test images only every n-th is used.
    """
    root = folder / "mvtec_bottle_256"
    with (root / "manifest.csv").open() as file:
        listed = list(csv.DictReader(file))
    train = [str(root / row["path"]) for row in listed if row["split"] == "train"][::every]
    spec = parse_job(
        {
            "kind": "fit",
            "source": {"uri": train},
            "detector": {"name": name, "params": params},
            "artifact": f"memory://bottle/{name}",
            "batch_size": 8,
            "precision": "bfloat16",
            "resources": {"cpus_per_worker": 2},
        },
        name,
    )
    assert isinstance(spec, FitSpec)
    local.fit(spec, lambda *_: None)
    detector = load_artifact(spec.artifact, Storage()).detector
    test = [row for row in listed if row["split"] == "test"][::every]
    height, width = detector.params.image_size
    scores, maps, masks = [], [], []
    for row in test:
        picture = Image.open(root / row["path"]).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        with torch.inference_mode():
            found = detector.score(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous())
        scores.append(float(found.image_score_B[0]))
        maps.append(found.anomaly_map_BHW[0].numpy())
        mask = np.zeros((height, width), bool)
        if row["mask"]:
            stored = Image.open(root / row["mask"]).convert("L").resize((width, height), Image.Resampling.NEAREST)
            mask = np.asarray(stored) > 0
        masks.append(mask)
    image = roc_auc_score([int(row["label"]) for row in test], scores)
    return float(image), float(roc_auc_score(np.stack(masks).ravel(), np.stack(maps).ravel()))
