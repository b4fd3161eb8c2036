"""Excludes raydetect's own results from a source."""

import re
from collections import Counter
from collections.abc import Sequence

from raydetect.left_out import NAMED
from raydetect.records import JOB_FILE, PART_FILE
from raydetect.storage import FileInfo

WRITTEN = re.compile(rf"(?P<run>.*)/(?:{PART_FILE}|ledger/\d{{5,}}\.json)", re.DOTALL)
RECORDS = ("run.json", "manifest.json", JOB_FILE)
NIGHT = re.compile(r"(?P<audits>.*)/nights/\d{5,}/results", re.DOTALL)
NIGHT_FILE = re.compile(
    r"(?P<audits>.*)/(?:(?:claims|statistics|summaries|webhooks)/\d{5,}\.json|nights/\d{5,}/report\.html)"
)


def without_results(files: Sequence[FileInfo]) -> tuple[list[FileInfo], list[str]]:
    """Removes files of results directories and audits from a listing, so that a sink may be inside its source.

    They are recognised by path only. They do not count as left out, because their number depends on the progress of a
    run.

    Returns:
        The other files in the same order, and a message for the user if any were removed.
    """
    runs = Counter(match["run"] for file in files if (match := WRITTEN.fullmatch(file.uri)))
    if not runs:
        return list(files), []
    records = {f"{run}/{name}" for run in runs for name in RECORDS}
    audits = {match["audits"] for run in runs if (match := NIGHT.fullmatch(run))}

    def is_result(uri: str) -> bool:
        night = NIGHT_FILE.fullmatch(uri)
        return uri in records or WRITTEN.fullmatch(uri) is not None or (night is not None and night["audits"] in audits)

    kept = [file for file in files if not is_result(file.uri)]
    named = ", ".join(sorted(runs)[:NAMED]) + (", ..." if len(runs) > NAMED else "")
    count = len(files) - len(kept)
    return kept, [f"{count:,} files are results of raydetect and are not read ({named})."]
