"""Builds the HTML report of a results directory."""

from collections.abc import Mapping
from typing import Any

from raydetect.artifacts.fleet import ArtifactIndex, read_index
from raydetect.errors import RaydetectError
from raydetect.report.page import Extra, render
from raydetect.report.pictures import Pictures, Reach, reach_of
from raydetect.report.tally import Tally, tally
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, normalise_uri

PICTURES = 48


def report_html(ledger: Ledger, pictures: int = PICTURES, extra: Extra | None = None) -> str:
    """The report of a results directory, finished or not; reads all committed rows once, but few images.

    Args:
        ledger: ledger of the results directory.
        pictures: number of most anomalous images to show.
        extra: additions of an audit.

    Raises:
        StorageError: no run was started there, or a record or part is missing or damaged.
    """
    run = ledger.require_run()
    return page_of(ledger, run, tally(ledger, run, pictures), extra)


def page_of(
    ledger: Ledger, run: Mapping[str, Any], row_tally: Tally, extra: Extra | None = None, reach: Reach | None = None
) -> str:
    """The same, from rows that have already been tallied.

    Args:
        ledger: ledger of the results directory.
        run: its `run.json`.
        row_tally: tally of its rows.
        extra: additions of an audit.
        reach: storages of the archive and the artifact; None = from the public settings in `run.json`.

    Raises:
        StorageError: a record is damaged.
    """
    reach = reach or reach_of(run)
    return render(ledger, run, row_tally, Pictures(ledger, run, reach.source), detector_text(run, reach.models), extra)


def detector_text(run: Mapping[str, Any], storage: Storage) -> str:
    """Describes the artifact: names and counts if it is unchanged, else only its digest."""
    digest = str(run["result"]["artifact"])
    try:
        index = read_index(normalise_uri(run["spec"]["artifact"]), storage)
    except RaydetectError:
        return f"artifact {digest[:16]}"
    if index.digest != digest:
        return f"artifact {digest[:16]} (since replaced)"
    return _described(index)


def _described(index: ArtifactIndex) -> str:
    if index.is_shared:
        name = str(index.body["detector"])
        return f"{name} calibrated for each of {len(index.categories):,} categories ({index.digest[:16]})"
    if index.categories:
        return f"fleet of {len(index.categories):,} detectors ({index.digest[:16]})"
    members = [str(member.get("detector")) for member in index.body.get("members", [])]
    name = str(index.body["detector"]) + (f" of {', '.join(members)}" if members else "")
    return f"{name} ({index.digest[:16]})"
