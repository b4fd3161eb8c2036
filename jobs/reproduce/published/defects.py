"""MVTec AD with some labelled defects among its training images, for detectors that learn from them."""

import csv
import random
from dataclasses import astuple, fields, replace
from pathlib import Path

from raydetect.archives.dataset_layouts import Labelled, read_layout
from raydetect.config import LabelledSpec
from raydetect.errors import SpecError
from raydetect.storage import Storage

LABELLED = 10  # of each category, as in the general setting of arXiv 2108.00462


def label_defects(data: Path, folder: Path, seed: int) -> Path:
    """Writes a folder of the layout `manifest`: links to the categories, and a manifest in which LABELLED random
    defective test images of each category are training images.

    Args:
        data: folder with the layout of MVTec AD.
        folder: to write; a manifest that is there is replaced by the same one.
        seed: of the draw.

    Raises:
        SpecError: the data has another layout, or a category has no more than LABELLED defective images.
    """
    images = read_layout(LabelledSpec(uri=str(data), layout="mvtec_ad"), Storage())
    for category in sorted({image.category for image in images}):
        defective = [image for image in images if image.category == category and image.label]
        if len(defective) <= LABELLED:
            raise SpecError(
                f"{data / category}: has {len(defective)} defective images; {LABELLED} are learned from and others "
                "are needed to evaluate. Use all of MVTec AD."
            )
        drawn = set(random.Random(f"{seed} {category}").sample(defective, LABELLED))
        images = [replace(image, split="train") if image in drawn else image for image in images]
    folder.mkdir(parents=True, exist_ok=True)
    for category in {image.category for image in images}:
        link = folder / category
        if not link.is_symlink():
            link.symlink_to((data / category).resolve(), target_is_directory=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Labelled))
        rows.writerows(astuple(image) for image in images)
    return folder.resolve()
