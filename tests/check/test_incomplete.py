"""`check` finds all mistakes at once: those of settings, and those of detector, images, artifact and flag too."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from raydetect.check.incomplete import further_problems
from raydetect.cli.main import main
from tests.check.test_level import job_of
from tests.local.test_usual_level import DETECTOR, pictures

SMALL = {"weights": "random", "image_size": [48, 48]}


def lines_of(folder: Path, values: dict[str, Any]) -> list[str]:
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(main, ["check", str(job)])
    assert done.exit_code == 2, done.output
    return [line.removeprefix("Error: ").removeprefix(f"{job}: ") for line in done.output.splitlines()]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"detector": {"name": "patchcor"}}, "Did you mean 'patchcore'"),
        ({"detector": {"name": "patchcore", "params": {"n_neighbour": 3}}}, "Did you mean 'n_neighbors'"),
        ({"source": {"uri": "/nothing/there"}}, "file:///nothing/there: nothing is there"),
        (
            {
                "detector": {"name": "patchcore", "params": SMALL},
                "view": {"align": "phase", "align_to": "/nothing/good.png"},
            },
            "view.align_to: the picture file:///nothing/good.png does not exist",
        ),
        (
            {"detector": {"name": "patchcore", "params": SMALL}, "view": {"size": [12, 12], "crop": [9, 9]}},
            "view.crop = [9, 9]",
        ),
    ],
)
def test_a_fit_with_a_wrong_setting(more: dict[str, Any], text: str, tmp_path: Path) -> None:
    fine = {"kind": "fit", "source": {"uri": pictures(tmp_path / "in", 3)}, "detector": DETECTOR, "batch_size": "x"}
    lines = lines_of(tmp_path, {**fine, "artifact": f"{tmp_path}/model", **more})
    assert lines[0] == "batch_size: should be a whole number, given 'x'."
    assert len(lines) == 2 and text in lines[1], lines


def test_three_mistakes_of_three_kinds_are_found_at_once(tmp_path: Path) -> None:
    values = {
        "kind": "fit",
        "source": {"uri": f"{tmp_path}/none"},
        "detector": {"name": "x"},
        "seed": -1,
        "artefact": "m",
    }
    lines = lines_of(tmp_path, values)
    found = ("artefact: unknown key", "artifact: this required key is missing", "seed: should be at least 0")
    assert all(any(text in line for line in lines) for text in (*found, "nothing is there", "'x'"))
    assert len(lines) == 5


def test_a_scoring_job_with_a_wrong_setting(tmp_path: Path) -> None:
    fit = job_of(tmp_path, 6)
    assert CliRunner().invoke(main, ["fit", str(fit), "--local"]).exit_code == 0
    values = {"kind": "score", "source": {"uri": f"{tmp_path}/normal"}, "artifact": f"{tmp_path}/artifact", "flag": {}}
    fine = {**values, "sink": {"uri": f"{tmp_path}/out"}, "batch_size": 0}
    assert lines_of(tmp_path, fine) == ["batch_size: should be at least 1, given 0."]
    assert "needs at least 999 held-out" in lines_of(tmp_path, {**fine, "flag": {"alpha": 0.001}})[1]
    assert "no artifact: " in lines_of(tmp_path, {**fine, "artifact": f"{tmp_path}/none"})[1]
    assert len(lines_of(tmp_path, {**fine, "flag": "none"})) == 1
    again = {**yaml.safe_load(fit.read_text()), "batch_size": 0}
    assert "holds patchcore of" in lines_of(tmp_path, again)[1]


@pytest.mark.parametrize(
    "values", [{}, {"kind": 3}, {"kind": "scor"}, {"kind": "serve", "storage": 3}, {"kind": "fit", "source": 3}]
)
def test_what_cannot_be_judged_is_left_alone(values: dict[str, Any]) -> None:
    assert further_problems(values) == []
