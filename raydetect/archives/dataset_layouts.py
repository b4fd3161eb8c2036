"""Labelled data sets of loose images in the layouts of their authors: which image has which label, split and mask.

Reads listings and one CSV file, no image. A mask is looked up among the files that are there, by the image's name: its
suffix may differ, and `_mask` may follow the name.
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
MVTEC2_SPLITS = {"train": "train", "test_public": "test"}  # validation, and the tests without labels, are left out


@dataclass(frozen=True, slots=True)
class Labelled:
    """One image: its path below the folder, and what the layout says of it. `mask` is None when there is none."""

    path: str
    category: str
    split: str
    label: int
    defect: str
    mask: str | None


@dataclass(frozen=True, slots=True)
class _Files:
    """Paths of all images below the folder, and of masks by folder and name."""

    paths: list[str]
    masks: dict[tuple[str, str], str]


def read_layout(data: LabelledSpec, storage: Storage) -> list[Labelled]:
    """All images of a data set that are to be fitted or judged, in order of paths.

    Raises:
        SpecError: the folder is not laid out so, a category is not there, or a CSV file is damaged.
        StorageError: it cannot be read.
    """
    root = normalise_uri(data.uri)
    found = list(READERS[data.layout](root, data, storage))
    known = sorted({item.category for item in found})
    missing = sorted(set(data.categories) - set(known))
    if missing:
        raise SpecError(f"data.categories: {missing[0]!r} is not in {root}. There are: {', '.join(known) or 'none'}.")
    wanted = [item for item in found if not data.categories or item.category in data.categories]
    for split in ("train", "test"):
        if not any(item.split == split for item in wanted):
            raise SpecError(f"{root}: holds no {split} image in the layout {data.layout}. Check data.uri and layout.")
    return sorted(wanted, key=lambda item: item.path)


def _listed(root: str, storage: Storage) -> _Files:
    paths = [relative_to(file.uri, root) for file in storage.list(root)]
    images = [path for path in paths if is_image_name(path)]
    masks = {(posixpath.dirname(path), posixpath.splitext(posixpath.basename(path))[0]): path for path in images}
    return _Files(images, masks)


def _mask(files: _Files, folder: str, path: str) -> str | None:
    stem = posixpath.splitext(posixpath.basename(path))[0]
    return files.masks.get((folder, f"{stem}_mask")) or files.masks.get((folder, stem))


def _mvtec_ad(root: str, data: LabelledSpec, storage: Storage) -> Iterator[Labelled]:
    """`<category>/{train,test}/<defect>/...`, masks in `<category>/ground_truth/<defect>/`; BTAD says `ok` and `ko`."""
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
    """The split CSV: object, split, label (normal or anomaly), image, mask."""
    for row in _rows(join_uri(root, data.split_csv), ("object", "split", "label", "image"), storage):
        label = int(row["label"] != "normal")
        yield Labelled(
            _inside(row["image"], root), row["object"], row["split"], label, row["label"], row.get("mask") or None
        )


def _manifest(root: str, data: LabelledSpec, storage: Storage) -> Iterator[Labelled]:
    """`manifest.csv`: path, split, label (0 or 1), and if there are any defect, mask and category."""
    place = join_uri(root, "manifest.csv")
    for number, row in enumerate(_rows(place, ("path", "split", "label"), storage), start=2):
        if row["label"] not in ("0", "1"):
            raise SpecError(f"{place}: line {number} has the label {row['label']!r}. Write 0 (normal) or 1.")
        label = int(row["label"])
        defect = row.get("defect") or ("anomalous" if label else "good")
        mask = row.get("mask") or None
        path = _inside(row["path"], root)
        yield Labelled(path, row.get("category") or "", row["split"], label, defect, mask and _inside(mask, root))


def _rows(place: str, needed: tuple[str, ...], storage: Storage) -> Iterator[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(storage.read(place).decode("utf-8-sig")))
    except UnicodeDecodeError:
        raise SpecError(f"{place}: is no UTF-8 text. Write it again as CSV.") from None
    lacking = [name for name in needed if name not in (reader.fieldnames or [])]
    if lacking:
        raise SpecError(f"{place}: has no column {lacking[0]!r}. It needs {', '.join(needed)} in its first line.")
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
