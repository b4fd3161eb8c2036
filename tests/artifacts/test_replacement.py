"""An artifact is replaced only when that is asked for, before anything is fitted, and nothing of it is left."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect import create_model
from raydetect.artifacts.replacement import existing_artifact
from raydetect.artifacts.store import load_artifact
from raydetect.cli.main import main
from raydetect.errors import SpecError
from raydetect.storage import Storage
from tests.builders.images import encode, normal_image

PARAMS = {"weights": "random", "image_size": [48, 48], "layers": ["layer1"], "coreset_sampling_ratio": 0.2}
DETECTOR = {"name": "patchcore", "preset": "smoke", "params": PARAMS}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder, numbers in (("in/a", range(8)), ("in/b", range(8, 16)), ("other", range(20, 30))):
        (tmp_path / folder).mkdir(parents=True)
        for number in numbers:
            (tmp_path / folder / f"{number}.png").write_bytes(encode(normal_image(number, 48)))
    return tmp_path


def job(place: Path, kind: str, **more: Any) -> str:
    values: dict[str, Any] = {"kind": kind, "source": {"uri": f"{place}/in", "pattern": "{category}/{name}.png"}}
    if kind == "fit":
        values |= {"detector": DETECTOR, "artifact": f"{place}/model"}
    path = place / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({**values, **more}))
    return str(path)


def command(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def done(*words: str) -> str:
    result = command(*words)
    assert result.exit_code == 0, result.output
    return result.output


def written(place: Path) -> set[str]:
    return {str(path.relative_to(place / "model")) for path in (place / "model").rglob("*") if path.is_file()}


def test_a_fit_is_refused_before_it_reads_an_image(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job(place, "fit")
    done("fit", path, "--local")
    before = {name: (place / "model" / name).read_bytes() for name in written(place)}
    monkeypatch.setattr("raydetect.local.jobs.fit", lambda *_: pytest.fail("the fit began"))
    for words in (("check", path), ("fit", path, "--local"), ("fit", path)):
        result = command(*words)
        assert result.exit_code == 2
        assert f"artifact: file://{place}/model holds patchcore of 20" in result.output
        assert "already. Use another place, or fit with --replace (replace: true)." in result.output
    assert {name: (place / "model" / name).read_bytes() for name in written(place)} == before


def test_replace_says_what_was_there_and_leaves_nothing_of_it(place: Path) -> None:
    path = job(place, "fit")
    assert "Replaced" not in done("fit", path, "--local")
    old = existing_artifact(f"{place}/model", Storage())
    assert old is not None
    output = done("fit", path, "--local", "--replace", "--set", "seed=3")
    assert f"Replaced {old.text}." in output and "patchcore of " in old.text and "(sha256 " in old.text
    assert len(written(place)) == 2
    load_artifact(f"file://{place}/model", Storage())
    assert "Replaced" in done("fit", path, "--local", "--set", "replace=true")
    assert "ready to fit" in done("check", path, "--set", "replace=true")


def test_the_word_does_not_change_the_artifact(place: Path) -> None:
    path = job(place, "fit")
    done("fit", path, "--local")
    tensors = {name for name in written(place) if name.startswith("tensors")}
    done("fit", path, "--local", "--replace")
    assert {name for name in written(place) if name.startswith("tensors")} == tensors
    assert '"replace"' not in (place / "model/artifact.json").read_text()


def test_fleets_and_single_detectors_replace_each_other_whole(place: Path) -> None:
    path = job(place, "fit")
    done("fit", path, "--local", "--set", "per_category=true")
    assert len(written(place)) == 5
    (place / "in/b").rename(place / "in/c")
    output = done("fit", path, "--local", "--set", "per_category=true", "--replace")
    assert "Replaced fleet of 2 categories of " in output
    assert len(written(place)) == 5 and not any("/b-" in name for name in written(place))
    done("fit", path, "--local", "--replace")
    assert len(written(place)) == 2
    done("fit", path, "--local", "--set", "per_category=true", "--replace")
    assert len(written(place)) == 5


def test_categories_that_share_a_detector_replace_other_artifacts_and_are_replaced_whole(place: Path) -> None:
    path = job(place, "fit")
    shared, fleet = ("--set", "per_category=calibration"), ("--set", "per_category=true")
    done("fit", path, "--local", *fleet)
    assert "Replaced fleet of 2 categories of " in done("fit", path, "--local", *shared, "--replace")
    assert len(written(place)) == 4  # index, tensors and two records
    done("fit", path, "--local", *fleet, "--replace")
    assert len(written(place)) == 5
    done("fit", path, "--local", *shared, "--replace")
    (place / "in/b").rename(place / "in/c")
    done("fit", path, "--local", *shared, "--replace")
    assert len(written(place)) == 4 and not any("/b-" in name for name in written(place))
    done("fit", path, "--local", "--replace")
    assert len(written(place)) == 2


def test_an_artifact_that_is_extended_in_place_is_named_by_the_job(place: Path) -> None:
    path = job(place, "fit")
    done("fit", path, "--local", "--set", f"source.uri={place}/in/a", "--set", "source.pattern={name}.png")
    assert "Replaced patchcore" in done("fit", path, "--local", "--extend", f"{place}/model")
    assert len(written(place)) == 2
    other = command("fit", path, "--local", "--extend", f"{place}/else")
    assert other.exit_code == 2 and "holds patchcore of" in other.output


def test_a_calibration_replaces_its_own_artifact_but_no_other(place: Path) -> None:
    path = job(place, "fit")
    done("fit", path, "--local")
    done("fit", path, "--local", "--set", f"artifact={place}/second")
    settings = {"artifact": f"{place}/model", "source": {"uri": f"{place}/other"}}
    own = job(place, "calibrate", **settings, output=f"{place}/model")
    assert "Replaced patchcore" in done("calibrate", own) and len(written(place)) == 2
    other = job(place, "calibrate", **settings, output=f"{place}/second")
    for words in (("check", other), ("calibrate", other)):
        result = command(*words)
        assert result.exit_code == 2 and "output: file://" in result.output
        assert "or calibrate with --replace (replace: true)" in result.output
    assert "Replaced patchcore" in done("calibrate", other, "--replace")


def test_a_damaged_artifact_is_not_overwritten_either(place: Path) -> None:
    (place / "model").mkdir()
    (place / "model/artifact.json").write_text("{")
    result = command("check", job(place, "fit"))
    assert result.exit_code == 2 and "holds an artifact that cannot be read of" in result.output
    done("fit", job(place, "fit"), "--local", "--replace")


def test_checkpoints_of_another_fit_and_foreign_files_stay(place: Path) -> None:
    done("fit", job(place, "fit"), "--local")
    others = ["training-0123456789abcdef/epoch-000001.safetensors", "notes.txt", "tensors-mine.safetensors"]
    for name in others:
        (place / "model" / name).parent.mkdir(exist_ok=True)
        (place / "model" / name).write_text("mine")
    done("fit", job(place, "fit"), "--local", "--replace", "--set", "seed=1")
    assert written(place) >= set(others) and len(written(place)) == 5


def test_python_refuses_too(place: Path) -> None:
    model = create_model("patchcore", preset="smoke", **{**PARAMS, "image_size": (48, 48)})
    model.fit(str(place / "in/a"), progress=False)
    model.save(f"{place}/model")
    with pytest.raises(SpecError, match=r"save: file:.* holds patchcore of .*, or save\(uri, replace=True\)"):
        model.save(f"{place}/model")
    model.save(f"{place}/model", replace=True)
    assert len(written(place)) == 2
