"""The decoding rules of a fit, which its artifact records."""

from dataclasses import replace

from raydetect.artifacts.record import read_record
from raydetect.config import AT_LEAST_2X, STRETCH, FitSpec, TileSpec, ViewSpec
from raydetect.detectors._registry import build_from
from raydetect.errors import MissingError, NotAFileError, SpecError
from raydetect.images.preprocess import Preprocess
from raydetect.images.view_files import alignment_of, region_of_mask
from raydetect.storage import Storage, normalise_uri
from raydetect.views.align import Alignment
from raydetect.views.region import Region
from raydetect.views.view import View


class FitRules:
    """The decoding rules of a fit, for images of each category.

    Attributes:
        common: those of images without a category, and of all images if the categories have the same.
    """

    def __init__(self, spec: FitSpec) -> None:
        """Reads the mask and picture of the view; those of categories are read when an image of the category is met.

        Raises:
            SpecError, ArtifactError, StorageError: see `fit_preprocess`.
        """
        self._spec = spec
        self._of_category: dict[str, Preprocess] = {}
        self.common = fit_preprocess(replace(spec, view=spec.view.without_files_of_category))

    def of(self, category: str | None) -> Preprocess:
        """Returns the rules for images of a category.

        Raises:
            SpecError: the category has no mask or picture to align to, or it cannot be used.
            StorageError: it cannot be read.
        """
        if category is None or not self._spec.view.has_files_of_category:
            return self.common
        if category not in self._of_category:
            view = view_of(
                self._spec.view.of_category(category), self.common.image_size, Storage(self._spec.storage), category
            )
            self._of_category[category] = replace(self.common, view=view)
        return self._of_category[category]


def fit_preprocess(spec: FitSpec) -> Preprocess:
    """Returns the decoding rules of a fit: its detector's input size, its own rule for JPEGs, and its view.

    A fit that extends an artifact decodes as that artifact's images were decoded, whatever the default is.

    Raises:
        SpecError: a parameter is invalid, or the job states another rule than the artifact it extends.
        ArtifactError: that artifact is missing or damaged.
        StorageError: the mask of the region or the picture to align to cannot be read.
    """
    image_size = build_from(spec.detector, spec.seed).params.image_size
    if spec.extend is not None:
        return _extended(spec, image_size)
    view = view_of(spec.view, image_size, Storage(spec.storage))
    return Preprocess(image_size, spec.preprocess.jpeg_scale or AT_LEAST_2X, view)


def view_of(spec: ViewSpec, image_size: tuple[int, int], storage: Storage, category: str | None = None) -> View:
    """Returns the view of a job for inputs of (height, width) px; reads the files that it names.

    Raises:
        SpecError: the crop is not the input, tiles overlap by more than half, or a file is missing or unusable.
        StorageError: a file cannot be read.
    """
    if spec.crop not in (None, image_size):
        raise SpecError(
            f"view.crop = {list(spec.crop or ())}: the detector's image_size is {list(image_size)}, and the crop is "
            "its input. Set detector.params.image_size to the crop."
        )
    settings = replace(spec.settings, tile=None if spec.tile is None else _resolved(spec.tile, image_size))
    return View(settings, _region(spec, storage, category), _alignment(spec, storage, category))


def _resolved(tile: TileSpec, image_size: tuple[int, int]) -> TileSpec:
    """The tile with the px that it overlaps, which the artifact records, whatever later versions do by default.

    Raises:
        SpecError: they are more than half of the tile.
    """
    overlap = tile.overlap_of(tile.size or image_size)
    if overlap > min(tile.size or image_size) // 2:
        raise SpecError(
            f"view.tile.overlap = {overlap}: is more than half of a tile of the detector's "
            f"image_size, {list(image_size)} px. Set it to {min(image_size) // 2} or less."
        )
    return replace(tile, overlap=overlap)


def _extended(spec: FitSpec, image_size: tuple[int, int]) -> Preprocess:
    assert spec.extend is not None
    earlier = read_record(normalise_uri(spec.extend), Storage(spec.storage)).preprocess
    stated = spec.preprocess.jpeg_scale
    if stated not in (None, earlier.jpeg_scale):
        raise SpecError(
            f"preprocess.jpeg_scale = {stated}: {spec.extend} was fitted on images decoded with {earlier.jpeg_scale}, "
            "and the new ones must be decoded alike. Remove the setting."
        )
    if spec.view != STRETCH and view_of(spec.view, image_size, Storage(spec.storage)) != earlier.view:
        raise SpecError(
            f"view: {spec.extend} has another, and the new images must be looked at alike. Remove view, and preset: "
            "paper."
        )
    return Preprocess(image_size, earlier.jpeg_scale, earlier.view)


def _region(spec: ViewSpec, storage: Storage, category: str | None) -> Region | None:
    region = spec.region
    if region is None:
        return None
    if not isinstance(region, str):
        return Region(polygons=region)
    uri = normalise_uri(region)
    return region_of_mask(_read(uri, "view.region: the mask", storage, category), uri)


def _alignment(spec: ViewSpec, storage: Storage, category: str | None) -> Alignment | None:
    if spec.align_to is None:
        return None
    uri = normalise_uri(spec.align_to)
    return alignment_of(_read(uri, "view.align_to: the picture", storage, category), uri, spec)


def _read(uri: str, what: str, storage: Storage, category: str | None) -> bytes:
    of = "" if category is None else f" of category {category!r}"
    try:
        return storage.read(uri)
    except MissingError:
        raise SpecError(f"{what} {uri}{of} does not exist. Add it or correct the URI.") from None
    except NotAFileError:
        raise SpecError(f"{what} {uri}{of} is not a file. Name one.") from None
