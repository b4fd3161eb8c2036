"""The forecast of a fit: which phases it measures, how it extrapolates, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from raydetect.check.bank_forecast import LONG_SECONDS, extrapolated
from raydetect.check.fit_forecast import FitForecast, forecast_fit
from raydetect.cli.main import main
from raydetect.config import FitSpec, parse_job
from tests.builders.archives import normal_files, pack

pytestmark = pytest.mark.usefixtures("one_thread")
LOAD, READ, COLLECT, BANK, BANKS = "load weights", "read", "collect", "memory bank", "memory banks for calibration"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pack(f"file://{folder}/normal", ".tar", normal_files(60), 3)
    return folder


def job(images: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "fit",
        "source": {"uri": f"{images}/normal"},
        "detector": {"name": name, "preset": "smoke", "params": {"weights": "random"}},
        "artifact": f"{images}/artifact",
        "batch_size": 8,
        "resources": {"cpus_per_worker": 1},
        **changes,
    }


def forecast(values: dict[str, Any]) -> FitForecast:
    spec = parse_job(values, "fit")
    assert isinstance(spec, FitSpec)
    return forecast_fit(spec)


@pytest.mark.parametrize(
    ("name", "phases", "method"),
    [
        ("patchcore", [LOAD, READ, COLLECT, BANK, BANKS, "calibrate"], "cross"),
        ("spade", [LOAD, READ, COLLECT, BANK, BANKS, "calibrate"], "cross"),
        ("stfpm", [LOAD, READ, "train", "calibrate"], "holdout"),
        ("devnet", [LOAD, READ, "train", "calibrate"], "holdout"),  # learns from labels, which the images lack
    ],
)
def test_each_phase_of_a_detector_is_measured(images: Path, name: str, phases: list[str], method: str) -> None:
    found = forecast(job(images, name))
    assert list(found.seconds) == phases and min(found.seconds.values()) > 0
    assert (found.images, found.inputs, found.measured, found.method) == (60, 60, 32, method)
    alone = found.seconds[LOAD]
    assert found.total(4) == pytest.approx(alone + (found.total(1) - alone) / 4)


def test_epochs_and_tiles_take_their_time(images: Path) -> None:
    params = {"weights": "random", "image_size": [64, 64]}
    detector = {"name": "stfpm", "preset": "smoke", "params": params}
    short = forecast(job(images, "stfpm", detector={**detector, "params": {**params, "epochs": 1}}))
    long = forecast(job(images, "stfpm", detector={**detector, "params": {**params, "epochs": 1000}}))
    assert 100 < long.seconds["train"] / short.seconds["train"] < 10_000
    tiled = forecast(job(images, "patchcore", view={"tile": {"size": [64, 64], "overlap": 32}}))
    assert tiled.inputs == 4 * tiled.images  # pictures of 96 x 96 px


def test_an_ensemble_takes_as_long_as_its_members(images: Path) -> None:
    members = [{"name": name, "preset": "smoke", "params": {"weights": "random"}} for name in ("patchcore", "stfpm")]
    found = forecast(job(images, "", detector={"ensemble": members}))
    assert list(found.seconds) == [LOAD, READ, COLLECT, BANK, "train", "calibrate"] and found.method == "holdout"


@pytest.mark.parametrize(("linear", "quadratic"), [(0.01, 0.0), (0.0, 2e-4), (0.003, 1e-4)])
def test_linear_and_quadratic_parts_are_told_apart(linear: float, quadratic: float) -> None:
    def seconds(count: float) -> float:
        return linear * count + quadratic * count**2

    measured = [(count, seconds(count)) for count in (32, 64, 128)]
    for wanted in (1000, 20_000):
        assert extrapolated(measured, wanted) == pytest.approx(seconds(wanted))


def test_noise_never_makes_a_part_negative() -> None:
    assert extrapolated([(32, 1.1), (64, 1.2)], 640) == pytest.approx(12.0)  # mostly overhead: at most linear
    assert extrapolated([(32, 0.1), (64, LONG_SECONDS)], 640) == pytest.approx(100 * LONG_SECONDS)
    assert extrapolated([(60, 3.0)], 48) == pytest.approx(2.4)


def test_the_command_says_what_it_measured_and_refuses_fleets(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(job(images, "patchcore")))
    ended = CliRunner().invoke(main, ["plan", str(path), "--workers", "1,2", "--price", "3"])
    assert ended.exit_code == 0 and "Images     60 (counted)" in ended.output
    assert (
        "on 32 images" in ended.output and "Calibrated by cross" in ended.output and "Workers    time" in ended.output
    )
    path.write_text(yaml.safe_dump(job(images, "patchcore", per_category=True)))
    refused = CliRunner().invoke(main, ["plan", str(path)])
    assert refused.exit_code == 2 and "per_category: the time of such a fit is not forecast" in refused.output
