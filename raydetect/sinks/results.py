"""Reading a results directory: progress from the ledger, and how well scores rank labelled images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raydetect.errors import StorageError
from raydetect.metrics.roc import auroc
from raydetect.sinks.ledger import Ledger, Totals


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is, from `run.json` and the ledger."""

    uri: str
    num_shards: int
    totals: Totals
    finished: bool

    def plain(self) -> dict[str, Any]:
        """For machines."""
        return {"uri": self.uri, "num_shards": self.num_shards, "finished": self.finished, **self.totals.plain()}

    def lines(self) -> list[str]:
        """For people."""
        totals = self.totals
        state = "finished" if self.finished else "not finished"
        share = 100.0 * totals.shards / max(1, self.num_shards)
        kinds = ", ".join(f"{count:,} {status}" for status, count in sorted(totals.statuses.items()))
        lines = [
            f"{self.uri}: {state}",
            f"Shards     {totals.shards:,} of {self.num_shards:,} committed ({share:.1f} %)",
            f"Images     {totals.rows:,} ({kinds or 'none yet'})",
            f"Flagged    {totals.flagged:,}",
            f"Heatmaps   {totals.heatmaps:,}",
        ]
        spent = totals.last_unix - totals.first_unix
        if totals.shards > 1 and spent > 0:
            lines.append(f"Pace       {totals.shards / spent * 60:.1f} shards/min between first and last commit")
        if not self.finished:
            lines.append("Start the same job again to go on.")
        return lines


def progress(ledger: Ledger) -> RunProgress:
    """Progress of a results directory; needs no cluster.

    Raises:
        StorageError: it is no results directory, or a record is damaged.
    """
    run = ledger.run()
    if run is None:
        raise StorageError(f"{ledger.uri}: holds no run.json, so no run was begun there. Check the URI.")
    totals = Totals()
    for receipt in ledger.receipts():
        totals.add(receipt)
    return RunProgress(ledger.uri, int(run["num_shards"]), totals, ledger.manifest() is not None)


def labelled_auroc(ledger: Ledger) -> tuple[float, int] | None:
    """(image AUROC, number of labelled images) of committed rows; None unless both labels are there."""
    labels, scores = [], []
    for receipt in ledger.receipts():
        for part in receipt.parts:
            if part.labelled:
                with ledger.storage.open(f"{ledger.uri}/{part.path}") as handle:
                    table = pq.read_table(handle, columns=["label", "image_score"]).drop_null()
                labels.append(table["label"].to_numpy())
                scores.append(table["image_score"].to_numpy())
    if not labels or len(np.unique(np.concatenate(labels))) < 2:
        return None
    return auroc(np.concatenate(labels), np.concatenate(scores)), sum(map(len, labels))
