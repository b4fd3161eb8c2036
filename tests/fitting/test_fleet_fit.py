"""Fitting a fleet and extending a memory bank, in one process and over several workers as threads."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from raydetect.archives.base import chunk_members
from raydetect.archives.chunks import BadMemberError
from raydetect.archives.open import open_archive
from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.record import read_record
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.coresets.group import Group
from raydetect.check import find_problems
from raydetect.config import FitSpec, parse_job
from raydetect.errors import ArchiveError, SpecError
from raydetect.fitting import fleet
from raydetect.fitting.fit_run import FitRun
from raydetect.fitting.fleet import assign_categories
from raydetect.fitting.shared_errors import shared_errors
from raydetect.fitting.worker import fit_worker
from raydetect.local import jobs
from raydetect.records import FitReport
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack
from tests.builders.group import together
from tests.builders.images import encode, normal_image

PARAMS = {"backbone": "resnet18", "weights": "random", "image_size": [48, 48], "coreset_sampling_ratio": 0.1}


def spec_of(uri: str, artifact: str, **changes: Any) -> FitSpec:
    """A small fit job under `memory://`."""
    values = {
        "kind": "fit",
        "source": {"uri": uri},
        "detector": {"name": "patchcore", "params": PARAMS},
        "artifact": artifact,
        "calibration": {"holdout_ratio": 0.25},
        "batch_size": 8,
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def fit(spec: FitSpec) -> dict[str, Any]:
    """Fits in this process and returns the facts."""
    return dict(jobs.fit(spec, lambda *_: None).facts)


def fit_over(spec: FitSpec, size: int) -> None:
    """Fits over `size` workers as threads; every worker reads some of the chunks."""
    archive = open_archive(spec.source, Storage())
    chunks = [c for s in archive.shards() for c in chunk_members(s, archive.read(s), 5, 1 << 30)]

    def work(group: Group) -> object:
        mine = [chunk for i, chunk in enumerate(chunks) if i % size == group.rank]
        return fit_worker(spec, mine, None, group, lambda *_: None, torch.device("cpu"))

    reports = together(size, work)
    assert [report is None for report in reports] == [False] + [True] * (size - 1)


def make_three() -> dict[str, Any]:
    """Three categories of 8, 12 and 16 images in two mixed tars."""
    files = []
    for shift, (category, count) in enumerate((("cable", 8), ("Hex nut", 12), ("bolt", 16))):
        pictures = [np.roll(normal_image(100 * shift + i, 48), shift, axis=-1) for i in range(count)]
        files += [(f"{category}/train/good/{i:03d}.png", encode(p)) for i, p in enumerate(pictures)]
    order = np.random.default_rng(0).permutation(len(files))
    pack("memory://fleet/mixed", ".tar", [files[i] for i in order], 2)
    return {"uri": "memory://fleet/mixed", "pattern": "{category}/train/{defect}/{name}.png"}


@pytest.fixture(autouse=True)
def _one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are processes; as threads they must not trace a backbone while another one traces or runs."""
    lock, plain, build = threading.RLock(), fleet._fit_category, FitRun._detector

    def built(work: FitRun, storage: Storage) -> Any:
        with lock:
            return build(work, storage)

    def alone(work: FitRun, category: str) -> FitReport:
        with lock:
            return plain(work, category)

    monkeypatch.setattr(FitRun, "_detector", built)
    monkeypatch.setattr(fleet, "_fit_category", alone)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_member_of_a_fleet_is_what_its_category_alone_gives(size: int) -> None:
    source = make_three()
    spec = spec_of("", "memory://fleet/model", source=source, per_category=True)
    fit_over(spec, size)
    index = read_index("memory://fleet/model", Storage())
    records = read_records(index, Storage())
    assert list(records) == ["Hex nut", "bolt", "cable"]
    assert index.body["images"] == {"fitted": 27, "held_out": 9, "labelled_anomalous_left_out": 0, "bad": 0}
    for category, record in records.items():
        alone = {**source, "pattern": source["pattern"].replace("{category}", str(category))}
        fit(spec_of("", f"memory://fleet/{category}", source=alone))
        other = read_record(f"memory://fleet/{category}", Storage())
        assert record.body["tensors"]["sha256"] == other.body["tensors"]["sha256"]
        assert record.body["calibration"] == other.body["calibration"]


def test_a_fleet_in_tiles_with_a_mask_for_each_category_is_the_same_on_any_number_of_workers() -> None:
    files, masks = [], {}
    for shift, category in enumerate(("bolt", "nut", "cable")):
        pictures = [np.roll(normal_image(100 * shift + i, 80), shift, axis=-1) for i in range(9)]
        files += [(f"{category}/{i:03d}.png", encode(picture)) for i, picture in enumerate(pictures)]
        masks[category] = np.zeros((8, 8), np.uint8)
        masks[category][shift : shift + 4, shift:] = 255
        Storage().write(f"memory://fleet/masks/{category}.png", encode(masks[category]))
    order = np.random.default_rng(1).permutation(len(files))
    pack("memory://fleet/tiles", ".tar", [files[i] for i in order], 2)
    source = {"uri": "memory://fleet/tiles", "pattern": "{category}/{name}.png"}
    view = {"tile": {"overlap": 16}, "region": "memory://fleet/masks/{category}.png"}
    members = []
    for size in (1, 2, 3):
        name = f"memory://fleet/tiled-{size}"
        fit_over(spec_of("", name, source=source, view=view, per_category=True), size)
        members.append(read_records(read_index(name, Storage()), Storage()))
    for category, record in members[0].items():
        region = f"memory://fleet/masks/{category}.png"
        alone = {**source, "pattern": f"{category}/{{name}}.png"}
        fit(spec_of("", "memory://fleet/alone", source=alone, view={**view, "region": region}))
        others = [read_record("memory://fleet/alone", Storage()), *(found[category] for found in members[1:])]
        for other in others:
            assert other.body["tensors"]["sha256"] == record.body["tensors"]["sha256"]
            assert other.body["calibration"] == record.body["calibration"] and other.preprocess == record.preprocess
        looked = record.preprocess.layout((80, 80)).looked
        assert looked is not None
        np.testing.assert_array_equal(looked, np.kron(masks[str(category)], np.ones((10, 10))) > 0)


def test_categories_are_shared_out_by_size() -> None:
    assert assign_categories({"a": 5, "b": 9, "c": 4, "d": 1}, 2) == {"b": 0, "a": 1, "c": 1, "d": 0}
    assert assign_categories({"a": 1}, 3) == {"a": 0}


def test_a_fleet_says_before_its_fits_which_category_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_three()
    fitted: list[str] = []
    monkeypatch.setattr(fleet, "_fit_category", lambda work, category: fitted.append(category))
    bolts = [(f"bolt/train/good/{i:03d}.png", encode(normal_image(500 + i, 48))) for i in range(4)]
    pack("memory://fleet/held", ".tar", bolts, 1)
    for changes, words in (
        (source, r"no usable normal image of category 'Hex nut', so .* be calibrated\. Add normal images"),
        (
            {},
            r"no usable normal image of category .Hex nut.*; 4 .* have no category\. .*calibration\.source",
        ),
    ):
        held = {**changes, "uri": "memory://fleet/held"}
        spec = spec_of("", "memory://fleet/x", source=source, per_category=True, calibration={"source": held})
        with pytest.raises(SpecError, match=words):
            fit(spec)
    assert not fitted


def test_what_a_fleet_cannot_do_is_said() -> None:
    source = make_three()
    with pytest.raises(SpecError, match=r"36 image\(s\) have no category"):
        fit(spec_of("memory://fleet/mixed", "memory://fleet/x", per_category=True))
    pack("memory://fleet/lone", ".tar", [("lone/train/good/0.png", encode(normal_image(1, 48)))], 1)
    uris = {**source, "uri": ["memory://fleet/mixed", "memory://fleet/lone"]}
    with pytest.raises(SpecError, match=r"category 'lone': .*1 usable normal image"):
        fit(spec_of("", "memory://fleet/x", source=uris, per_category=True))
    assert not Storage().exists("memory://fleet/x/artifact.json")
    with pytest.raises(SpecError, match="one by one"):
        spec_of("", "memory://fleet/x", source=source, per_category=True, extend="memory://fleet/y")


def test_extending_adds_rows_within_the_budget_and_records_where_it_comes_from() -> None:
    pack("memory://more/first", ".tar", normal_files(20), 2)
    pack("memory://more/second", ".tar", normal_files(12, start=500), 1)
    first = fit(spec_of("memory://more/first", "memory://more/a"))
    assert first["coreset"]["of"] == 15 * 36 and first["coreset"]["rows"] == 54
    spec = spec_of("memory://more/second", "memory://more/b", extend="memory://more/a")
    assert find_problems(spec) == []
    second = fit(spec)
    assert second["coreset"]["of"] == (15 + 9) * 36 and second["coreset"]["rows"] == round(24 * 36 * 0.1)
    lineage = second["lineage"]
    earlier = read_record("memory://more/a", Storage())
    assert [entry["digest"] for entry in lineage] == [earlier.digest]
    banks = [load_artifact(f"memory://more/{name}", Storage()).detector.tensors()["bank"] for name in "ab"]
    old = {row.tobytes() for row in banks[0].numpy()}
    kept = sum(row.tobytes() in old for row in banks[1].numpy())
    assert 20 < kept < len(banks[1])  # some rows are old, some new
    third = fit(spec_of("memory://more/first", "memory://more/c", extend="memory://more/b"))
    assert len(third["lineage"]) == 2 and third["coreset"]["of"] == (15 + 9 + 15) * 36

    for size in (2, 3):
        fit_over(spec_of("memory://more/second", "memory://more/d", extend="memory://more/a"), size)
        other = read_record("memory://more/d", Storage()).body
        assert other["tensors"]["sha256"] == read_record("memory://more/b", Storage()).body["tensors"]["sha256"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_bfloat16_fit_is_the_same_on_any_number_of_workers(size: int) -> None:
    pack("memory://half/normal", ".tar", normal_files(24), 3)
    words = {"precision": "bfloat16"}
    fit_over(spec_of("memory://half/normal", "memory://half/one", **words), 1)
    fit_over(spec_of("memory://half/normal", "memory://half/many", **words), size)
    one, many = (dict(read_record(f"memory://half/{name}", Storage()).body) for name in ("one", "many"))
    assert one["params"]["precision"] == "bfloat16"
    assert (many["tensors"], many["calibration"]) == (one["tensors"], one["calibration"])


def test_extending_with_another_detector_is_refused() -> None:
    pack("memory://more/first", ".tar", normal_files(8), 1)
    fit(spec_of("memory://more/first", "memory://more/a"))
    other = {"name": "patchcore", "params": {**PARAMS, "image_size": [64, 64]}}
    with pytest.raises(SpecError, match=r"params\.image_size"):
        fit(spec_of("memory://more/first", "memory://more/b", detector=other, extend="memory://more/a"))
    trained = {"name": "stfpm", "params": {"weights": "random"}}
    problems = find_problems(spec_of("memory://more/first", "memory://more/b", detector=trained, extend="memory://x"))
    assert any("no memory bank to extend" in problem for problem in problems)


def test_an_error_of_one_worker_is_that_of_all() -> None:
    def work(group: Group) -> str:
        try:
            with shared_errors(group):
                if group.rank == 1:
                    raise BadMemberError("a.tar#b.png: corrupt. Repair it.")
                if group.rank == 2:
                    raise SpecError("later")
        except ArchiveError as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    assert together(3, work) == ["BadMemberError: a.tar#b.png: corrupt. Repair it."] * 3
    with shared_errors(Group()):
        pass


def digests(uri: str) -> dict[str | None, tuple[str, Any]]:
    """Tensors and calibration of every member of a fleet."""
    records = read_records(read_index(uri, Storage()), Storage())
    return {name: (r.body["tensors"]["sha256"], r.body["calibration"]) for name, r in records.items()}


def test_an_image_that_two_workers_read_counts_once_wherever_its_category_is_fitted() -> None:
    spec = spec_of("", "memory://fleet/model", source=make_three(), per_category=True)
    fit_over(spec, 1)
    expected = digests("memory://fleet/model")
    archive = open_archive(spec.source, Storage())
    chunks = [c for s in archive.shards() for c in chunk_members(s, archive.read(s), 5, 1 << 30)]

    def work(group: Group) -> object:
        mine = [chunk for i, chunk in enumerate(chunks) if i % 2 == group.rank or i < 4]
        return fit_worker(spec, mine, None, group, lambda *_: None, torch.device("cpu"))

    together(2, work)
    assert digests("memory://fleet/model") == expected


def test_a_mask_for_each_category_is_read_by_the_worker_that_fits_it() -> None:
    source, found = make_three(), []
    for number, category in enumerate(("cable", "Hex nut", "bolt")):
        mask = np.zeros((24, 24), np.uint8)
        mask[:, 8 * number : 8 * number + 8] = 255
        Storage().write(f"memory://fleet/masks/{category}.png", encode(mask))
    view = {"region": "memory://fleet/masks/{category}.png", "tile": {"size": [32, 32], "overlap": 8}}
    spec = spec_of("", "memory://fleet/model", source=source, per_category=True, view=view)
    for size in (1, 2, 3):
        fit_over(spec, size)
        found.append(digests("memory://fleet/model"))
    assert found[0] == found[1] == found[2]
    records = read_records(read_index("memory://fleet/model", Storage()), Storage())
    tiles = {name: len(record.preprocess.layout((48, 48)).windows) for name, record in records.items()}
    assert tiles == {"cable": 2, "Hex nut": 4, "bolt": 2}
