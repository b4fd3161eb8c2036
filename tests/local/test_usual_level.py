"""A job that states no rule flags at 1 %, or at the smallest level that its detector allows, and says so everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from raydetect.artifacts.record import read_record
from raydetect.cli.main import main
from raydetect.config import FitSpec, FlagSpec, ScoreSpec, parse_job
from raydetect.local import jobs
from raydetect.metrics.conformal import threshold_for, usual_level_text
from raydetect.planning.plan import plan_score
from raydetect.sinks.run_progress import progress
from raydetect.storage import Storage
from tests.builders.images import defect_image, encode, normal_image

DEFECT = "blob"
DETECTOR = {"name": "patchcore", "preset": "smoke", "params": {"weights": "random"}}


def pictures(folder: Path, normal: int, anomalous: int = 0) -> str:
    folder.mkdir(parents=True)
    for i in range(normal):
        (folder / f"{i:03d}.png").write_bytes(encode(normal_image(i, 64)))
    for i in range(anomalous):
        (folder / f"bad-{i:03d}.png").write_bytes(encode(defect_image(i, DEFECT, 64)[0]))
    return str(folder)


def fit(place: Path, source: dict[str, Any], **more: Any) -> None:
    values = {"kind": "fit", "source": source, "detector": DETECTOR, "artifact": f"{place}/artifact", **more}
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)


def score(place: Path, source: dict[str, Any], **more: Any) -> Any:
    values = {
        "kind": "score",
        "source": source,
        "artifact": f"{place}/artifact",
        "sink": {"uri": f"{place}/results"},
        **more,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, ScoreSpec)
    plan = plan_score(spec)
    jobs.score(plan, lambda _: None)
    return plan


@pytest.mark.parametrize(
    ("calibrated", "level"), [(1, 1 / 2), (30, 1 / 31), (98, 1 / 99), (99, 0.01), (100, 0.01), (5000, 0.01)]
)
def test_the_level_is_the_smallest_from_one_percent_on(calibrated: int, level: float) -> None:
    assert FlagSpec().smallest_p(calibrated) == ("flag", level)
    assert FlagSpec(alpha=0.2).smallest_p(calibrated) == ("flag.alpha", 0.2)
    assert FlagSpec(threshold=3.0).smallest_p(calibrated) is None
    scores = list(map(float, range(calibrated)))
    assert threshold_for(np.asarray(scores), level) > scores[-1] or calibrated > 199
    assert (usual_level_text(calibrated) == "") == (calibrated >= 99)


def test_few_images_are_enough_and_everything_says_the_level(tmp_path: Path) -> None:
    fit(tmp_path, {"uri": pictures(tmp_path / "normal", 30)})
    plan = score(tmp_path, {"uri": pictures(tmp_path / "day", 20, 6)})
    scores = read_record(f"{tmp_path}/artifact", Storage()).calibration.scores
    assert len(scores) == 30
    rows = pq.read_table(f"{tmp_path}/results/scores").to_pylist()
    assert len(rows) == 26
    for row in rows:
        p = (1 + sum(s >= row["image_score"] for s in scores)) / 31
        assert row["p_value"] == pytest.approx(p)
        assert row["flagged"] == (row["image_score"] > scores[-1])
    assert {row["flagged"] for row in rows if "bad" in row["key"]} == {True}
    assert plan.run["flag_level"] == {"level": 1 / 31, "calibrated": 30}
    said = (
        "images are flagged at 3.2 % by default, not at 1 %, for which 99 normal images are needed to calibrate on; "
        "there are 30"
    )
    assert f"Level      {said}" in progress(plan.ledger).lines()
    result = CliRunner().invoke(main, ["report", f"{tmp_path}/results", "-o", f"{tmp_path}/page.html"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "p-value at most 0.03226" in page
    assert said in page


def test_a_stated_level_that_cannot_be_had_is_still_refused(tmp_path: Path) -> None:
    fit(tmp_path, {"uri": pictures(tmp_path / "normal", 12)})
    with pytest.raises(Exception, match=r"flag\.alpha = 0\.01 needs at least 99 held-out normal images, but .* has 12"):
        score(tmp_path, {"uri": pictures(tmp_path / "day", 2)}, flag={"alpha": 0.01})


def test_each_category_of_a_fleet_has_its_own_level(tmp_path: Path) -> None:
    pictures(tmp_path / "normal" / "bolt", 12)
    pictures(tmp_path / "normal" / "nut", 6)
    source = {"uri": f"{tmp_path}/normal", "pattern": "{category}/{name}.png"}
    fit(tmp_path, source, per_category=True)
    plan = score(tmp_path, source)
    assert plan.run["flag_level"]["categories"] == {
        "bolt": {"level": 1 / 13, "calibrated": 12},
        "nut": {"level": 1 / 7, "calibrated": 6},
    }
    lines = "\n".join(progress(plan.ledger).lines())
    assert "flagged at 14 % by default" in lines
    assert "there are 6 of category 'nut' and more of 1 other categories" in lines
