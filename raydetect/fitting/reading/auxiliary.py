"""Auxiliary images: what a detector learns from instead of the images it will score (`auxiliary` of a fit job)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from raydetect.blocks.coresets.group import Group
from raydetect.config import FitSpec
from raydetect.detectors._base import Auxiliary, Detector
from raydetect.detectors._ensemble import parts
from raydetect.errors import SpecError
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.counts import ReadFacts

NEEDED: dict[Auxiliary, str] = {
    "other categories": "normal images of other categories, with {category} in auxiliary.pattern",
    "labelled masks": "normal and anomalous images of another data set, with masks of the defects "
    "(auxiliary.mask_pattern, a sidecar or a mask column)",
}


@dataclass(frozen=True, slots=True)
class AuxiliaryImages:
    """The auxiliary images of a fit on this worker.

    Attributes:
        cache: the images, with masks if the detector learns from them.
        read: facts from reading them.
    """

    cache: ImageCache
    read: ReadFacts

    def facts(self, keys: Iterable[str]) -> dict[str, Any]:
        """The entry of the artifact's record for those that were trained on; call when every worker has all."""
        images = [self.cache.images[key] for key in keys]
        categories = sorted({image.category for image in images if image.category is not None})
        return {"images": len({image.image_key for image in images}), "categories": categories, "bad": self.read.bad}


def auxiliary_kind(detector: Detector) -> Auxiliary:
    """What the detector, or a member of an ensemble, learns from besides the source.

    Raises:
        SpecError: members of an ensemble need different ones.
    """
    kinds: set[Auxiliary] = {part.info.auxiliary for _, part in parts(detector)} - {"none"}
    if len(kinds) > 1:
        raise SpecError(
            f"detector.ensemble: members learn from different auxiliary images ({' and '.join(sorted(kinds))}), and a "
            "fit reads one source of them. Fit them one by one."
        )
    return kinds.pop() if kinds else "none"


def require_auxiliary(spec: FitSpec, detector: Detector) -> None:
    """Checks that the job names auxiliary images if and only if the detector learns from some.

    Raises:
        SpecError: it does not.
    """
    kind, title = auxiliary_kind(detector), spec.detector.title
    if kind == "none" and spec.auxiliary is not None:
        raise SpecError(f"auxiliary: {title} learns from the images of source alone. Remove it.")
    if kind == "none" or spec.extend is not None:
        return
    if spec.auxiliary is None:
        raise SpecError(
            f"auxiliary: {title} learns from {NEEDED[kind]}. Name them there; source has what it will score."
        )
    if kind == "labelled masks" and spec.view.tile is not None:
        raise SpecError(
            f"view.tile: {title} learns from masks of whole pictures. Remove tile, or raise detector.params.image_size."
        )


def auxiliary_keys(spec: FitSpec, kind: Auxiliary, cache: ImageCache, group: Group) -> list[str]:
    """The images to train on of all workers, sorted; the same on every worker.

    Raises:
        SpecError: they lack a category, or none is anomalous although the detector learns from masks.
    """
    assert spec.auxiliary is not None
    chosen = [image for image in cache.images.values() if kind != "other categories" or image.label != 1]
    here = {
        "keys": [image.key for image in chosen],
        "bare": sum(image.category is None for image in chosen),
        "anomalous": sum(image.label == 1 for image in chosen),
    }
    found = [json.loads(text) for text in group.gather_bytes(json.dumps(here).encode())]
    bare, anomalous = (sum(one[name] for one in found) for name in ("bare", "anomalous"))
    where = f"auxiliary {', '.join(spec.auxiliary.uris())}"
    if kind == "other categories" and bare:
        raise SpecError(f"{where}: {bare:,} image(s) have no category. Add {{category}} to auxiliary.pattern.")
    if kind == "labelled masks" and not anomalous:
        raise SpecError(
            f"{where}: no image is labelled anomalous. Label them by {{defect}} or {{label}} in auxiliary.pattern, a "
            "sidecar or a label column."
        )
    return sorted(key for one in found for key in one["keys"])
