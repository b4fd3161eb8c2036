"""The decoding rules of a fit, which its artifact records."""

from dataclasses import replace

from raydetect.artifacts.record import read_record
from raydetect.config import AT_LEAST_2X, STRETCH, FitSpec, ViewSpec
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.images.preprocess import Preprocess
from raydetect.images.region_masks import region_of_mask
from raydetect.storage import Storage, normalise_uri
from raydetect.views.region import Region
from raydetect.views.view import View


def fit_preprocess(spec: FitSpec) -> Preprocess:
    """Returns the decoding rules of a fit: its detector's input size, its own rule for JPEGs, and its view.

    A fit that extends an artifact decodes as that artifact's images were decoded, whatever the default is.

    Raises:
        SpecError: a parameter is invalid, or the job states another rule than the artifact it extends.
        ArtifactError: that artifact is missing or damaged.
        StorageError: the mask of the region cannot be read.
    """
    image_size = build_from(spec.detector, spec.seed).params.image_size
    if spec.extend is not None:
        return _extended(spec, image_size)
    _require_crop(spec.view, image_size)
    view = View(replace(spec.view, region=None), _region(spec))
    return Preprocess(image_size, spec.preprocess.jpeg_scale or AT_LEAST_2X, view)


def _extended(spec: FitSpec, image_size: tuple[int, int]) -> Preprocess:
    assert spec.extend is not None
    earlier = read_record(normalise_uri(spec.extend), Storage(spec.storage)).preprocess
    stated = spec.preprocess.jpeg_scale
    if stated not in (None, earlier.jpeg_scale):
        raise SpecError(
            f"preprocess.jpeg_scale = {stated}: {spec.extend} was fitted on images decoded with {earlier.jpeg_scale}, "
            "and the new ones must be decoded alike. Remove the setting."
        )
    if spec.view != STRETCH:
        raise SpecError(
            f"view: {spec.extend} has its own, and the new images must be looked at alike. Remove the setting."
        )
    return Preprocess(image_size, earlier.jpeg_scale, earlier.view)


def _require_crop(view: ViewSpec, image_size: tuple[int, int]) -> None:
    if view.crop not in (None, image_size):
        raise SpecError(
            f"view.crop = {list(view.crop or ())}: the detector's image_size is {list(image_size)}, and the crop is "
            "its input. Set detector.params.image_size to the crop."
        )


def _region(spec: FitSpec) -> Region | None:
    region = spec.view.region
    if region is None:
        return None
    if not isinstance(region, str):
        return Region(polygons=region)
    uri = normalise_uri(region)
    return region_of_mask(Storage(spec.storage).read(uri), uri)
