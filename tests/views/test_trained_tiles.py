"""A training in tiles on one worker and on two processes: the same images, the same record, losses to rounding."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from raydetect.archives.base import chunk_members
from raydetect.archives.open import open_archive
from raydetect.artifacts.record import read_record
from raydetect.blocks.coresets.group import Group, TorchGroup
from raydetect.config import FitSpec, parse_job
from raydetect.fitting.worker import fit_worker
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.images import encode, normal_image


def spec_of(folder: Path, artifact: str) -> FitSpec:
    params = {"weights": "random", "image_size": [64, 64], "epochs": 3}
    values = {
        "kind": "fit",
        "source": {"uri": f"{folder}/normal"},
        "detector": {"name": "stfpm", "preset": "smoke", "params": params},
        "artifact": f"{folder}/{artifact}",
        "calibration": {"holdout_ratio": 0.25},
        "batch_size": 8,
        "view": {"tile": {"overlap": 16}},
        "resources": {"cpus_per_worker": 1},
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def fit(spec: FitSpec, group: Group) -> None:
    archive = open_archive(spec.source, Storage())
    chunks = [c for s in archive.shards() for c in chunk_members(s, archive.read(s), 2, 1 << 30)]
    mine = chunks[group.rank :: group.size]
    torch.set_num_threads(1)  # sums depend on it
    fit_worker(spec, mine, None, group, lambda *_: None, torch.device("cpu"))


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    fit(spec_of(Path(folder), "two"), TorchGroup())
    dist.barrier()
    os._exit(0)  # gloo's threads abort a process that ends in the ordinary way


def wide(number: int) -> bytes:
    """A picture of 112 x 96 px: four tiles."""
    return encode(np.concatenate([normal_image(number, 96), normal_image(1000 + number, 96)[:, :16]], axis=1))


def test_a_training_in_tiles_is_the_same_on_one_and_on_two_workers(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/normal", ".tar", [(f"{i:03d}.png", wide(i)) for i in range(8)], 2)
    threads = torch.get_num_threads()
    fit(spec_of(tmp_path, "one"), Group())
    torch.set_num_threads(threads)
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    one, two = (read_record(f"file://{tmp_path}/{name}", Storage()) for name in ("one", "two"))
    assert one.body["images"] == two.body["images"] and one.preprocess == two.preprocess
    assert (one.body["images"]["fitted"], one.body["images"]["fitted_tiles"]) == (6, 24)
    assert two.body["losses"][0] == pytest.approx(one.body["losses"][0], rel=1e-3)  # the same tiles, to rounding
    np.testing.assert_allclose(two.body["losses"], one.body["losses"], rtol=0.05)  # rounding grows from step to step
    np.testing.assert_allclose(two.calibration.scores, one.calibration.scores, rtol=0.2)
