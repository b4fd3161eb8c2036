"""Fits and scorings of a folder without a job file, what they say and keep, and where they run."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from raydetect.cli.running import placement
from raydetect.cli.running.folder_job import names_images
from raydetect.cli.running.placement import Size, Wanted, runs_cells_here, runs_here
from raydetect.config import ResourceSpec
from raydetect.errors import SpecError
from raydetect.records import Shard
from raydetect.storage import Storage
from tests.builders.commands import call
from tests.builders.sources import flat, good_and_bad
from tests.whole_jobs.runs import rows_of

pytestmark = pytest.mark.usefixtures("without_weights")
QUICK = ("--set", "detector.params.image_size=[64, 64]", "--set", "calibration={holdout_ratio: 0.4}")


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """A folder with good images, new ones, and a detector that was fitted without a job file."""
    flat(tmp_path / "good")
    good_and_bad(tmp_path / "new")
    ended = call("fit", str(tmp_path / "good"), "--out", str(tmp_path / "artifact"), *QUICK)
    assert ended.exit_code == 0, ended.output
    assert "Runs in this process (8 image files); --ray starts a local Ray.\n" in ended.stderr
    next_line = f"Next: raydetect score NEW_IMAGES --artifact {tmp_path}/artifact --out RESULTS\n"
    assert ended.stdout.endswith(next_line)
    return tmp_path


def shown(ended: Result) -> dict[str, Any]:
    """The job file that was printed."""
    _, _, rest = ended.stderr.partition("The job file that this stands for:\n")
    lines = []
    for text in rest.splitlines():
        if not text.startswith("  "):
            break
        lines.append(text[2:])
    found: dict[str, Any] = yaml.safe_load("\n".join(lines))
    return found


def test_a_folder_is_fitted_and_scored_and_the_jobs_are_kept(line: Path) -> None:
    kept = yaml.safe_load((line / "artifact" / "job.yaml").read_text())
    assert kept["source"] == {"uri": f"{line}/good"} and kept["artifact"] == f"{line}/artifact"
    assert kept["detector"]["params"] == {"backbone": "resnet18", "weights": "random", "image_size": [64, 64]}
    assert kept["calibration"] == {"holdout_ratio": 0.4}
    place = (str(line / "new"), "--artifact", str(line / "artifact"), "--out", str(line / "results 1"))
    ended = call("score", *place, "--set", "flag.alpha=0.3")
    assert ended.exit_code == 0, ended.output
    assert "Runs in this process (11 image files); --ray starts a local Ray.\n" in ended.stderr
    assert "Scored 11 images" in ended.stdout and "Image AUROC over 11 labelled images" in ended.stdout
    assert ended.stdout.endswith(f"Next: raydetect report '{line}/results 1' -o report.html\n")
    kept = yaml.safe_load((line / "results 1" / "job.yaml").read_text())
    assert kept == shown(ended) == {
        "kind": "score",
        "source": {"uri": f"{line}/new", "pattern": "{defect}/{name}.png"},
        "artifact": f"{line}/artifact",
        "sink": {"uri": f"{line}/results 1", "heatmaps": "flagged"},
        "resources": {"num_workers": 1, "cpus_per_worker": len(os.sched_getaffinity(0))},
        "flag": {"alpha": 0.3},
    }  # fmt: skip
    again = call("score", *place, "--set", "flag.alpha=0.3")
    assert again.exit_code == 0 and "1 of 1 shards are committed already" in again.stderr
    assert "Runs" not in again.stderr
    assert call("verify", f"{line}/results 1").exit_code == 0
    as_file = call("score", f"{line}/results 1/job.yaml")
    assert as_file.exit_code == 0 and "1 of 1 shards are committed already" in as_file.stderr, as_file.output


def test_results_inside_of_the_scored_folder_are_not_scored(line: Path) -> None:
    place = (str(line / "new"), "--artifact", str(line / "artifact"), "--out", str(line / "new" / "results"))
    assert call("score", *place).exit_code == 0
    again = call("score", *place)
    assert again.exit_code == 0 and "Scored 11 images in 1 shard " in again.stdout, again.output
    assert "job.yaml" not in again.stdout  # does not count as left out


def test_a_detector_is_chosen_by_name_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    flat(tmp_path / "good")
    wrong = call("fit", str(tmp_path / "good"), "--out", str(tmp_path / "a"), "--detector", "patchcoer")
    assert wrong.exit_code == 2 and "patchcore" in wrong.stderr
    spade = ("--detector", "spade", "--set", "detector.params={backbone: resnet18, weights: random}")
    ended = call("fit", str(tmp_path / "good"), "--out", str(tmp_path / "a"), *spade, *QUICK)
    assert ended.exit_code == 0 and "Fitted spade" in ended.stdout, ended.output
    assert shown(ended)["detector"]["name"] == "spade"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["score", "IN"], "--artifact (the fitted detector) and --out (where the results go) are missing"),
        (["score", "IN", "--artifact", "a"], "--out (where the results go) is missing"),
        (["score", "IN/*.png"], "are missing. Run `raydetect score"),
        (["score", "s3://bucket/day.tar", "--out", "r"], "--artifact (the fitted detector) is missing"),
        (["fit", "IN"], "--out (where the fitted detector goes) is missing"),
        (["fit", "job.yaml", "--out", "a"], "is a job file, which states what --out would"),
        (["fit", "job.yaml", "--detector", "spade", "--out", "a"], "states what --out and --detector would"),
        (["score", "job.yml", "--artifact", "a"], "states what --artifact would"),
        (["score", "nowhere"], "nowhere"),
        (["score", "IN", "--artifact", "a", "--out", "r", "--ray", "--local"], "--ray starts a Ray on this machine"),
        (["fit", "IN", "--out", "r", "--ray", "--address", "x"], "--address names a cluster. Give one of them."),
        (["score", "IN", "--artifact", "IN/none", "--out", "IN/r"], "no artifact"),
        (["score", "IN", "--artifact", "a", "--out", "r", "--set", "sink.heatmap=all"], "heatmap"),
    ],
)
def test_what_is_missing_or_too_much_is_said(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    flat(tmp_path / "in")
    ended = call(*(word.replace("IN", str(tmp_path / "in")) for word in arguments))
    assert ended.exit_code == 2 and sentence in ended.stderr, ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("argument", "stated", "expected"),
    [
        ("day.tar", [], True),
        ("days/*.parquet", [], True),
        ("s3://bucket/day", [], True),
        (".", [], True),
        ("picture.png", [], True),
        ("day", ["--out"], True),
        ("s3://bucket/job.yaml", [], False),
        ("job.YML", ["--out"], False),
        ("job", [], False),
        ("/dev/stdin", [], False),
    ],
)
def test_arguments_are_job_files_or_images(argument: str, stated: list[str], expected: bool) -> None:
    assert names_images(argument, stated) is expected


def test_no_secret_is_printed_or_kept(line: Path) -> None:
    secret = "hush-hush-secret"
    place = (str(line / "new"), "--artifact", str(line / "artifact"), "--out", str(line / "results"))
    ended = call("score", *place, "--set", f"storage={{key: k, secret: {secret}, profile: p}}")
    assert ended.exit_code == 0, ended.output
    text = (line / "results" / "job.yaml").read_text()
    assert "profile: p" in text and secret not in text + ended.output


def test_the_same_rows_in_this_process_and_on_a_local_ray(line: Path) -> None:
    place = (str(line / "new"), "--artifact", str(line / "artifact"), "--set", "resources={num_workers: 1}")
    here = call("score", *place, "--out", str(line / "here"))
    there = call("score", *place, "--out", str(line / "there"), "--ray")
    assert here.exit_code == there.exit_code == 0, there.output
    assert "Runs in this process" in here.stderr and "Runs" not in there.stderr
    rows = [
        [
            (row["key"], row["image_score"], row["p_value"], row["flagged"])
            for row in rows_of(f"file://{line}/{name}", Storage())
        ]
        for name in ("here", "there")
    ]
    assert len(rows[0]) == 11 and rows[0] == rows[1]


def shard(size: int, format: str = "tar") -> Shard:
    return Shard(0, "file:///x", format, size, "f")


def test_one_cell_of_an_evaluation_runs_here_and_several_on_ray(capsys: pytest.CaptureFixture[str]) -> None:
    open_ = Wanted(None, False, False)
    assert runs_cells_here(open_, 1) and not runs_cells_here(open_, 6)
    assert capsys.readouterr().err == (
        "Runs in this process (1 cell); --ray starts a local Ray.\n"
        "Runs on a local Ray (6 cells); --local runs in this process.\n"
    )
    assert runs_cells_here(Wanted(None, True, False), 6) and not runs_cells_here(Wanted(None, False, True), 1)
    assert not runs_cells_here(open_, 0) and capsys.readouterr().err == ""


def test_small_sources_run_here_and_others_on_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = ResourceSpec(), ResourceSpec(num_workers=2)
    open_, never = Wanted(None, False, False), lambda: pytest.fail("listed for nothing")
    small, large = Size.of([shard(1000), shard(2000)]), Size.of([shard(1 << 30)])
    assert runs_here(open_, one, lambda: small)
    assert capsys.readouterr().err == "Runs in this process (3.0 kB); --ray starts a local Ray.\n"
    assert not runs_here(open_, one, lambda: large)
    assert capsys.readouterr().err == "Runs on a local Ray (1.1 GB); --local runs in this process.\n"
    assert not runs_here(open_, two, never)
    assert capsys.readouterr().err == "Runs on a local Ray (2 workers); --local runs in this process.\n"
    assert not runs_here(open_, one, lambda: Size(placement.SMALL_IMAGES + 1, 1))
    assert "2,001 image files" in capsys.readouterr().err
    assert runs_here(Wanted(None, True, False), two, never)
    assert not runs_here(Wanted(None, False, True), one, never)
    assert not runs_here(Wanted("auto", False, False), one, never)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert not runs_here(open_, one, never)
    assert open_.target is None and Wanted(None, False, True).target == "local"
    assert capsys.readouterr().err == ""
    with pytest.raises(SpecError, match="Give one of them"):
        Wanted("auto", False, True)
