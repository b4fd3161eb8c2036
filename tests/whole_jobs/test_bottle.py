"""Fitting and scoring real images: MVTec bottle in an object store, through the command line on Ray."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from raydetect.sinks.heatmaps import read_map_png
from raydetect.sinks.ledger import Ledger
from tests.builders.archives import pack
from tests.objectstore import ObjectStore
from tests.whole_jobs.runs import rows_of, run, run_here, run_on, write_job


def packed(folder: Path, store: ObjectStore) -> None:
    """Packs training images as `train/*.tar`, and test images with their masks as `test/*.tar`."""
    with (folder / "manifest.csv").open() as file:
        listed = list(csv.DictReader(file))
    for split in ("train", "test"):
        files = []
        for row in listed:
            if row["split"] == split:
                names = [row["path"], row["mask"]]
                files += [(name, (folder / name).read_bytes()) for name in names if name]
        pack(store.uri(split), ".tar", files, 5, store.storage)


def test_bottle_is_fitted_and_scored_from_tar_shards_in_a_bucket(
    object_store: ObjectStore, cluster: str, real_data: Path, real_weights: Path, tmp_path: Path
) -> None:
    store = replace(object_store)
    packed(real_data / "mvtec_bottle_256", store)
    fit = {
        "kind": "fit",
        "source": {"uri": store.uri("train")},
        "detector": {
            "name": "patchcore",
            "params": {"backbone": "resnet18", "weights": str(real_weights), "coreset_sampling_ratio": 0.1},
        },
        "artifact": store.uri("artifact"),
        "storage": store.settings,
        "calibration": {"method": "holdout"},  # folds would choose five more coresets
        "resources": {"cpus_per_worker": 1},
    }
    score = {
        "kind": "score",
        "source": {
            "uri": store.uri("test"),
            "pattern": "{category}/test/{defect}/{name}.png",
            "mask_pattern": "{category}/ground_truth/{defect}/{name}_mask.png",
        },
        "artifact": store.uri("artifact"),
        "sink": {"uri": store.uri("results"), "heatmaps": "all", "style": "map"},
        "storage": store.settings,
        "flag": {"alpha": 0.05},
        "chunk_images": 8,
        "batch_size": 8,
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
    }
    message = run_here("fit", write_job(tmp_path / "fit.yaml", fit))
    assert "Calibrated on 21 held-out normal images" in message
    job = write_job(tmp_path / "score.yaml", score)
    assert "ready to score" in run(tmp_path / "check", "check", job).text()
    assert "Shards     5 left of 5" in run(tmp_path / "plan", "plan", job).text()
    run_on(cluster, "score", job)

    uri, storage = store.uri("results"), store.storage
    rows = rows_of(uri, storage)
    assert len(rows) == 83 and {row["status"] for row in rows} == {"ok"}
    labels = [row["label"] for row in rows]
    assert sum(labels) == 63
    image_auroc = roc_auc_score(labels, [row["image_score"] for row in rows])
    manifest = Ledger(uri, storage).manifest()
    assert manifest is not None
    scale = manifest["heatmap_scale"]
    maps, masks = [], []
    options = {"s3": storage.fsspec_options(uri)}
    for row in rows:
        member, _, container = row["heatmap_uri"].partition("::")
        with fsspec.open(f"{member}::{uri}{container}", **options) as handle:
            maps.append(read_map_png(handle.read(), scale["low"], scale["high"]))
        mask = np.zeros(maps[-1].shape, bool)
        if row["mask_uri"]:
            with fsspec.open(row["mask_uri"], **options) as handle:
                mask = np.asarray(Image.open(io.BytesIO(handle.read())).convert("L")) > 0
        masks.append(mask)
    pixel_auroc = roc_auc_score(np.stack(masks).ravel(), np.stack(maps).ravel())
    print(f"image AUROC {image_auroc:.4f}, pixel AUROC {pixel_auroc:.4f}, {manifest['clipped_pixels']} clipped pixels")
    assert image_auroc >= 0.995
    assert pixel_auroc >= 0.975

    status = run(
        tmp_path / "status", "status", uri, "--endpoint-url", store.endpoint_url,
        AWS_ACCESS_KEY_ID=store.key, AWS_SECRET_ACCESS_KEY=store.secret, AWS_DEFAULT_REGION="us-east-1",
    ).text()  # fmt: skip
    assert "finished" in status and "83" in status


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9"])
def test_an_unreachable_store_is_one_sentence(endpoint: str, tmp_path: Path) -> None:
    from tests.whole_jobs.runs import start

    job = {
        "kind": "score",
        "source": {"uri": "s3://nobody/x"},
        "artifact": "s3://nobody/a",
        "sink": {"uri": "s3://nobody/r"},
        "storage": {"endpoint_url": endpoint, "key": "k", "secret": "hush-hush"},
    }
    result = start(tmp_path, "check", write_job(tmp_path / "job.yaml", job))
    assert result.wait() == 1
    assert "cannot be reached" in result.text() and "hush" not in result.text() and "Traceback" not in result.text()
