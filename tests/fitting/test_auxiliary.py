"""Fits that train on auxiliary images of other categories, and compare with the images of the source."""

from typing import Any

import pytest
import torch

from raydetect.artifacts.record import ArtifactRecord, read_record
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.check import find_problems
from raydetect.config import FitSpec, parse_job
from raydetect.detectors._base import Batch, TrainingPlan
from raydetect.detectors.regad import TRUNK, RegAD
from raydetect.errors import SpecError
from raydetect.fitting.holdout import choose_images
from raydetect.fitting.train import Trainer
from raydetect.local import jobs
from raydetect.storage import Storage, normalise_uri
from tests.builders.archives import normal_files, pack
from tests.builders.auxiliary import PATTERN, auxiliary_of, other_files
from tests.builders.images import encode, normal_image
from tests.contracts.cases import as_batch
from tests.views.test_tiled_fits import _one_thread_at_a_time, fit_over

__all__ = ["_one_thread_at_a_time"]
PARAMS = {"image_size": [32, 32], "k_shot": 3, "epochs": 2, "batch_size": 4}
SOURCE, OTHERS = "memory://auxiliary/normal", "memory://auxiliary/others"


def spec_of(artifact: str = "one", **changes: Any) -> FitSpec:
    values = {
        "kind": "fit",
        "source": {"uri": SOURCE, "pattern": PATTERN},
        "auxiliary": {"uri": OTHERS, "pattern": PATTERN},
        "detector": {"name": "regad", "preset": "smoke", "params": PARAMS},
        "artifact": f"memory://auxiliary/{artifact}",
        "calibration": {"holdout_ratio": 0.25},
        "batch_size": 4,
        **changes,
    }
    spec = parse_job({name: value for name, value in values.items() if value is not None}, "job")
    assert isinstance(spec, FitSpec)
    return spec


def fitted(artifact: str = "one", **changes: Any) -> ArtifactRecord:
    jobs.fit(spec_of(artifact, **changes), lambda *_: None)
    return read_record(f"memory://auxiliary/{artifact}", Storage())


def detector_of(artifact: str) -> RegAD:
    found = load_artifact(f"memory://auxiliary/{artifact}", Storage()).detector
    assert isinstance(found, RegAD)
    return found


def trunk_of(artifact: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in detector_of(artifact).tensors().items() if name.startswith(TRUNK)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(autouse=True)
def _images() -> None:
    pack(SOURCE, ".tar", normal_files(12), 3)
    auxiliary_of("regad", folder=OTHERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auxiliary": None}, r"auxiliary: regad learns from normal images of other categories, with \{category\} in"),
        (
            {"detector": {"name": "patchcore", "preset": "smoke", "params": {"weights": "random"}}},
            r"auxiliary: patchcore learns from the images of source alone\. Remove it\.",
        ),
    ],
)
def test_missing_and_superfluous_images_are_refused_by_the_check_and_by_the_fit(
    changes: dict[str, Any], message: str
) -> None:
    spec = spec_of(**changes)
    with pytest.raises(SpecError, match=message):
        jobs.fit(spec, lambda *_: None)
    problems = find_problems(spec)
    assert len(problems) == 1
    with pytest.raises(SpecError, match=message):
        raise SpecError(problems[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extend": "memory://auxiliary/one"}, "extend keeps what the artifact learnt from auxiliary images"),
        ({"per_category": True}, "auxiliary trains a detector for one category; remove per_category"),
    ],
)
def test_jobs_that_would_train_for_nothing_or_again_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(**changes)


def test_images_without_a_category_and_single_ones_of_a_category_are_refused() -> None:
    with pytest.raises(SpecError, match=r"others: 12 image\(s\) have no category\. Add \{category\} to auxiliary"):
        fitted(auxiliary={"uri": OTHERS})
    pack("memory://auxiliary/single", ".tar", [*other_files(3), ("nut/train/good/0.png", encode(normal_image(1)))], 1)
    with pytest.raises(SpecError, match="category 'nut' of the auxiliary images has one image, and pairs need two"):
        fitted(auxiliary={"uri": "memory://auxiliary/single", "pattern": PATTERN})


def test_it_trains_on_normal_auxiliary_images_alone_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [("gadget/train/hole/1.png", encode(normal_image(1))), ("gadget/train/good/bad.png", b"no image")]
    pack(OTHERS, ".tar", [*other_files(6), *bad], 2)
    seen: set[str] = set()
    plain = RegAD.training_loss

    def noted(detector: RegAD, piece: Any) -> torch.Tensor:
        seen.update(piece.keys)
        assert set(piece.labels) == {0} and len({key.partition("#")[2].partition("/")[0] for key in piece.keys}) == 1
        return plain(detector, piece)

    monkeypatch.setattr(RegAD, "training_loss", noted)
    body = fitted(max_bad_fraction=0.1).body
    assert {key.partition("#")[2] for key in seen} == {name for name, _ in other_files(6)}
    assert body["auxiliary"] == {"images": 12, "categories": ["gadget", "gizmo"], "bad": 1}
    assert body["images"] == {"fitted": 9, "labelled_anomalous_left_out": 0, "held_out": 3, "bad": 0}
    assert body["supports"] == {"images": 3, "views": 66} and len(body["losses"]) == 2


def test_supports_are_the_images_with_the_smallest_hash() -> None:
    names = [f"widget/train/good/{i:04d}.png" for i in range(12)]
    pictures = [normal_image(i, 32) for i in range(12)]
    pack(SOURCE, ".tar", [(name, encode(picture)) for name, picture in zip(names, pictures, strict=True)], 3)
    pack("memory://auxiliary/more", ".tar", normal_files(5, 100), 1)
    fitted(calibration={"source": {"uri": "memory://auxiliary/more"}})
    keys = [f"{normalise_uri(SOURCE)}/part-{i % 3}.tar#{name}" for i, name in enumerate(names)]
    chosen = choose_images(keys, 3, 0, Group())
    one, state = detector_of("one"), FitState()
    with torch.inference_mode():
        state.add(chosen, one.collect(Batch(as_batch([pictures[keys.index(key)] for key in chosen]), chosen)))
    saved = one.tensors()
    one.finish(state, lambda *_: None)
    assert same(one.tensors(), saved)


def test_extending_keeps_the_training_and_replaces_the_supports() -> None:
    first = fitted()
    pack("memory://auxiliary/new", ".tar", normal_files(9, 500), 2)
    new = {"uri": "memory://auxiliary/new", "pattern": PATTERN}
    record = fitted("two", source=new, auxiliary=None, extend="memory://auxiliary/one")
    assert same(trunk_of("one"), trunk_of("two"))
    assert record.body["supports"] == {"images": 3, "views": 66}
    assert record.body["lineage"][0]["digest"] == first.digest and "losses" not in record.body
    one, two = detector_of("one"), detector_of("two")
    assert one.gaussians is not None and two.gaussians is not None
    assert not torch.equal(one.gaussians.mean_SC[0], two.gaussians.mean_SC[0])
    fitted("whole", source=new)  # the same training, and the new images from the start
    assert same(detector_of("whole").tensors(), two.tensors())


def test_folds_collect_again_and_train_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    plain = Trainer.run

    def noted(trainer: Trainer, *args: Any) -> list[float]:
        trained.append(len(trainer.keys))
        return plain(trainer, *args)

    monkeypatch.setattr(Trainer, "run", noted)
    body = fitted(calibration={"method": "cross", "folds": 4}).body
    assert trained == [12] and body["folds"] == 4 and body["images"]["held_out"] == 12
    fitted("few", calibration={})  # few images: folds without being asked
    assert read_record("memory://auxiliary/few", Storage()).body["folds"] == 5
    fitted("held")
    assert same(trunk_of("one"), trunk_of("held")) and len(trained) == 3


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_workers_read_share_and_collect_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads have no collective gradients, so only the steps are left out; `test_train.py` has them."""
    order: list[list[list[str]]] = []
    plain = Trainer._batches

    def without_steps(trainer: Trainer, _: Any) -> list[float]:
        plan: TrainingPlan = trainer.detector.begin_training(len(trainer.keys))
        batches = plain(trainer, plan, 0)
        mine = [trainer._share(batch, plan) for batch in batches]
        pairs = [batch[i : i + 2] for batch in batches for i in range(0, len(batch), 2)]
        assert all(share[i : i + 2] in pairs for share in mine for i in range(0, len(share), 2))
        assert all(torch.from_numpy(trainer.cache.pixels(batch)).any() for batch in batches)
        order.append(batches)
        trainer.detector.end_training()
        return [0.0]

    monkeypatch.setattr(Trainer, "run", without_steps)
    settings = {"detector": {"name": "regad", "preset": "smoke", "params": {**PARAMS, "batch_size": 8}}}
    fit_over(spec_of("alone", **settings), 1)
    fit_over(spec_of("many", **settings), size)
    assert order[1:] == [order[0]] * size
    alone, many = (read_record(f"memory://auxiliary/{name}", Storage()).body for name in ("alone", "many"))
    assert alone["tensors"] == many["tensors"] and alone["calibration"] == many["calibration"]
    assert alone["auxiliary"] == many["auxiliary"] and alone["images"] == many["images"]
