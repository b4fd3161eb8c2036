"""What detectors learn from besides the images of a job's source: sources for `auxiliary`."""

from typing import Any

from raydetect.detectors._base import Auxiliary
from raydetect.detectors._registry import detector_class
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, pack
from tests.builders.images import SIZE_PX, encode, normal_image

PATTERN = "{category}/train/{defect}/{name}.png"
MASKED = {
    "pattern": "{category}/test/{defect}/{name}.png",
    "mask_pattern": "{category}/ground_truth/{defect}/{name}_mask.png",
}


def other_files(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Normal images of two other parts, as `gadget/train/good/0001.png` and `gizmo/train/good/0001.png`."""
    files = []
    for i in range(start, start + count):
        image = normal_image(70_000 + i, SIZE_PX)
        files.append((f"gadget/train/good/{i:04d}.png", encode(255 - image[..., ::-1])))
        files.append((f"gizmo/train/good/{i:04d}.png", encode(image.transpose(1, 0, 2)[::2, ::2])))
    return files


def auxiliary_of(*names: str, folder: str, count: int = 6, storage: Storage | None = None) -> dict[str, Any]:
    """Writes what detectors learn from, and returns the entry `auxiliary` of their fit job; {} if they need none.

    Args:
        names: of the detectors of one job, which learn from at most one kind of images.
        folder: where it is written.
        count: images of each category, or normal images.
        storage: of the folder; None = memory and disk.
    """
    kinds: set[Auxiliary] = {detector_class(name).info.auxiliary for name in names} - {"none"}
    if not kinds:
        return {}
    (kind,) = kinds
    if kind == "other categories":
        pack(folder, ".tar", other_files(count), 2, storage)
        return {"auxiliary": {"uri": folder, "pattern": PATTERN}}
    pack(folder, "", mixed_files(count, -(-count // 3)), 1, storage)
    return {"auxiliary": {"uri": folder, **MASKED}}
