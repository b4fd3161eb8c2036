"""The cells of an evaluation: combinations of detector, data and seed. Each finished cell is one JSON file."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydetect.archives.base import archive_fingerprint
from raydetect.archives.dataset_layouts import Labelled, read_layout
from raydetect.archives.open import open_archive
from raydetect.artifacts.fit_preprocess import view_of
from raydetect.config import DetectorSpec, EvaluateSpec, ViewSpec, public_spec, result_settings, source_storage
from raydetect.config.fit import STANDARD
from raydetect.config.geometry.paper_views import view_of_presets
from raydetect.config.validation import digest, to_plain
from raydetect.detectors._base import Auxiliary
from raydetect.detectors._registry import build_from
from raydetect.errors import DamagedError, SpecError
from raydetect.fitting.reading.auxiliary import NEEDED, auxiliary_kind
from raydetect.storage import Storage, join_uri, normalise_uri

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """One fit and its evaluation.

    Attributes:
        detector: with the parameters of this point of the grid.
        line: row of the leaderboard: the detector with the parameters set in the job.
        category: the category to fit and evaluate; None = all together.
        seed: of the fit.
        digest: of everything that determines its metrics.
    """

    detector: DetectorSpec
    line: str
    category: str | None
    seed: int
    digest: str

    @property
    def name(self) -> str:
        """Name of the cell's file."""
        return f"{self.detector.name}-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation job with its data listed; nothing is fitted or written yet.

    Attributes:
        spec: the job.
        cells: what is to be evaluated.
        images: of the categories to evaluate; empty for an archive.
        others: normal training images of all categories of the data set, for detectors that learn from other
            categories; empty if there are none, or the job names `auxiliary`.
    """

    spec: EvaluateSpec
    cells: tuple[Cell, ...]
    images: tuple[Labelled, ...]
    others: tuple[Labelled, ...] = ()

    @property
    def output(self) -> str:
        """Folder of the cells and the leaderboard."""
        return normalise_uri(self.spec.output)

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The content of a finished cell; None if the cell is not finished.

        Raises:
            DamagedError: its file is damaged.
        """
        uri, storage = self._uri(cell), Storage(self.spec.storage)
        if not storage.exists(uri):
            return None
        try:
            body: dict[str, Any] = json.loads(storage.read(uri))
            if body["digest"] == cell.digest:
                return body
        except (ValueError, KeyError, TypeError):
            raise DamagedError(f"{uri}: is damaged. Remove it to evaluate the cell again.") from None
        raise DamagedError(f"{uri}: belongs to another cell. Remove it to evaluate the cell again.")

    def commit(self, cell: Cell, body: Mapping[str, Any]) -> None:
        """Writes a finished cell."""
        whole = {"format_version": FORMAT_VERSION, "digest": cell.digest, **body}
        text = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False)
        Storage(self.spec.storage).write(self._uri(cell), text.encode())

    def _uri(self, cell: Cell) -> str:
        return join_uri(self.output, "cells", f"{cell.name}.json")


def plan_evaluation(spec: EvaluateSpec) -> Evaluation:
    """Lists the data and the cells, and builds every detector once to check its parameters.

    Raises:
        SpecError, StorageError: the job cannot run as specified.
    """
    images, groups = _data(spec)
    settings = {
        name: value
        for name, value in result_settings(public_spec(spec)).items()
        if name not in ("detectors", "grid", "seeds", "output", "view", "per_category", "auxiliary")
    }
    others = _others(spec)
    cells = []
    for detector, line in _lines(spec):
        for (category, fingerprint), seed in itertools.product(groups.items(), spec.seeds):
            own = {"detector": to_plain(detector), "seed": seed, "category": category, "data": fingerprint}
            cell = Cell(detector, line, category, seed, "")
            view = _view(spec, cell)
            auxiliary = _auxiliary(spec, cell, others)
            cells.append(replace(cell, digest=digest({**settings, **own, **view, **auxiliary})))
    if len({cell.digest for cell in cells}) != len(cells):
        raise SpecError("detectors: two of them are identical, with the same parameters. Keep one.")
    if spec.auxiliary is not None and all(learns_from(cell) == "none" for cell in cells):
        raise SpecError("auxiliary: no detector of the job learns from auxiliary images. Remove it.")
    return Evaluation(spec, tuple(cells), images, others)


def learns_from(cell: Cell) -> Auxiliary:
    """What the detector of a cell learns from besides the images of its category."""
    return auxiliary_kind(build_from(cell.detector, cell.seed))


def _others(spec: EvaluateSpec) -> tuple[Labelled, ...]:
    """Normal training images of all categories of a data set, if a detector needs them and the job names no others."""
    kinds = {auxiliary_kind(build_from(detector, 0)) for detector, _ in _lines(spec)}
    if spec.data is None or spec.auxiliary is not None or "other categories" not in kinds:
        return ()
    images = read_layout(replace(spec.data, categories=()), Storage(spec.storage))
    return tuple(image for image in images if image.split == "train" and image.label == 0)


def _auxiliary(spec: EvaluateSpec, cell: Cell, others: tuple[Labelled, ...]) -> dict[str, Any]:
    """What determines the training of a cell on auxiliary images; empty if there is none.

    Raises:
        SpecError: there are no images of other categories.
    """
    kind = learns_from(cell)
    if kind == "none":
        return {}
    if spec.auxiliary is not None:
        archive = open_archive(spec.auxiliary, Storage(source_storage(spec, spec.auxiliary)))
        settings = result_settings(public_spec(spec))["auxiliary"]
        return {"auxiliary": {"source": settings, "data": archive_fingerprint(archive.shards())}}
    mine = [] if cell.category is None else [image for image in others if image.category != cell.category]
    if not mine:
        raise SpecError(f"auxiliary: {cell.detector.title} learns from {NEEDED[kind]}. Name them there.")
    return {"auxiliary": digest(mine)}


def cell_view(spec: EvaluateSpec, cell: Cell) -> ViewSpec:
    """What the detector of a cell looks at, in pictures of its category."""
    view = view_of_presets(cell.detector.members, spec.view)
    return view if cell.category is None else view.of_category(cell.category)


def _view(spec: EvaluateSpec, cell: Cell) -> dict[str, Any]:
    """The recorded view of a cell, with the pixels of its mask; empty if pictures are stretched."""
    image_size = build_from(cell.detector, cell.seed).params.image_size
    view = view_of(cell_view(spec, cell), image_size, Storage(spec.storage), cell.category).recorded()
    return {"view": view} if view else {}


def _data(spec: EvaluateSpec) -> tuple[tuple[Labelled, ...], dict[str | None, str]]:
    """The images of a layout, and the fingerprint of the data of each category, or of all together under None."""
    if spec.data is not None:
        images = tuple(read_layout(spec.data, Storage(spec.storage)))
        if not spec.per_category:
            return images, {None: digest(list(images))}
        names = sorted({image.category for image in images})
        return images, {name: digest([i for i in images if i.category == name]) for name in names}
    assert spec.archive is not None
    fingerprints = []
    for source in (spec.archive.train, spec.archive.test):
        archive = open_archive(source, Storage(source_storage(spec, source)))
        fingerprints.append(archive_fingerprint(archive.shards()))
    return (), {None: digest(fingerprints)}


def _lines(spec: EvaluateSpec) -> list[tuple[DetectorSpec, str]]:
    """Every detector at every point of the grid, with its name in the leaderboard."""
    found = []
    names = sorted(spec.grid)
    for detector in spec.detectors:
        for point in itertools.product(*(spec.grid[name] for name in names)):
            params = {**detector.params, **dict(zip(names, point, strict=True))}
            variant = detector if detector.ensemble else replace(detector, params=params)
            shown = " ".join(f"{name}={_short(value)}" for name, value in sorted(params.items()))
            preset = "" if detector.preset == STANDARD else f" ({detector.preset})"
            found.append((variant, f"{detector.title}{preset} {shown}".strip()))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(to_plain(value), separators=(",", ":"))
    return str(text).rpartition("/")[2]
