"""Jobs at published settings: every detector has one, with the figures of its paper, and one command prints the gap."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from jobs.reproduce.published import gap, job_files
from jobs.reproduce.published.defects import LABELLED
from raydetect.cli.main import main
from raydetect.detectors._registry import build_detector, detector_class, list_models
from raydetect.errors import SpecError
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

SIZE_PX = 48
CATEGORIES = ("bolt_a", "cap")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small categories in the layout of MVTec AD."""
    root = tmp_path_factory.mktemp("mvtec")
    for start, category in enumerate(CATEGORIES):
        files = {f"train/good/{i:03}.png": encode(normal_image(100 * start + i, SIZE_PX)) for i in range(8)}
        files |= {f"test/good/{i:03}.png": encode(normal_image(900 + i, SIZE_PX)) for i in range(4)}
        for i in range(LABELLED + 2):
            defect = DEFECTS[i % len(DEFECTS)]
            image, mask = defect_image(i, defect, SIZE_PX)
            files[f"test/{defect}/{i:03}.png"] = encode(image)
            files[f"ground_truth/{defect}/{i:03}_mask.png"] = encode(mask)
        for name, content in files.items():
            (root / category / name).parent.mkdir(parents=True, exist_ok=True)
            (root / category / name).write_bytes(content)
    return root


def run(name: str, data: Path, output: Path, detector: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.reproduce.published", name, "--data", str(data), "--output", str(output)]
    small = ["--local", "--set", "resources={cpus_per_worker: 1}", "--set", f"detectors=[{detector}]"]
    small += ["--set", "replicates=0"]
    return subprocess.run([*command, *small, *more], capture_output=True, text=True, check=False)


def test_every_detector_has_a_job_with_its_published_settings_and_figures(tmp_path: Path, data: Path) -> None:
    assert set(gap.published_figures()) == set(job_files.known())
    assert all(published.figures and published.source for published in gap.published_figures().values())
    for name in list_models():
        if detector_class(name).info.auxiliary == "none":
            assert name in job_files.known(), f"add jobs/reproduce/published/{name}.yaml and a line of figures.csv"
    for name in job_files.known():
        (text,) = yaml.safe_load((job_files.HERE / f"{name}.yaml").read_text())["detectors"]
        assert text["name"] == name.partition("-")[0] and text["preset"] == "paper"
        places = ("textures", "class_name")
        params = {key: value for key, value in text.get("params", {}).items() if key not in places}
        defaults = build_detector(text["name"], {}).params
        assert all(getattr(defaults, key) != value for key, value in params.items()), name  # no default is stated


def test_figures_are_those_of_the_detectors() -> None:
    for name, published in gap.published_figures().items():
        text = detector_class(name.partition("-")[0]).info.published
        with (Path(gap.__file__).parent / "figures.csv").open(newline="") as file:
            row = next(row for row in csv.DictReader(file) if row["job"] == name)
        written = {metric: row[metric] for metric in published.figures}
        assert set(written.values()) <= set(re.findall(r"\d+\.\d+", text)), name
        for metric, value in written.items():
            if (
                f" {gap.METRICS[metric]}" in text
                and name in list_models()
                and (name, metric) != ("cutpaste", "pixel_auroc")
            ):
                assert f"{value} {gap.METRICS[metric]}" in text, name


@pytest.mark.parametrize("name", job_files.known())
def test_every_job_is_ready_where_the_data_set_is(name: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    jobs = job_files.write_jobs(name, data, tmp_path / "out", tmp_path / "dtd", ["resources.gpus_per_worker=0"])
    assert len(jobs) == (len(CATEGORIES) if name == "winclip" else 1)
    for job in jobs:
        checked = CliRunner().invoke(main, ["check", str(job)])
        assert checked.exit_code == 0 and "ready to evaluate" in checked.output, checked.output
        assert not re.search(r"\b(DATA|OUTPUT|LABELLED|TEXTURES|CATEGORY)\b", job.read_text())


def test_a_text_driven_detector_is_told_every_category(data: Path, tmp_path: Path) -> None:
    jobs = [yaml.safe_load(job.read_text()) for job in job_files.write_jobs("winclip", data, tmp_path, None, [])]
    assert [job["data"]["categories"] for job in jobs] == [["bolt_a"], ["cap"]]
    assert [job["detectors"][0]["params"]["class_name"] for job in jobs] == ["bolt a", "cap"]
    assert len({job["output"] for job in jobs}) == 2


def test_one_command_prints_the_gap(data: Path, tmp_path: Path) -> None:
    ended = run("stfpm", data, tmp_path / "out", "{name: stfpm, preset: smoke, params: {weights: random, epochs: 2}}")
    assert ended.returncode == 0, ended.stderr
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert sorted(cell["category"] for cell in cells) == list(CATEGORIES)
    assert all(cell["fitted_images"] == 7 for cell in cells)  # of 8; one calibrates
    text = ended.stdout[ended.stdout.index("stfpm, mean of 2 categories, %") :]
    for title, key, paper in (("image AUROC", "image_auroc", 95.5), ("PRO", "aupro_0.3", 92.1)):
        values = [cell["categories"][cell["category"]]["figures"][key]["value"] for cell in cells]
        ours = 50 * sum(values)
        (found,) = re.findall(rf"^{title} +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
        assert list(map(float, found)) == pytest.approx([ours, paper, ours - paper], abs=0.011)
    assert "Published: arXiv:2103.04257, tables 1-2 (ResNet-18)." in text
    assert "Not comparable: the published figures are means of the 15 categories" in text
    assert json.loads((tmp_path / "out" / "gap.json").read_text())["categories"] == list(CATEGORIES)


def test_one_model_for_all_categories_is_judged_in_each(data: Path, tmp_path: Path) -> None:
    ended = run("uniad", data, tmp_path / "out", "{name: patchcore, preset: smoke, params: {weights: random}}")
    assert ended.returncode == 0, ended.stderr
    (cell,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert cell["fitted_images"] == 15 and sorted(cell["categories"]) == list(CATEGORIES)
    assert all(part["images"]["without_mask"] == 0 for part in cell["categories"].values())
    assert re.search(r"^pixel AUROC +\d+\.\d+ +96\.80 +[-+]", ended.stdout, re.MULTILINE)


def test_labelled_defects_leave_the_test_images(data: Path, tmp_path: Path) -> None:
    ended = run("devnet", data, tmp_path / "out", "{name: devnet, preset: smoke, params: {weights: random}}")
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "out" / "labelled" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for category in CATEGORIES:
        splits = [row["split"] for row in rows if row["category"] == category and row["label"] == "1"]
        assert splits.count("train") == LABELLED and splits.count("test") == 2
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert [cell["categories"][cell["category"]]["images"]["anomalous"] for cell in cells] == [2, 2]
    assert [cell["fitted_images"] for cell in cells] == [7 + LABELLED] * 2
    drawn = {row["path"] for row in rows if row["split"] == "train" and row["label"] == "1"}
    again = job_files.write_jobs("devnet", data, tmp_path / "again", None, [])
    with (again[0].parent / "labelled" / "manifest.csv").open(newline="") as file:
        assert {r["path"] for r in csv.DictReader(file) if r["split"] == "train" and r["label"] == "1"} == drawn


def test_what_cannot_run_ends_with_a_sentence(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, folder: Path, **also: Any) -> str:
        with pytest.raises(SpecError) as error:
            job_files.write_jobs(name, folder, tmp_path, also.get("textures"), [])
        return str(error.value)

    assert "There are cflow, cutpaste" in refused("stfmp", data)
    assert "Name its folder with --textures" in refused("draem", data)
    assert "is not a folder" in refused("stfpm", data / "none")
    assert "has no folder with train and test" in refused("winclip", data / "cap")
    few = tmp_path / "few" / "cap"
    for name in ("train/good/0.png", "test/good/0.png", "test/hole/0.png"):
        (few / name).parent.mkdir(parents=True)
        (few / name).write_bytes(encode(normal_image(0, SIZE_PX)))
    assert "has 1 defective images" in refused("devnet", few.parent)
    assert run("stfpm", data / "none", tmp_path, "{name: stfpm}").stderr.startswith("Error: --data")
