"""Evaluates existing results: the image scores of labelled rows, part by part."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.config import EvaluateSpec
from raydetect.evaluation.run import EvaluationError, figures_of
from raydetect.metrics.quality import ImageGroup, Quality
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, join_uri, normalise_uri

COLUMNS = ["key", "image_score", "label", "category", "defect"]


def evaluate_results(spec: EvaluateSpec, uri: str) -> Mapping[str, Any]:
    """Computes the image metrics of a results directory's committed rows, in the format of a cell.

    Raises:
        EvaluationError: there is no label, or only one class.
        StorageError: the URI is not a results directory.
    """
    root = normalise_uri(uri)
    ledger = Ledger(root, Storage(spec.storage))
    ledger.require_run()
    quality, images = Quality(), 0
    for part in (part for receipt in ledger.receipts() for part in receipt.parts if part.labelled):
        # read from memory: Arrow's threads may keep a Python file open after the interpreter has exited, which aborts
        data = pa.BufferReader(ledger.storage.read(join_uri(root, part.path)))
        for row in pq.ParquetFile(data).read(columns=COLUMNS).to_pylist():
            if row["label"] is not None and row["image_score"] is not None:
                group = ImageGroup(row["category"] or "", row["label"], row["defect"] or "")
                quality.add(group, row["key"], row["image_score"], None, None)
                images += 1
    try:
        figures = figures_of(quality, spec.replicates)
    except ValueError as error:
        raise EvaluationError(f"{root}: {error}") from None
    return {"line": root, "seed": None, "test_images": images, "categories": figures}
