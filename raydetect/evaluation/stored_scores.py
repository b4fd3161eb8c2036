"""Figures of results that are there already: image scores of labelled rows, part by part."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydetect.config import EvaluateSpec
from raydetect.errors import MissingError
from raydetect.evaluation.run import EvaluationError, figures_of
from raydetect.metrics.quality import Group, Quality
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, join_uri, normalise_uri

COLUMNS = ["key", "image_score", "label", "category", "defect"]


def evaluate_results(spec: EvaluateSpec, uri: str) -> Mapping[str, Any]:
    """What a cell would hold, of a results directory: image figures of its committed rows.

    Raises:
        EvaluationError: there is no label, or one class only.
        StorageError: it is no results directory.
    """
    place = normalise_uri(uri)
    ledger = Ledger(place, Storage(spec.storage))
    run = ledger.run()
    if run is None:
        raise MissingError(f"{place}: holds no run.json, so no run was begun there. Check results.")
    quality, images = Quality(), 0
    for part in (part for receipt in ledger.receipts() for part in receipt.parts if part.labelled):
        # from memory: Arrow's threads may hold a Python file until after the interpreter has ended, which aborts
        data = pa.BufferReader(ledger.storage.read(join_uri(place, part.path)))
        for row in pq.ParquetFile(data).read(columns=COLUMNS).to_pylist():
            if row["label"] is not None and row["image_score"] is not None:
                group = Group(row["category"] or "", row["label"], row["defect"] or "")
                quality.add(group, row["key"], row["image_score"], None, None)
                images += 1
    try:
        figures = figures_of(quality, spec.replicates)
    except ValueError as error:
        raise EvaluationError(f"{place}: {error}") from None
    return {"line": place, "seed": None, "test_images": images, "categories": figures}
