"""Fits a fleet: images move to the worker that owns their category, and every worker fits its categories on its own.

Or all workers fit one detector on the images of all categories and calibrate it for each (`per_category: calibration`).
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raydetect.artifacts.fleet import member_uri, write_fleet
from raydetect.artifacts.replacement import remove_replaced
from raydetect.artifacts.store import package_versions
from raydetect.blocks.coresets.group import Group
from raydetect.config import public_spec
from raydetect.errors import RaydetectError, SpecError
from raydetect.fitting.fit_run import FitRun
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.reading.counts import ReadFacts
from raydetect.fitting.shared_errors import shared_errors
from raydetect.fitting.timings import Phases
from raydetect.records import FitReport
from raydetect.storage import Storage


def fit_fleet(work: FitRun, read: ReadFacts) -> FitReport | None:
    """Fits one detector for each category and commits the fleet.

    Each member equals the artifact of a job on the images of its category alone.

    Args:
        work: the fit, with the images this worker has read.
        read: facts from reading the source, for the record.

    Returns:
        The report on the first worker, None on the others.

    Raises:
        SpecError: an image has no category, or a category cannot be fitted; the message names it.
    """
    group = work.group
    counts = _categories(work)
    owners = assign_categories(counts, group.size)

    def mine(image: CachedImage) -> bool:
        return owners.get(image.category or "") == group.rank

    with work.phases.phase("share"):
        for cache in (work.cache, work.calibration_cache):
            if cache is not None:
                cache.share(group, mine)
    reports: dict[str, FitReport] = {}
    with work.phases.phase("fit"), shared_errors(group):
        for category in sorted(name for name, owner in owners.items() if owner == group.rank):
            reports[category] = _fit_category(work, category)
            work.on_progress("fit categories", 1, len(owners))
    return _commit(work, reports, read)


def fit_shared(work: FitRun, read: ReadFacts) -> FitReport | None:
    """Fits one detector on all images, calibrates it for each category and commits the fleet that shares it.

    Images are held out, or dealt to the folds of cross-validation, within each category.

    Args:
        work: the fit, with the images this worker has read.
        read: facts from reading the source, for the record.

    Returns:
        The report on the first worker, None on the others.

    Raises:
        SpecError: an image has no category, or a category has too few normal images; the message names it.
    """
    names = sorted(_categories(work))
    lacking = sorted(set(names) - set(_counted(work, work.cache, normal=True)[0]))
    if lacking:
        raise SpecError(
            f"{work.where}: category {lacking[0]!r} has no usable normal image to fit on. Add some, or leave it out."
        )
    return replace(work, categories=tuple(names)).run(read)


def assign_categories(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """Assigns categories to workers: the largest first, each to the worker with the fewest images so far."""
    load = [0] * size
    owners = {}
    for category, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        owners[category] = load.index(min(load))
        load[owners[category]] += count
    return owners


def _categories(work: FitRun) -> dict[str, int]:
    """Number of inputs of every category on all workers.

    Raises:
        SpecError: an image has no category, or a category has no image to calibrate on.
    """
    total, missing = _counted(work, work.cache)
    if missing:
        raise SpecError(
            f"{work.where}: {missing} image(s) have no category, and per_category fits or calibrates a detector for "
            "each. Add {category} to source.pattern."
        )
    if work.calibration_cache is not None:
        judged, missing = _counted(work, work.calibration_cache, normal=True)
        lacking = sorted(set(total) - set(judged))
        if lacking:
            without = f"; {missing} image(s) there have no category" if missing else ""
            raise SpecError(
                f"calibration.source: has no usable normal image of category {lacking[0]!r}, so that its detector "
                f"could not be calibrated{without}. Add normal images of it, and {{category}} to "
                "calibration.source.pattern."
            )
    return total


def _counted(work: FitRun, cache: ImageCache, normal: bool = False) -> tuple[dict[str, int], int]:
    """Number of inputs by category on all workers, or of normal ones, and of those without one."""
    here = Counter(image.category for image in cache.images.values() if not (normal and image.label == 1))
    uncategorised = here.pop(None, 0)
    gathered = [json.loads(text) for text in work.group.gather_bytes(json.dumps([uncategorised, here]).encode())]
    total: Counter[str] = Counter()
    for _, counts in gathered:
        total.update(counts)
    return dict(total), sum(count for count, _ in gathered)


def _fit_category(work: FitRun, category: str) -> FitReport:
    assert work.uri is not None
    alone = replace(
        work,
        uri=member_uri(work.uri, category),
        group=Group(),
        cache=work.cache.of_category(category),
        calibration_cache=None if work.calibration_cache is None else work.calibration_cache.of_category(category),
        phases=Phases(),
        on_progress=lambda *_: None,
    )
    try:
        report = alone.run(ReadFacts())
    except RaydetectError as error:
        raise type(error)(f"category {category!r}: {error}") from None
    assert report is not None
    return report


def _commit(work: FitRun, reports: Mapping[str, FitReport], read: ReadFacts) -> FitReport | None:
    here = {name: [report.digest, report.facts["images"], report.facts["weights"]] for name, report in reports.items()}
    texts = work.group.gather_bytes(json.dumps(here).encode())
    measured = work.phases.over(work.group)
    if work.group.rank:
        return None
    assert work.uri is not None
    found = {name: entry for text in texts for name, entry in json.loads(text).items()}
    images: Counter[str] = Counter()
    for _, counts, _ in found.values():
        images.update(counts)
    facts: dict[str, Any] = {
        "spec": public_spec(work.spec),
        "packages": package_versions(),
        "weights": next(weights for _, _, weights in found.values()),
        "images": {**images, "bad": read.bad},
        **read.plain(),
        "workers": work.group.size,
        **measured,
    }
    storage = Storage(work.spec.storage)
    digest = write_fleet(work.uri, storage, {name: e[0] for name, e in found.items()}, facts)
    remove_replaced(work.uri, storage)
    return FitReport(work.uri, digest, {**facts, "categories": len(found)})
