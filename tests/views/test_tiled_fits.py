"""Fits in tiles: the same for any number of workers, held out by image, whole jobs with masks and turned images."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from raydetect.archives.base import chunk_members
from raydetect.archives.open import open_archive
from raydetect.artifacts.record import read_record
from raydetect.blocks.coresets.group import Group
from raydetect.config import FitSpec, SourceSpec, parse_job
from raydetect.detectors._registry import detector_class
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import FitRun
from raydetect.fitting.worker import fit_worker
from raydetect.records import Chunk
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.auxiliary import auxiliary_of
from tests.builders.group import together
from tests.builders.images import encode, normal_image
from tests.contracts.cases import CASES, Case

WITHOUT_LABELS = [case for case in CASES if not case.labelled]
COLLECTED = [case for case in WITHOUT_LABELS if detector_class(case.name).phases == ("collect",)]
PATCHCORE = next(case for case in CASES if case.name == "patchcore")
TILED = {"tile": {"overlap": 16}}


def wide(number: int) -> bytes:
    """A picture of 112 x 96 px: four tiles."""
    return encode(np.concatenate([normal_image(number, 96), normal_image(1000 + number, 96)[:, :16]], axis=1))


def spec_of(case: Case, artifact: str, **changes: Any) -> FitSpec:
    values = {
        "kind": "fit",
        "source": {"uri": "memory://views/normal"},
        "detector": {"name": case.name, "preset": "smoke", "params": case.brief()},
        "artifact": f"memory://views/{artifact}",
        "calibration": {"holdout_ratio": 0.25},
        "batch_size": 8,
        "view": TILED,
        **auxiliary_of(case.name, folder="memory://views/auxiliary"),
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def fit_over(spec: FitSpec, size: int) -> None:
    """Fits over `size` workers as threads; every worker reads some of the chunks."""
    chunks, auxiliary = _chunks(spec.source), None if spec.auxiliary is None else _chunks(spec.auxiliary)

    def work(group: Group) -> object:
        mine, other = (part and part[group.rank :: size] for part in (chunks, auxiliary))
        return fit_worker(spec, mine or [], None, group, lambda *_: None, torch.device("cpu"), other)

    together(size, work)


def _chunks(source: SourceSpec) -> list[Chunk]:
    archive = open_archive(source, Storage())
    return [c for s in archive.shards() for c in chunk_members(s, archive.read(s), 2, 1 << 30)]


@pytest.fixture(autouse=True)
def _one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are processes; as threads they must not trace a backbone while another one traces."""
    lock, build = threading.RLock(), FitRun._detector

    def built(work: FitRun, storage: Storage) -> Any:
        with lock:
            return build(work, storage)

    monkeypatch.setattr(FitRun, "_detector", built)


@pytest.mark.parametrize("case", COLLECTED, ids=lambda case: case.id)
def test_a_fit_in_tiles_is_the_same_for_any_number_of_workers(case: Case) -> None:
    pack("memory://views/normal", ".tar", [(f"{i:03d}.png", wide(i)) for i in range(10)], 3)
    bodies = []
    for size in (1, 2, 4):
        fit_over(spec_of(case, f"over-{size}"), size)
        bodies.append(read_record(f"memory://views/over-{size}", Storage()).body)
    for body in bodies[1:]:
        assert (body["tensors"], body["calibration"]) == (bodies[0]["tensors"], bodies[0]["calibration"])
        assert (body["images"], body["preprocess"]) == (bodies[0]["images"], bodies[0]["preprocess"])
    assert bodies[0]["preprocess"]["view"] == {"tile": {"size": None, "overlap": 16}}
    assert bodies[0]["images"]["fitted_tiles"] == 4 * bodies[0]["images"]["fitted"]


@pytest.mark.parametrize("case", WITHOUT_LABELS, ids=lambda case: case.id)
def test_images_are_held_out_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pack("memory://views/normal", ".tar", [(f"{i:03d}.png", wide(i)) for i in range(10)], 3)
    seen: list[tuple[list[str], list[str]]] = []
    plain = FitRun._fit_keys

    def noted(work: FitRun, held_out: list[str], with_labels: bool) -> list[str]:
        keys = plain(work, held_out, with_labels)
        seen.append((held_out, keys))
        return keys

    monkeypatch.setattr(FitRun, "_fit_keys", noted)
    fit_over(spec_of(case, "held"), 1)
    (held_out, keys) = seen[0]
    assert len(held_out) == 2 and not any("@" in key for key in held_out)
    tiles = Counter(key.rpartition("@")[0] for key in keys)
    assert set(tiles.values()) == {4} and len(tiles) == 8 and not set(tiles) & set(held_out)
    body = read_record("memory://views/held", Storage()).body
    counts = {"fitted": 8, "fitted_tiles": 32, "held_out": 2, "held_out_tiles": 8}
    assert (
        body["images"] == {**counts, "labelled_anomalous_left_out": 0, "bad": 0}
        and len(body["calibration"]["scores"]) == 2
    )


def test_the_held_out_images_are_those_of_a_fit_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pack("memory://views/normal", ".tar", [(f"{i:03d}.png", wide(i)) for i in range(10)], 3)
    held: list[list[str]] = []
    plain = FitRun._held_out
    monkeypatch.setattr(FitRun, "_held_out", lambda work, folds: held.append(plain(work, folds)) or held[-1])
    for view in (TILED, {}, {"resize": "pad"}):
        fit_over(spec_of(PATCHCORE, "held", view=view), 1)
    assert held[0] == held[1] == held[2]


def test_a_detector_that_learns_from_labels_refuses_tiles() -> None:
    pack("memory://views/normal", ".tar", [(f"{i:03d}.png", wide(i)) for i in range(4)], 1)
    devnet = next(case for case in CASES if case.name == "devnet")
    with pytest.raises(SpecError, match=r"view\.tile: devnet learns from the labels"):
        fit_over(spec_of(devnet, "labels"), 1)
