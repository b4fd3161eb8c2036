"""The cells of an evaluation: which detector is fitted with which seed on what. One finished cell is one JSON file."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydetect.archives.base import archive_fingerprint
from raydetect.archives.dataset_layouts import Labelled, read_layout
from raydetect.archives.open import open_archive
from raydetect.config import DetectorSpec, EvaluateSpec, public_spec, result_settings, source_storage
from raydetect.config.validation import digest, to_plain
from raydetect.detectors._registry import build_from
from raydetect.errors import DamagedError, SpecError
from raydetect.storage import Storage, join_uri, normalise_uri

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """One fit and what is judged by it.

    Attributes:
        detector: with the parameters of this point of the grid.
        line: which line of the leaderboard it belongs to: the detector with what the job states of it.
        category: that is fitted and judged; None = the whole archive.
        seed: of the fit.
        digest: of everything that decides its figures.
    """

    detector: DetectorSpec
    line: str
    category: str | None
    seed: int
    digest: str

    @property
    def name(self) -> str:
        """Names its file."""
        return f"{self.detector.name}-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A job with its data listed; nothing is fitted or written yet."""

    spec: EvaluateSpec
    cells: tuple[Cell, ...]
    images: tuple[Labelled, ...]

    @property
    def output(self) -> str:
        """Where cells and leaderboard go."""
        return normalise_uri(self.spec.output)

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell holds; None when it is left to do.

        Raises:
            DamagedError: its file is damaged.
        """
        place, storage = self._place(cell), Storage(self.spec.storage)
        if not storage.exists(place):
            return None
        try:
            body: dict[str, Any] = json.loads(storage.read(place))
            if body["digest"] == cell.digest:
                return body
        except (ValueError, KeyError, TypeError):
            raise DamagedError(f"{place}: is damaged. Remove it, and the cell is evaluated anew.") from None
        raise DamagedError(f"{place}: is of another cell. Remove it, and the cell is evaluated anew.")

    def commit(self, cell: Cell, body: Mapping[str, Any]) -> None:
        """Writes a finished cell."""
        whole = {"format_version": FORMAT_VERSION, "digest": cell.digest, **body}
        text = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False)
        Storage(self.spec.storage).write(self._place(cell), text.encode())

    def _place(self, cell: Cell) -> str:
        return join_uri(self.output, "cells", f"{cell.name}.json")


def plan_evaluation(spec: EvaluateSpec) -> Evaluation:
    """Lists the data and the cells, and builds every detector once to check its parameters.

    Raises:
        SpecError, StorageError: the job cannot run as it is.
    """
    images, groups = _data(spec)
    words = {
        name: word
        for name, word in result_settings(public_spec(spec)).items()
        if name not in ("detectors", "grid", "seeds", "output")
    }
    cells = []
    for detector, line in _lines(spec):
        for (category, fingerprint), seed in itertools.product(groups.items(), spec.seeds):
            build_from(detector, seed)
            decides = {**words, "detector": to_plain(detector), "seed": seed, "category": category, "data": fingerprint}
            cells.append(Cell(detector, line, category, seed, digest(decides)))
    if len({cell.digest for cell in cells}) != len(cells):
        raise SpecError("detectors: two of them are the same with the same parameters. Keep one.")
    return Evaluation(spec, tuple(cells), images)


def _data(spec: EvaluateSpec) -> tuple[tuple[Labelled, ...], dict[str | None, str]]:
    """Images of a layout, and the fingerprint of what each category is fitted on and judged by."""
    if spec.data is not None:
        images = tuple(read_layout(spec.data, Storage(spec.storage)))
        names = sorted({image.category for image in images})
        return images, {name: digest([i for i in images if i.category == name]) for name in names}
    assert spec.archive is not None
    prints = []
    for source in (spec.archive.train, spec.archive.test):
        archive = open_archive(source, Storage(source_storage(spec, source)))
        prints.append(archive_fingerprint(archive.shards()))
    return (), {None: digest(prints)}


def _lines(spec: EvaluateSpec) -> list[tuple[DetectorSpec, str]]:
    """Every detector at every point of the grid, and what to call it."""
    found = []
    names = sorted(spec.grid)
    for detector in spec.detectors:
        for point in itertools.product(*(spec.grid[name] for name in names)):
            params = {**detector.params, **dict(zip(names, point, strict=True))}
            made = detector if detector.ensemble else replace(detector, params=params)
            shown = " ".join(f"{name}={_short(value)}" for name, value in sorted(params.items()))
            preset = "" if detector.preset == "paper" else f" ({detector.preset})"
            found.append((made, f"{detector.title}{preset} {shown}".strip()))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(to_plain(value), separators=(",", ":"))
    return str(text).rpartition("/")[2]
