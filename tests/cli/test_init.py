"""`raydetect init`: its job files are right and pass `check`, for folders and archives as people have them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.commands import call
from tests.builders.sources import SOURCES, flat, good_and_bad

pytestmark = pytest.mark.usefixtures("without_weights")
QUICK = (
    "detector.params.image_size=[64, 64]",
    "detector.params.coreset_sampling_ratio=0.01",
    "calibration={holdout_ratio: 0.4}",
    "view={}",  # as many tiles of so few px take long
)
SMALL = (*(word for setting in QUICK for word in ("--set", setting)), "--local")


def written(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    fit, score = (yaml.safe_load((folder / name).read_text()) for name in ("fit.yaml", "score.yaml"))
    return fit, score


EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # kind of source: what the fit and the scoring say beside what all say; IN is the source
    "flat": ({"source": {"uri": "IN"}}, {"source": {"uri": "IN"}}),
    "good_and_bad": (
        {"source": {"uri": "IN/good"}},
        {"source": {"uri": "IN", "pattern": "{defect}/{name}.png"}},
    ),
    "beside_bad": ({"source": {"uri": "IN/*.png"}}, {"source": {"uri": "IN"}}),
    "mvtec": (
        {"source": {"uri": "IN", "pattern": "{category}/train/{defect}/{name}.png"}, "per_category": True},
        {
            "source": {
                "uri": "IN",
                "pattern": "{category}/test/{defect}/{name}.png",
                "mask_pattern": "{category}/ground_truth/{defect}/{name}_mask.png",
            }
        },
    ),
    "one_category": (
        {"source": {"uri": "IN/train/good"}},
        {
            "source": {
                "uri": "IN",
                "pattern": "test/{defect}/{name}.png",
                "mask_pattern": "ground_truth/{defect}/{name}_mask.png",
            }
        },
    ),
    "products": (
        {"source": {"uri": "IN", "pattern": "{category}/{defect}/{name}.png"}, "per_category": True},
        {"source": {"uri": "IN", "pattern": "{category}/{defect}/{name}.png"}},
    ),
    "tars": (
        {"source": {"uri": "IN", "pattern": "train/{defect}/{name}.png"}},
        {
            "source": {
                "uri": "IN",
                "pattern": "test/{defect}/{name}.png",
                "mask_pattern": "ground_truth/{defect}/{name}_mask.png",
            }
        },
    ),
    "parquet": ({"source": {"uri": "IN"}}, {"source": {"uri": "IN"}}),
    "large": ({"source": {"uri": "IN"}, "view": {"tile": {}, "scale": 0.5}}, {"source": {"uri": "IN"}}),
    "oblong": ({"source": {"uri": "IN"}, "view": {"resize": "pad"}}, {"source": {"uri": "IN"}}),
    "twelve_bits": ({"source": {"uri": "IN"}, "view": {"range": [0, 4095]}}, {"source": {"uri": "IN"}}),
    "grey": ({"source": {"uri": "IN"}}, {"source": {"uri": "IN"}}),
    "one_broken": ({"source": {"uri": "IN"}}, {"source": {"uri": "IN"}}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_job_files_say_what_is_there_and_pass_the_check_and_run(name: str, tmp_path: Path) -> None:
    source, into = SOURCES[name](tmp_path / "in"), tmp_path / "jobs"
    ended = call("init", str(source), "--into", str(into))
    assert ended.exit_code == 0, ended.output
    cores = len(os.sched_getaffinity(0))
    resources = {"num_workers": 1, "cpus_per_worker": cores}
    fit, score = written(into)
    expected_fit, expected_score = (
        yaml.safe_load(yaml.safe_dump(part).replace("IN", str(source))) for part in EXPECTED[name]
    )
    assert fit == {
        "kind": "fit",
        "detector": {"name": "patchcore", "params": {"backbone": "resnet18", "weights": "random"}},
        "artifact": f"{into}/artifact",
        "calibration": {"method": "cross", "folds": 5},
        "resources": resources,
        **expected_fit,
    }
    assert score == {
        "kind": "score",
        "artifact": f"{into}/artifact",
        "sink": {"uri": f"{into}/results", "heatmaps": "flagged"},
        "resources": resources,
        **expected_score,
    }
    checked = call("check", f"{into}/fit.yaml")
    assert checked.exit_code == 0 and "ready to fit" in checked.output, checked.output
    fitted = call("fit", f"{into}/fit.yaml", *SMALL)
    assert fitted.exit_code == 0, fitted.output
    assert fitted.stdout.endswith(f"Next: raydetect score {into}/score.yaml\n")
    checked = call("check", f"{into}/score.yaml")
    assert checked.exit_code == 0 and "ready to score" in checked.output, checked.output


def test_it_says_what_it_saw_why_it_chose_and_what_to_type_next_in_eighty_columns(tmp_path: Path) -> None:
    source = SOURCES["one_broken"](tmp_path / "in")
    command = [sys.executable, "-m", "raydetect", "init", "in"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    for part in (
        "40 loose images",
        "39 8-bit colour",
        "Broken     1: 05.png: PNG data cannot be decoded",
        "RANDOM",
        "40 good images are few",
        "about 2.4% of good parts are flagged",
    ):
        assert part in " ".join(ended.stdout.split()) or part in ended.stdout, part
    assert ended.stdout.endswith(
        "Next:\n  raydetect check fit.yaml    # finds mistakes in seconds\n  raydetect fit fit.yaml\n"
        "  raydetect score score.yaml\n  raydetect report results -o report.html\n"
    )
    text = (tmp_path / "fit.yaml").read_text()
    assert f"source: {{uri: {source}}}" in text and "# detector: patchcore, which" in text
    long = [line for line in ended.stdout.splitlines() if len(line) > 80 and str(tmp_path) not in line]
    assert not [line for line in long if not line.startswith("  Broken")], long


def test_job_files_are_not_overwritten_unless_it_is_asked_for(tmp_path: Path) -> None:
    source, into = flat(tmp_path / "in"), tmp_path / "jobs"
    into.mkdir()
    (into / "score.yaml").write_text("mine")
    refused = call("init", str(source), "--into", str(into))
    assert refused.exit_code == 2 and f"{into}/score.yaml exists already" in refused.output
    assert (into / "score.yaml").read_text() == "mine" and not (into / "fit.yaml").exists()
    replaced = call("init", str(source), "--into", str(into), "--replace")
    assert replaced.exit_code == 0 and f"{into}/score.yaml (replaced)" in replaced.output
    assert yaml.safe_load((into / "score.yaml").read_text())["kind"] == "score"


def test_new_images_are_scored_and_good_ones_fitted(tmp_path: Path) -> None:
    good, new = flat(tmp_path / "good-parts"), good_and_bad(tmp_path / "new")
    assert call("init", str(good), "--new", str(new), "--into", str(tmp_path)).exit_code == 0
    fit, score = written(tmp_path)
    assert fit["source"] == {"uri": str(good)}
    assert score["source"] == {"uri": str(new), "pattern": "{defect}/{name}.png"}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["bad/a.png", "ng/b.png"], "has only folders of bad parts (bad, ng)"),
        (["ng/a.png", "scratch/b.png", "dent/c.png"], "none of dent, scratch is named good, ok or normal"),
        (["notes.txt"], "contains nothing of format auto"),
    ],
)
def test_a_source_without_good_parts_is_refused_in_a_sentence(tmp_path: Path, names: list[str], sentence: str) -> None:
    from tests.builders.images import encode, normal_image
    from tests.builders.sources import write

    write(tmp_path / "in", [(name, encode(normal_image(0))) for name in names])
    ended = call("init", str(tmp_path / "in"), "--into", str(tmp_path))
    assert ended.exit_code == 2 and sentence in ended.output, ended.output
    assert not (tmp_path / "fit.yaml").exists()


def test_a_source_whose_files_are_all_broken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    ended = call("init", str(tmp_path / "in"), "--into", str(tmp_path))
    assert ended.exit_code == 2 and "no image can be read; a.png: " in ended.output, ended.output


def test_a_bucket_is_read_with_the_endpoint_that_the_job_files_then_state(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.builders.archives import normal_files, pack

    pack(object_store.uri("good"), ".tar", normal_files(6), 2, object_store.storage)
    options = object_store.storage.options
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options.key.get_secret_value())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options.secret.get_secret_value())
    uri, endpoint = object_store.uri("good"), options.endpoint_url
    ended = call("init", uri, "--endpoint-url", endpoint, "--into", str(tmp_path))
    assert ended.exit_code == 0, ended.output
    fit, score = written(tmp_path)
    assert fit["source"]["uri"] == score["source"]["uri"] == uri
    assert fit["storage"] == score["storage"] == {"endpoint_url": endpoint}
    assert options.secret.get_secret_value() not in ended.output + (tmp_path / "fit.yaml").read_text()
    assert call("check", f"{tmp_path}/fit.yaml").exit_code == 0
