"""Pictures of rows: images from the archive and heatmaps from the results directory."""

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from raydetect.config import StorageOptions, ViewSpec
from raydetect.errors import MemberError, RaydetectError, SpecError, StorageError
from raydetect.images.decode import decode_image
from raydetect.images.opening import DecodeRules
from raydetect.records import PART_FILE
from raydetect.sinks.heatmaps import overlay_png, read_map_png, read_png
from raydetect.sinks.ledger import Ledger, repair_hint
from raydetect.storage import Storage, check_uri, join_uri, translate
from raydetect.views.align import shift_in
from raydetect.views.placement import of_whole, whole_size
from raydetect.views.view import Layout, View

MAX_HEATMAP_BYTES = 256 << 20
CONTAINERS = ("tar", "zip", "parquetrow", "member", "tarzst")
STORED = re.compile(r"zip://((?:\d{4,}-)?\d{6,}(?:\.\d{3})?\.png)::.*/(heatmaps/[^:]*\.zip)")


@dataclass(frozen=True, slots=True)
class MapScale:
    """The scores that 0 and 65535 stand for in a heatmap of style `map`."""

    low: float
    high: float


@dataclass(slots=True)
class Pictures:
    """Opens the files that rows point to. Keeps the last container open, so query rows container by container.

    Attributes:
        ledger: ledger of the results directory; heatmaps are read from there even if it was moved.
        run: its `run.json`.
        storage: storage of the archive.
        allows: whether the file at a URI may be read, as rows may contain any URI.
    """

    ledger: Ledger
    run: Mapping[str, Any]
    storage: Storage
    allows: Callable[[str], bool] = lambda uri: True
    _container: str = ""
    _opened: Any = None
    _maps: dict[str, MapScale] = field(default_factory=dict)

    def encoded(self, image_uri: str) -> bytes:
        """Reads the encoded bytes of an image from an fsspec URL with one of raydetect's schemes.

        Raises:
            StorageError, SpecError: it cannot be read, is not allowed, or has another scheme.
        """
        inner, chained, container = image_uri.partition("::")
        limit = int(self.run["spec"]["source"]["max_image_bytes"])
        if not self.allows(container if chained else image_uri):
            raise StorageError(f"{image_uri}: reading images from there is not allowed.")
        if not chained:
            return self.storage.read(image_uri)
        scheme, _, member = inner.partition("://")
        if scheme not in CONTAINERS:
            raise SpecError(f"{image_uri}: unknown container {scheme!r}. Known: {', '.join(CONTAINERS)}.")
        check_uri(container)
        try:
            with self._archive(scheme, container).open(member, "rb") as handle:
                data: bytes = handle.read(limit + 1)
        except RaydetectError:
            raise
        except Exception as error:
            raise translate(image_uri, "read", error) from error
        if len(data) > limit:
            raise StorageError(f"{image_uri}: has more than source.max_image_bytes = {limit:,} bytes.")
        return data

    def decoded(self, data: bytes, longest_px: int | None = None) -> Image.Image:
        """Decodes an image of the run at its original size, or no longer than `longest_px`, with the run's settings.

        Raises:
            MemberError: it cannot be decoded.
        """
        source = self.run["spec"]["source"]
        rules = DecodeRules(int(source["max_pixels"]), source["exif_orientation"] == "apply")
        return decode_image(data, rules, longest_px, _view(self.run))

    def heatmap(self, row: Mapping[str, Any]) -> bytes | None:
        """The stored heatmap PNG of a row; None if it has none.

        Raises:
            StorageError: it is missing or damaged.
        """
        return self._stored(row["heatmap_uri"]) if row["heatmap_uri"] else None

    def close_ups(self, row: Mapping[str, Any], limit: int) -> list[Image.Image]:
        """The stored close-ups of a row's first regions, at most `limit`.

        Raises:
            StorageError: one is missing or damaged.
        """
        return [_png(self._stored(uri)) for uri in (row["close_up_uris"] or ())[:limit]]

    def _stored(self, uri: str) -> bytes:
        """Reads a PNG of a zip in the results directory."""
        match = STORED.fullmatch(uri)
        if match is None or not re.fullmatch(PART_FILE, match.group(2)):
            raise StorageError(f"{uri!r}: is not a heatmap of a results directory.")
        path = join_uri(self.ledger.uri, match.group(2))
        try:
            with self.ledger.storage.open(path) as handle, zipfile.ZipFile(handle) as archive:
                if archive.getinfo(match.group(1)).file_size > MAX_HEATMAP_BYTES:
                    raise zipfile.BadZipFile("a heatmap that is too large")
                return archive.read(match.group(1))
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise StorageError(f"{path}: contains no {match.group(1)} ({type(error).__name__}).") from None

    def anomaly_map(self, row: Mapping[str, Any]) -> np.ndarray | None:
        """The stored anomaly map of a row, (H, W) float32; None if it has none.

        Raises:
            StorageError: it is missing or damaged, or the run stored overlays.
        """
        if heatmap_style(self.run) != "map":
            raise StorageError(f"{self.ledger.uri}: stores overlays, not anomaly maps. Score with sink.style: map.")
        data = self.heatmap(row)
        if data is None:
            return None
        scale = map_scale(self.run, row["category"])
        return read_map_png(data, scale.low, scale.high)

    def located(self, row: Mapping[str, Any], whole_HW: np.ndarray) -> tuple[np.ndarray, Layout]:
        """The part of a stored anomaly map that the detector gave, (H, W) float32, and where it lies in the picture.

        Its canvas is reduced where the whole would be too large (`views/placement.py`).

        Args:
            row: the row.
            whole_HW: its stored map, which covers the whole picture.

        Raises:
            StorageError: the map has another size than the detector's.
        """
        size = (whole_HW.shape[0], whole_HW.shape[1])
        entry = dict(_of_category(self.run.get("view", {}), row["category"]))
        image_size = entry.pop("image_size", size)  # runs of older versions state no view: maps cover the picture
        layout = View.of_record(entry).layout((row["width"], row["height"]), (image_size[0], image_size[1]))
        layout = layout.moved(shift_in(row["note"] or ""))
        expected = whole_size(layout)
        if expected != size:
            raise StorageError(
                f"{row['heatmap_uri']}: has {size[1]} x {size[0]} px instead of {expected[1]} x {expected[0]}. "
                f"{repair_hint(self.ledger.uri)}"
            )
        return of_whole(whole_HW, layout)

    def overlay(self, row: Mapping[str, Any], image: Image.Image | None) -> Image.Image | None:
        """The image with its heatmap overlaid; None if no heatmap is stored, or only a map without its image.

        Raises:
            StorageError: the heatmap is missing or damaged.
        """
        if heatmap_style(self.run) == "overlay":
            data = self.heatmap(row)
        else:
            map_HW = self.anomaly_map(row) if image is not None else None
            scale = map_scale(self.run, row["category"])
            data = None
            if map_HW is not None and image is not None:
                inner_HW, layout = self.located(row, map_HW)
                data = overlay_png(np.asarray(image), inner_HW, scale.low, scale.high, layout.box_on(image.size))
        return None if data is None else _png(data)

    def _archive(self, scheme: str, container: str) -> Any:
        name = f"{scheme}::{container}"
        if self._container != name:
            protocol = container.partition("://")[0]
            options = self.storage.fsspec_options(container)
            self._opened = fsspec.core.url_to_fs(f"{scheme}://x::{container}", **{protocol: options})[0]
            self._container = name
        return self._opened


def _view(run: Mapping[str, Any]) -> ViewSpec | None:
    """The bands and range that the run looked at; None if every picture has its colours."""
    shown = run.get("rasters")
    if shown is None:
        return None
    bands, values = shown.get("bands"), shown.get("range")
    return ViewSpec(bands=None if bands is None else tuple(bands), range=None if values is None else tuple(values))


def heatmap_style(run: Mapping[str, Any]) -> str:
    """The heatmap style of a run: `overlay` or `map`."""
    return str(run["spec"]["sink"]["style"])


def map_scale(run: Mapping[str, Any], category: str | None) -> MapScale:
    """The heatmap scale of a category."""
    entry = _of_category(run["heatmap_scale"], category)
    return MapScale(float(entry["low"]), float(entry["high"]))


def region_threshold(run: Mapping[str, Any], category: str | None) -> float | None:
    """The lowest anomaly map value of the regions of a category; None if rows have no regions."""
    value = _of_category(run.get("region_threshold", {}), category).get("value")
    return None if value is None else float(value)


def _of_category(entry: Mapping[str, Any], category: str | None) -> Mapping[str, Any]:
    """What an entry of `run.json` says about a category; for a run without a fleet, the entry itself."""
    found: Mapping[str, Any] = entry.get("categories", {}).get(category, entry)
    return found


@dataclass(frozen=True, slots=True)
class Reach:
    """Storages of a run's inputs.

    Attributes:
        source: storage of the archive.
        models: storage of the artifact.
    """

    source: Storage
    models: Storage


def reach_of(run: Mapping[str, Any]) -> Reach:
    """Storages from the public settings of the run's job; credentials come from the environment."""
    spec = run["spec"]
    return Reach(_public(spec["source"].get("storage") or spec.get("storage")), _public(spec.get("storage")))


def _public(options: Mapping[str, Any] | None) -> Storage:
    known = StorageOptions().public()
    return Storage(StorageOptions(**{name: (options or {}).get(name, default) for name, default in known.items()}))


def missing_reason(error: MemberError | RaydetectError) -> str:
    """A short reason for a missing picture."""
    return str(error)[:200]


def _png(data: bytes) -> Image.Image:
    picture = read_png(data)
    return picture.convert("RGB") if picture.mode != "RGB" else picture
