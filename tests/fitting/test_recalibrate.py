"""New calibrations: thresholds of other normal images, the same detector, its lineage; fleets; what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.record import read_record
from raydetect.artifacts.store import load_artifact
from raydetect.cli.main import main
from raydetect.config import CalibrateSpec, parse_job
from raydetect.errors import SpecError, TooManyBadRows
from raydetect.fitting.recalibrate import Recalibrated
from raydetect.images.decode import decode_windows
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.metrics.conformal import p_values
from raydetect.scoring.batches import score_batches
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack, tar_bytes
from tests.builders.fleet import CATEGORIES, fit_fleet, flat, mixed_samples
from tests.local.test_local import data, rows, run  # noqa: F401 (a fixture)

JOB: dict[str, Any] = {
    "kind": "calibrate",
    "source": {"uri": "memory://data/more", "pattern": "{category}/train/{defect}/{name}.png"},
    "artifact": "memory://data/artifact",
    "output": "memory://data/calibrated",
}


def calibrated(**changes: Any) -> Recalibrated:
    spec = parse_job({**JOB, **changes}, "job")
    assert isinstance(spec, CalibrateSpec)
    return jobs.calibrate(spec, lambda *_: None)


@pytest.mark.usefixtures("data")
def test_thresholds_are_those_of_the_new_images_and_the_detector_is_the_same() -> None:
    files = normal_files(29, start=400)
    pack("memory://data/more", ".tar", files, 2)
    made = calibrated()
    old, new = (read_record(f"memory://data/{name}", Storage()) for name in ("artifact", "calibrated"))
    assert (made.held_out, made.before, made.bad) == ({None: 29}, {None: 12}, 0)
    assert new.digest == made.digest != old.digest
    assert new.body["tensors"] == old.body["tensors"] and new.body["params"] == old.body["params"]
    entry = {"artifact": "memory:///data/artifact", "digest": old.digest, "images": old.body["images"]}
    assert new.body["lineage"] == [entry] and new.body["images"]["held_out"] == 29
    detector = load_artifact("memory://data/calibrated", Storage()).detector
    from raydetect.records import Member

    rules, size = DecodeRules(10**6, True), Preprocess((64, 64))
    decoded = [
        item for name, content in files for item in decode_windows(Member(name, name, data=content), rules, size)
    ]
    scores = sorted(item.image_score for item in score_batches(detector, decoded, 16))
    assert new.calibration.scores == pytest.approx(scores, rel=1e-6)
    before, after = (rows(run(f"artifact=memory://data/{name}", f"sink.uri=memory://data/r-{name}")[0])
                     for name in ("artifact", "calibrated"))  # fmt: skip
    assert [row["image_score"] for row in before] == [row["image_score"] for row in after]
    held = np.array(new.calibration.scores)
    expected = p_values(held, np.array([row["image_score"] for row in after]))
    assert [row["p_value"] for row in after] == expected.tolist()


@pytest.mark.usefixtures("data")
def test_an_alpha_that_was_refused_is_allowed_with_more_images_also_in_place() -> None:
    with pytest.raises(SpecError, match="needs at least 24 held-out"):
        run("flag={fdr: 0.04}")
    pack("memory://data/more", ".tar", normal_files(26, start=400), 1)
    calibrated(output="memory://data/artifact")
    assert run("flag={fdr: 0.04}")[1]["fdr"]["tested"] == 17
    assert len(read_record("memory://data/artifact", Storage()).body["lineage"]) == 1


@pytest.mark.usefixtures("data")
def test_anomalous_images_are_left_out_and_what_was_fitted_is_refused() -> None:
    pack("memory://data/labelled", ".tar", mixed_files(7, 2, masks=False), 1)
    source = {"uri": "memory://data/labelled", "pattern": "{category}/test/{defect}/{name}.png"}
    assert calibrated(source=source).held_out == {None: 7}
    with pytest.raises(SpecError, match="was fitted on memory:///data/normal"):
        calibrated(source={"uri": "memory://data/normal/"})
    with pytest.raises(SpecError, match="runs in one process"):
        calibrated(resources={"num_workers": 2})


@pytest.mark.usefixtures("data")
def test_too_many_bad_images_write_nothing() -> None:
    pack("memory://data/more", ".tar", [*normal_files(3), ("widget/train/good/x.png", b"no image")], 1)
    with pytest.raises(TooManyBadRows, match="1 of 4 images cannot be used"):
        calibrated()
    assert not Storage().exists("memory://data/calibrated")
    assert calibrated(max_bad_fraction=0.5).bad == 1


def test_every_category_of_a_fleet_gets_its_own_and_one_without_images_is_refused() -> None:
    root = "memory://fleet"
    fit_fleet(root)
    storage, whole = Storage(), {}
    for turn, category in enumerate(CATEGORIES):
        numbers = range(300 + turn, 300 + turn + 6 * (3 + turn), 6)
        whole |= mixed_samples(category, [n - n % 2 + 1000 * turn for n in numbers])
        if turn == 1:
            storage.write(f"{root}/two/0.tar", tar_bytes(flat(whole)))
    storage.write(f"{root}/more/0.tar", tar_bytes(flat(whole)))
    settings = {"artifact": f"{root}/fleet", "output": f"{root}/new"}
    made = calibrated(source={"uri": f"{root}/more"}, **settings)
    index = read_index(f"{root}/new", storage)
    assert index.digest == made.digest and list(index.categories) == sorted(CATEGORIES)
    records = read_records(index, storage)
    assert {name: len(record.calibration.scores) for name, record in records.items()} == made.held_out
    assert made.held_out == {category: 3 + turn for turn, category in enumerate(CATEGORIES)}
    with pytest.raises(SpecError, match="the source has no normal image to calibrate it on"):
        calibrated(source={"uri": f"{root}/two"}, **{**settings, "output": f"{root}/other"})
    assert not storage.exists(f"{root}/other")


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_says_what_it_made_and_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    from tests.local.test_local import FIT, spec_of

    pack(f"file://{tmp_path}/normal", ".tar", normal_files(20), 1)
    pack(f"file://{tmp_path}/more", ".tar", normal_files(9, start=400), 1)
    fit = spec_of(FIT, f"source.uri={tmp_path}/normal", f"artifact={tmp_path}/artifact")
    jobs.fit(fit, lambda *_: None)
    settings = {**JOB, "source": {"uri": f"{tmp_path}/more"}, "artifact": f"{tmp_path}/artifact"}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**settings, "output": f"{tmp_path}/new"}))
    assert call("check", str(job)).output.endswith("ready to calibrate.\n")
    ended = call("calibrate", str(job))
    assert ended.exit_code == 0, ended.output
    assert "calibrated on 9 held-out normal images instead of 8; alpha and fdr from 0.1 on." in ended.output
    assert f"Artifact: file://{tmp_path}/new" in ended.output
    wrong = call("calibrate", str(job), "--set", f"source.uri={tmp_path}/normal")
    assert wrong.exit_code == 2 and "was fitted on" in wrong.output
