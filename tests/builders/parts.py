"""Writes the images of the tutorial: `python -m tests.builders.parts FOLDER`.

A folder of good parts, and a tar for each of four nights, of which the last has defective parts.
"""

import sys
from pathlib import Path

from raydetect.storage import Storage, join_uri, normalise_uri
from tests.builders.archives import tar_bytes
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

GOOD, PER_NIGHT, DEFECTIVE = 120, 60, 12
NIGHTS = ("2026-11-25", "2026-11-26", "2026-11-27", "2026-11-28")


def night(number: int) -> list[tuple[str, bytes]]:
    """Names and bytes of a night's images."""
    defective = DEFECTIVE if number == len(NIGHTS) - 1 else 0
    images = [normal_image(1_000 * (number + 1) + i) for i in range(PER_NIGHT - defective)]
    images += [defect_image(i, DEFECTS[i % len(DEFECTS)])[0] for i in range(defective)]
    return [(f"{i:04d}.png", encode(image)) for i, image in enumerate(images)]


def main(folder: str) -> None:
    """Writes the images and prints where they are."""
    root, storage = normalise_uri(folder), Storage()
    for i in range(GOOD):
        storage.write(join_uri(root, f"good/{i:04d}.png"), encode(normal_image(i)))
    for number, name in enumerate(NIGHTS):
        storage.write(join_uri(root, f"nights/{name}.tar"), tar_bytes(night(number)))
    print(f"Wrote {GOOD} good images to {Path(folder) / 'good'} and {len(NIGHTS)} nights to {Path(folder) / 'nights'}")


if __name__ == "__main__":
    main(sys.argv[1])
