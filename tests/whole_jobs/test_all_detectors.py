"""All detectors on Ray: as two ensembles, fitted by one and by two workers, and used to score an archive.

A fit reads one source of auxiliary images, so detectors that learn from masks of another data set are in one of their
own.
"""

from typing import Any

import pytest
import torch

from raydetect.artifacts.store import load_artifact
from raydetect.detectors._base import Detector
from raydetect.detectors._ensemble import Ensemble
from raydetect.detectors._registry import detector_class, list_models
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.auxiliary import auxiliary_of
from tests.builders.images import DEFECTS, defect_image, encode
from tests.contracts.cases import CASES, Case
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import rows_of, run_here, run_on, write_job

PATTERN = "{category}/train/{defect}/{name}.png"
FIRST_PASS = 2e-2  # relative difference in mean loss: float32 sums differ in order, which training amplifies
PASSES = {
    "draem": 8
}  # after two it gives all images the same score; for the others, two are enough to check that workers agree


def member(case: Case) -> dict[str, Any]:
    """A case as an ensemble member with a short training."""
    return {"name": case.name, "preset": "smoke", "params": case.brief(PASSES.get(case.name, 2))}


MASKED = [case for case in CASES if detector_class(case.name).info.auxiliary == "labelled masks"]
GROUPS = {"all": [case for case in CASES if case not in MASKED], "masked": MASKED}


def labelled_files() -> list[tuple[str, bytes]]:
    """Normal images, and some defective ones for detectors that learn from labels."""
    defective = [
        (f"widget/train/{kind}/{i:04d}.png", encode(defect_image(i, kind)[0])) for i, kind in enumerate(DEFECTS)
    ]
    return [*normal_files(20), *defective]


def job(line: Line, group: str, workers: int) -> str:
    """Writes a job that fits the ensemble of a group."""
    names = {case.name for case in GROUPS[group]}
    values: dict[str, Any] = {
        "kind": "fit",
        "source": {"uri": line.store.uri("labelled"), "pattern": PATTERN},
        "detector": {"ensemble": [member(case) for case in GROUPS[group]]},
        "artifact": line.store.uri(f"{group}{workers}"),
        "storage": line.store.settings,
        "calibration": {"holdout_ratio": 0.4},
        "batch_size": 8,
        **auxiliary_of(*names, folder=line.store.uri(f"others-{group}"), storage=line.store.storage),
        "resources": {"num_workers": workers, "cpus_per_worker": 1},
    }
    return write_job(line.folder / f"{group}{workers}.yaml", values)


def fitted(line: Line, group: str, workers: int) -> tuple[Ensemble, list[list[float] | None]]:
    """The fitted ensemble and the training losses of every member."""
    artifact = load_artifact(line.store.uri(f"{group}{workers}"), line.store.storage)
    assert isinstance(artifact.detector, Ensemble)
    return artifact.detector, [member.get("losses") for member in artifact.record.body["members"]]


def same(one: Detector, two: Detector) -> bool:
    """Whether two fits are bit-identical."""
    theirs = two.tensors()
    return all(torch.equal(value, theirs[name]) for name, value in one.tensors().items())


def test_no_detector_is_forgotten() -> None:
    assert {case.name for cases in GROUPS.values() for case in cases} == set(list_models())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
def test_every_detector_fits_on_one_and_two_workers_and_scores_an_archive(group: str, line: Line, cluster: str) -> None:
    store = line.store
    pack(store.uri("labelled"), ".tar", labelled_files(), 3, store.storage)
    run_here("fit", job(line, group, 1))
    run_on(cluster, "fit", job(line, group, 2))
    (one, losses_of_one), (two, losses_of_two) = fitted(line, group, 1), fitted(line, group, 2)
    differences: dict[str, float] = {}
    members = zip(GROUPS[group], one.members, two.members, losses_of_one, losses_of_two, strict=True)
    for case, mine, theirs, first, second in members:
        if "train" not in mine.phases:
            assert same(mine, theirs), case.id
            continue
        assert first is not None and second is not None and len(first) == len(second), case.id
        differences[case.id] = abs(second[0] / first[0] - 1)
    assert max(differences.values()) <= FIRST_PASS, differences

    pack(store.uri("tonight"), ".tar", mixed_files(12, 2, masks=False), 3, store.storage)
    changes = {"source": {"uri": store.uri("tonight")}, "artifact": store.uri(f"{group}2"), "flag": {"alpha": 0.25}}
    run_on(cluster, "score", line.job(f"{group}-ray", workers=2, **changes))
    run_here("score", line.job(f"{group}-local", workers=1, **changes))
    rows = rows_of(store.uri(f"{group}-ray"), store.storage)
    assert rows == rows_of(store.uri(f"{group}-local"), store.storage)
    assert len(rows) == 12 + 2 * len(DEFECTS) and all(
        row["status"] == "ok" and row["image_score"] is not None for row in rows
    )
