"""A small fleet of three categories with different detectors and image sizes, and an archive that mixes them."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from raydetect.artifacts.fleet import member_uri, write_fleet
from raydetect.config import FitSpec, parse_job
from raydetect.local import jobs
from raydetect.storage import Storage, join_uri
from tests.builders.archives import pack, tar_bytes
from tests.builders.images import DEFECTS, defect_image, encode, normal_image
from tests.contracts.cases import CASES

NUTS, BOLTS, RINGS = "Hex nuts/M4", "bolts", "../rings"  # two of them are not valid folder names
CATEGORIES = (NUTS, BOLTS, RINGS)
NORMAL = {NUTS: 20, BOLTS: 20, RINGS: 15}  # 8, 8 and 6 of them are held out
SIZE_PX = {NUTS: 64, BOLTS: 48, RINGS: 64}
DETECTOR = {NUTS: "patchcore", BOLTS: "stfpm", RINGS: "patchcore"}
PARAMS = {case.name: case.params for case in CASES}


def picture(category: str, number: int, defect: str = "") -> bytes:
    """An encoded image with the colours of its category."""
    image = defect_image(number, defect)[0] if defect else normal_image(number)
    return encode(np.roll(image, CATEGORIES.index(category), axis=-1))


def fit_category(root: str, category: str, seed: int = 0) -> str:
    """Fits one category with an ordinary job into `root/fleet` and returns the digest."""
    uri = f"{root}/normal-{CATEGORIES.index(category)}"
    pack(uri, "", [(f"{i:03d}.png", picture(category, i)) for i in range(NORMAL[category])], 1)
    short = {"epochs": 2} if DETECTOR[category] == "stfpm" else {}
    params = {**PARAMS[DETECTOR[category]], **short, "image_size": [SIZE_PX[category]] * 2}
    values = {
        "kind": "fit",
        "source": {"uri": uri},
        "detector": {"name": DETECTOR[category], "params": params},
        "artifact": member_uri(f"{root}/fleet", category),
        "seed": seed,
        "calibration": {"holdout_ratio": 0.4},
        "resources": {"cpus_per_worker": 1},
    }
    spec = parse_job(values, category)
    assert isinstance(spec, FitSpec)
    return jobs.fit(spec, lambda *_: None).digest


def fit_fleet(root: str) -> dict[str, str]:
    """Fits all categories, commits the fleet `root/fleet`, and returns the members' digests."""
    members = {category: fit_category(root, category) for category in CATEGORIES}
    write_fleet(f"{root}/fleet", Storage(), members, {"packages": {"raydetect": "test"}})
    return members


def sample(number: int, data: bytes, **fields: Any) -> list[tuple[str, bytes]]:
    """An image and its sidecar."""
    return [(f"{number:03d}.png", data), (f"{number:03d}.json", json.dumps(fields).encode())]


def mixed_samples(category: str, numbers: Sequence[int]) -> dict[int, list[tuple[str, bytes]]]:
    """Samples of a category by number; every second one has a defect."""
    found = {}
    for i in numbers:
        defect = DEFECTS[i % len(DEFECTS)] if i % 2 else ""
        data = picture(category, 70_000 + i, defect)
        found[i] = sample(i, data, category=category, label=i % 2, defect=defect or "good")
    return found


def write_mixed(root: str, shards: int = 2, per_category: int = 5) -> None:
    """Writes `root/mixed/` with tars of images from all categories, and `root/only-N/` with only category N."""
    storage = Storage()
    for shard in range(shards):
        mixed: dict[int, list[tuple[str, bytes]]] = {}
        for turn, category in enumerate(CATEGORIES):
            first = 100 * shard + turn
            samples = mixed_samples(category, range(first, first + 3 * per_category, 3))
            mixed |= samples
            storage.write(join_uri(root, f"only-{turn}", f"{shard}.tar"), tar_bytes(flat(samples)))
        storage.write(join_uri(root, "mixed", f"{shard}.tar"), tar_bytes(flat(mixed)))


def flat(samples: dict[int, list[tuple[str, bytes]]]) -> list[tuple[str, bytes]]:
    """The files of all samples, in order of their numbers."""
    return [file for number in sorted(samples) for file in samples[number]]
