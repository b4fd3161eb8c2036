"""raydetect's own results inside a source: they are never taken for images or labels."""

import re
from collections import Counter
from collections.abc import Sequence

from raydetect.left_out import NAMED
from raydetect.records import PART_FILE
from raydetect.storage import FileInfo

WRITTEN = re.compile(rf"(?P<run>.*)/(?:{PART_FILE}|ledger/\d{{5,}}\.json)", re.DOTALL)
RECORDS = ("run.json", "manifest.json")
NIGHT = re.compile(r"(?P<audits>.*)/nights/\d{5,}/results", re.DOTALL)
NIGHT_FILE = re.compile(
    r"(?P<audits>.*)/(?:(?:claims|statistics|summaries|webhooks)/\d{5,}\.json|nights/\d{5,}/report\.html)"
)


def without_results(files: Sequence[FileInfo]) -> tuple[list[FileInfo], list[str]]:
    """The files of a listing less those of results directories and audits, so that a sink may lie in its source.

    Such files are known by their paths alone. They are not counted as left out, because their number depends on how far
    a run has come.

    Returns:
        The other files in their order, and a sentence for a person if there are any.
    """
    runs = Counter(match["run"] for file in files if (match := WRITTEN.fullmatch(file.uri)))
    if not runs:
        return list(files), []
    records = {f"{run}/{name}" for run in runs for name in RECORDS}
    audits = {match["audits"] for run in runs if (match := NIGHT.fullmatch(run))}

    def is_result(uri: str) -> bool:
        night = NIGHT_FILE.fullmatch(uri)
        return uri in records or WRITTEN.fullmatch(uri) is not None or (night is not None and night["audits"] in audits)

    left = [file for file in files if not is_result(file.uri)]
    places = sorted(runs)
    named = ", ".join(places[:NAMED]) + (", ..." if len(places) > NAMED else "")
    count = len(files) - len(left)
    return left, [f"{count:,} files are results of raydetect and are not read ({named})."]
