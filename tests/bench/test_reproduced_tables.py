"""The tables of `make reproduce` are those of its stored results, and tell the settings and the machine of each."""

import json
from pathlib import Path

import pytest

from jobs.reproduce import run

RESULTS = [json.loads(path.read_text()) for path in sorted(run.RESULTS.glob("*.json"))]


def test_stored_tables_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, measured = (run.RESULTS / "README.md").read_text(), run.MEASURED.read_text()
    monkeypatch.setattr(run, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for result in RESULTS:
        (tmp_path / f"{result['detector']}-{result['data']}.json").write_text(json.dumps(result))
    run.write_table()
    run.write_measured()
    assert (tmp_path / "README.md").read_text() == readme, "run jobs.reproduce.run.write_table()"
    assert (tmp_path / "measured.json").read_text() == measured, "run jobs.reproduce.run.write_measured()"


def test_a_table_has_the_figures_of_one_machine() -> None:
    parts = (run.RESULTS / "README.md").read_text().split("\n## ")[1:]
    rows = {
        (cells[1], cells[2]): (part.splitlines()[0], cells[-2])
        for part in parts
        for line in part.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) > 3
    }
    machines = {run.machine_of(result) for result in RESULTS}
    assert len(parts) == len(machines) > 1
    for result in RESULTS:
        machine, settings = rows[result["detector"], result["data"]]
        assert machine == run.machine_of(result)
        assert f"{result['images']['fitted']} of {result['images']['normal']} images" in settings
        assert ("another run on the same test images" in settings) == result["tuned"]


def test_jobs_that_tell_of_a_first_run_are_marked() -> None:
    telling = {path.stem for path in run.HERE.glob("*.yaml") if "first run" in path.read_text()}
    assert telling <= set(run.TUNED) <= {path.stem for path in run.HERE.glob("*.yaml")}
    assert all(result["tuned"] == (result["detector"] in run.TUNED) for result in RESULTS)


def test_images_of_a_result_add_up() -> None:
    for result in RESULTS:
        images = result["images"]
        assert images["normal"] + images["defects"] == result["train"]
        assert images["normal"] - images["fitted"] in (0, round(images["normal"] / 10))  # calibrated by folds, or not
