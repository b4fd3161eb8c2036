"""`check` says before a fit which level its images will allow, and the fit says the same afterwards."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from raydetect.cli.main import main
from raydetect.metrics.conformal import usual_level_text
from tests.local.test_usual_level import DETECTOR, pictures

ENSEMBLE = {"name": "ensemble", "ensemble": [DETECTOR, DETECTOR]}


def job_of(folder: Path, count: int, **more: Any) -> Path:
    pictures(folder / "normal", count, 4)
    values = {"kind": "fit", "source": {"uri": f"{folder}/normal"}, "detector": DETECTOR, **more}
    job = folder / "fit.yaml"
    job.write_text(yaml.safe_dump({**values, "artifact": f"{folder}/artifact"}))
    return job


def said(command: str, job: Path, *more: str) -> str:
    done = CliRunner().invoke(main, [command, str(job), *more])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if "are flagged at" in line]
    assert len(lines) <= 1
    return lines[0] if lines else ""


@pytest.mark.parametrize(
    ("more", "calibrated"),
    [
        ({}, 34),
        ({"calibration": {"holdout_ratio": 0.5}}, 17),
        ({"calibration": {"method": "holdout"}}, 3),
        ({"detector": ENSEMBLE, "calibration": {"holdout_ratio": 0.5}}, 9),
    ],
)
def test_check_and_fit_say_the_same(more: dict[str, Any], calibrated: int, tmp_path: Path) -> None:
    job = job_of(tmp_path, 30, **more)
    expected = f"Note: {usual_level_text(calibrated)}."
    assert f"there are {calibrated}" in expected and "99 normal images are needed" in expected
    assert said("check", job) == expected
    assert said("fit", job, "--local") == expected


def test_enough_images_are_no_matter(tmp_path: Path) -> None:
    assert said("check", job_of(tmp_path, 99)) == ""


def test_a_separate_calibration_source_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path / "other", 12)
    job = job_of(tmp_path, 99, calibration={"source": {"uri": f"{tmp_path}/other"}})
    assert said("check", job) == f"Note: {usual_level_text(12)}."


def test_the_listing_is_counted_where_not_all_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydetect.check.preview.MAX_IMAGES", 5)
    assert said("check", job_of(tmp_path, 20)) == f"Note: {usual_level_text(24)}."
