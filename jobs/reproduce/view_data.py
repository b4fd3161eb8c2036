"""The data sets on which views are compared, each as a folder with `manifest.csv`; `views.py` runs on them.

Subsets are the first images of the manifests, so that no result has a say in them.
"""

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

from jobs.reproduce.run import Picture, listed

FACTOR, LENGTH = 2, 4  # strips: bottles are enlarged by FACTOR, and LENGTH of them stand side by side
COLUMNS = ("path", "split", "label", "defect", "mask")
Make = Callable[[Path, Path, "Counts"], None]


@dataclass(frozen=True)
class Counts:
    """How many pictures of a data set are used, at most."""

    train: int
    normal: int
    defective: int


def first(pictures: Sequence[Picture], label: int, count: int) -> list[Picture]:
    """The first pictures with a label; of several kinds of defects one each in turn."""
    kinds: dict[str, list[Picture]] = {}
    for picture in pictures:
        if picture.label == label:
            kinds.setdefault(picture.defect, []).append(picture)
    longest = max(map(len, kinds.values()), default=0)
    return [kind[i] for i in range(longest) for _, kind in sorted(kinds.items()) if i < len(kind)][:count]


def chosen(source: Path, counts: Counts) -> list[tuple[str, Picture]]:
    """(split, picture) of the subset."""
    test = listed(source, "test")
    tested = [*first(test, 0, counts.normal), *first(test, 1, counts.defective)]
    return [*(("train", p) for p in listed(source, "train")[: counts.train]), *(("test", p) for p in tested)]


def write_manifest(folder: Path, rows: Sequence[dict[str, str | int]]) -> None:
    """Writes `manifest.csv`."""
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def copied(source: Path, folder: Path, counts: Counts) -> None:
    """The subset as it is; masks that are lists of boxes become pictures with the boxes filled."""
    rows = []
    for number, (split, picture) in enumerate(chosen(source, counts)):
        path = f"{number:04d}{picture.path.suffix}"
        shutil.copy(picture.path, folder / path)
        mask = ""
        if picture.mask is not None:
            mask = f"{number:04d}-mask.png"
            mask_of(picture).save(folder / mask)
        rows.append(row(path, split, picture, mask))
    write_manifest(folder, rows)


def row(path: str, split: str, picture: Picture, mask: str) -> dict[str, str | int]:
    """A line of the manifest."""
    return {"path": path, "split": split, "label": picture.label, "defect": picture.defect, "mask": mask}


def mask_of(picture: Picture) -> Image.Image:
    """The mask of a picture: of a text file with a box (left, upper, right, lower, kind) in each line, the boxes."""
    assert picture.mask is not None
    if picture.mask.suffix != ".txt":
        return Image.open(picture.mask).convert("L")
    mask = Image.new("L", Image.open(picture.path).size)
    for line in picture.mask.read_text().splitlines():
        left, upper, right, lower = map(int, line.split()[:4])
        ImageDraw.Draw(mask).rectangle((left, upper, right - 1, lower - 1), fill=255)
    return mask


def strips(source: Path, folder: Path, counts: Counts) -> None:
    """Strips of LENGTH bottles, enlarged by FACTOR.

    A test strip has one test bottle among normal ones from the end of the training images, which the fit does not see
    and of which none is used twice. The test bottle's place goes round from strip to strip.
    """
    train = listed(source, "train")
    fillers = iter(train[counts.train * LENGTH :])
    rows = []
    for number in range(counts.train):
        parts = train[number * LENGTH : (number + 1) * LENGTH]
        rows.append(row(strip(folder, f"{number:04d}", parts), "train", parts[0], ""))
    tested = [picture for split, picture in chosen(source, counts) if split == "test"]
    for number, picture in enumerate(tested):
        parts = list(islice(fillers, LENGTH - 1))
        if len(parts) < LENGTH - 1:
            raise ValueError(f"{source}: has no normal bottles left for test strip {number}; use fewer")
        place = number % LENGTH
        parts.insert(place, picture)
        path = strip(folder, f"test-{number:04d}", parts)
        rows.append(row(path, "test", picture, placed_mask(folder, number, picture, place)))
    write_manifest(folder, rows)


def strip(folder: Path, name: str, parts: Sequence[Picture]) -> str:
    """Writes pictures side by side, enlarged; returns the file's name."""
    pictures = [enlarged(Image.open(part.path).convert("RGB"), Image.Resampling.BILINEAR) for part in parts]
    side_by_side = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        side_by_side.paste(picture, (i * picture.width, 0))
    side_by_side.save(folder / f"{name}.png", compress_level=1)
    return f"{name}.png"


def placed_mask(folder: Path, number: int, picture: Picture, place: int) -> str:
    """Writes the mask of a strip whose only defective bottle, if any, stands at a place; returns the file's name."""
    if picture.mask is None:
        return ""
    mask = enlarged(mask_of(picture), Image.Resampling.NEAREST)
    whole = Image.new("L", (mask.width * LENGTH, mask.height))
    whole.paste(mask, (place * mask.width, 0))
    whole.save(folder / f"mask-{number:04d}.png")
    return f"mask-{number:04d}.png"


def enlarged(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
    """A picture enlarged by FACTOR."""
    return picture.resize((picture.width * FACTOR, picture.height * FACTOR), resample)
