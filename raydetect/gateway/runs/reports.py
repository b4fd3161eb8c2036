"""The report of an archive run as a page; it shows only images that clients may read."""

from collections.abc import Mapping

from raydetect.gateway.allowed_uris import NotAllowed, Prefixes
from raydetect.gateway.backend import Served
from raydetect.report.build import PICTURES
from raydetect.report.page import render
from raydetect.report.pictures import Pictures
from raydetect.report.tally import tally
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage


class Reports:
    """Builds reports; each reads all rows of its run."""

    def __init__(self, storage: Storage, sources: Prefixes) -> None:
        """Stores the arguments.

        Args:
            storage: storage of results and archives.
            sources: prefixes below which images may be read.
        """
        self._storage, self._sources = storage, sources

    def page(self, uri: str, served: Mapping[str, Served]) -> str:
        """Renders the report of a run.

        Args:
            uri: results directory.
            served: served detectors, to show the name of the one that scored.

        Raises:
            StorageError: no run was started there, or a record or part is missing or damaged.
        """
        ledger = Ledger(uri, self._storage)
        run = ledger.require_run()
        digest = str(run["result"]["artifact"])
        name = next((name for name, one in served.items() if one.index.digest == digest), "artifact")
        pictures = Pictures(ledger, run, self._storage, allows=self._allows)
        return render(ledger, run, tally(ledger, run, PICTURES), pictures, f"{name} ({digest[:16]})")

    def _allows(self, uri: str) -> bool:
        try:
            self._sources.check(uri, "image")
        except NotAllowed:
            return False
        return True
