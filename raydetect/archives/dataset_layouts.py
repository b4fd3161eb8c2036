"""Reads label, split and mask of every image of labelled data sets in their published layouts.

Reads listings and at most one CSV file, but no images. A mask has the image's name, with any suffix, and optionally
`_mask` after the name.
"""

import csv
import io
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raydetect.archives.base import is_image_name, safe_name
from raydetect.config import LabelledSpec
from raydetect.errors import MemberError, SpecError
from raydetect.storage import Storage, join_uri, normalise_uri, relative_to

NORMAL_FOLDERS = ("good", "ok")
MVTEC2_SPLITS = {"train": "train", "test_public": "test"}  # not validation and the unlabelled test sets


@dataclass(frozen=True, slots=True)
class Labelled:
    """One image: its path relative to the folder, and its description by the layout; `mask` is None without a mask."""

    path: str
    category: str
    split: str
    label: int
    defect: str
    mask: str | None


@dataclass(frozen=True, slots=True)
class _Files:
    """Paths of all images below the folder, and of masks by (folder, name without suffix)."""

    paths: list[str]
    masks: dict[tuple[str, str], str]


def read_layout(data: LabelledSpec, storage: Storage) -> list[Labelled]:
    """Lists all images of a data set for fitting and evaluation, sorted by path.

    Raises:
        SpecError: the folder has another layout, a category is missing, or a CSV file is damaged.
        StorageError: the folder or a CSV file cannot be read.
    """
    root = normalise_uri(data.uri)
    images = list(READERS[data.layout](root, data, storage))
    known = sorted({image.category for image in images})
    missing = sorted(set(data.categories) - set(known))
    if missing:
        raise SpecError(f"data.categories: {missing[0]!r} is not in {root}. Available: {', '.join(known) or 'none'}.")
    wanted = [image for image in images if not data.categories or image.category in data.categories]
    for split in ("train", "test"):
        if not any(image.split == split for image in wanted):
            raise SpecError(
                f"{root}: contains no {split} images in layout {data.layout}. Check data.uri and data.layout."
            )
    return sorted(wanted, key=lambda image: image.path)


def _listed(root: str, storage: Storage) -> _Files:
    paths = [relative_to(file.uri, root) for file in storage.list(root)]
    images = [path for path in paths if is_image_name(path)]
    masks = {(posixpath.dirname(path), posixpath.splitext(posixpath.basename(path))[0]): path for path in images}
    return _Files(images, masks)


def _mask(files: _Files, folder: str, path: str) -> str | None:
    stem = posixpath.splitext(posixpath.basename(path))[0]
    return files.masks.get((folder, f"{stem}_mask")) or files.masks.get((folder, stem))


def _mvtec_ad(root: str, data: LabelledSpec, storage: Storage) -> Iterator[Labelled]:
    """`<category>/{train,test}/<defect>/...`, masks in `<category>/ground_truth/<defect>/`; BTAD has `ok` and `ko`."""
    files = _listed(root, storage)
    for path in files.paths:
        parts = path.split("/")
        if len(parts) == 4 and parts[1] in ("train", "test"):
            category, split, defect, _ = parts
            label = int(defect.lower() not in NORMAL_FOLDERS)
            mask = _mask(files, f"{category}/ground_truth/{defect}", path) if label else None
            yield Labelled(path, category, split, label, defect, mask)


def _mvtec_ad2(root: str, data: LabelledSpec, storage: Storage) -> Iterator[Labelled]:
    """`<category>/{train,test_public}/{good,bad}/...`, masks in `test_public/ground_truth/bad/`."""
    files = _listed(root, storage)
    for path in files.paths:
        parts = path.split("/")
        if len(parts) >= 4 and parts[-3] in MVTEC2_SPLITS and parts[-2] in ("good", "bad"):
            label = int(parts[-2] == "bad")
            folder = "/".join([*parts[:-2], "ground_truth", "bad"])
            mask = _mask(files, folder, path) if label else None
            yield Labelled(path, parts[0], MVTEC2_SPLITS[parts[-3]], label, parts[-2], mask)


def _visa(root: str, data: LabelledSpec, storage: Storage) -> Iterator[Labelled]:
    """The CSV file `split_csv`: object, split, label (normal or anomaly), image, mask."""
    for row in _rows(join_uri(root, data.split_csv), ("object", "split", "label", "image"), storage):
        label = int(row["label"] != "normal")
        yield Labelled(
            _inside(row["image"], root), row["object"], row["split"], label, row["label"], row.get("mask") or None
        )


def _manifest(root: str, data: LabelledSpec, storage: Storage) -> Iterator[Labelled]:
    """`manifest.csv`: path, split, label (0 or 1); optionally defect, mask and category."""
    uri = join_uri(root, "manifest.csv")
    for number, row in enumerate(_rows(uri, ("path", "split", "label"), storage), start=2):
        if row["label"] not in ("0", "1"):
            raise SpecError(f"{uri}: line {number} has the label {row['label']!r}. Write 0 (normal) or 1.")
        label = int(row["label"])
        defect = row.get("defect") or ("anomalous" if label else "good")
        mask = row.get("mask") or None
        path = _inside(row["path"], root)
        yield Labelled(path, row.get("category") or "", row["split"], label, defect, mask and _inside(mask, root))


def _rows(uri: str, needed: tuple[str, ...], storage: Storage) -> Iterator[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(storage.read(uri).decode("utf-8-sig")))
    except UnicodeDecodeError:
        raise SpecError(f"{uri}: is not UTF-8 text. Save it as CSV in UTF-8.") from None
    missing = [name for name in needed if name not in (reader.fieldnames or [])]
    if missing:
        raise SpecError(f"{uri}: has no column {missing[0]!r}. The first line needs {', '.join(needed)}.")
    for row in reader:
        yield {name: value.strip() for name, value in row.items() if isinstance(value, str)}


def _inside(path: str, root: str) -> str:
    try:
        return safe_name(path)
    except MemberError as error:
        raise SpecError(f"{root}: {error}") from None


READERS: dict[str, Callable[[str, LabelledSpec, Storage], Iterator[Labelled]]] = {
    "mvtec_ad": _mvtec_ad,
    "mvtec_ad2": _mvtec_ad2,
    "visa": _visa,
    "btad": _mvtec_ad,
    "manifest": _manifest,
}
