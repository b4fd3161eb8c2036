"""The forecast of a scoring job: honest about what it has not looked into."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from raydetect.cli.main import main
from raydetect.config import parse_job
from raydetect.planning.forecast import Forecast, forecast
from raydetect.planning.plan import plan_score
from raydetect.planning.sampling import SAMPLED_CONTAINERS, Count, estimate
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack, tar_bytes, zip_bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an artifact and the images of its fit."""
    from raydetect.local import jobs

    folder = f"file://{tmp_path_factory.mktemp('plan')}"
    pack(f"{folder}/normal", ".tar", normal_files(24), 1)
    fit = {
        "kind": "fit",
        "source": {"uri": f"{folder}/normal"},
        "detector": {"name": "patchcore", "preset": "smoke", "params": {"weights": "random"}},
        "artifact": f"{folder}/artifact",
        "calibration": {"holdout_ratio": 0.5},
    }
    jobs.fit(parse_job(fit, "fit"), lambda *_: None)  # type: ignore[arg-type]
    return folder


def forecast_of(place: str, name: str, **source: object) -> Forecast:
    settings = {"kind": "score", "source": {"uri": f"{place}/{name}", **source}, "artifact": f"{place}/artifact"}
    spec = parse_job({**settings, "sink": {"uri": f"{place}/out"}, "flag": {"alpha": 0.1}, "chunk_images": 8}, "score")
    return forecast(plan_score(spec), [1], None)  # type: ignore[arg-type]


def test_tars_of_one_small_image_are_counted_by_shards_and_not_by_bytes(place: str) -> None:
    """A tar has 10,240 bytes at least; by the bytes of these images there would be many times as many."""
    for number, file in enumerate(normal_files(50)):
        Storage().write(f"{place}/ones/{number:03d}.tar", tar_bytes([file]))
    found = forecast_of(place, "ones")
    assert (found.images, found.chunks) == (50, 50)
    assert found.images_from == f"estimated from {SAMPLED_CONTAINERS} of 50 containers"


def test_containers_that_are_looked_into_whole_are_counted_and_loose_images_always(place: str) -> None:
    Storage().write(f"{place}/few/a.tar", tar_bytes(normal_files(20)))
    Storage().write(f"{place}/few/b.zip", zip_bytes(normal_files(7)))
    found = forecast_of(place, "few")
    assert (found.images, found.chunks, found.images_from) == (27, 4, "counted")
    pack(f"{place}/loose", "", normal_files(30), 1)
    found = forecast_of(place, "loose", shard_images=16)
    assert (found.images, found.chunks, found.images_from) == (30, 4, "counted in the listing")
    assert forecast_of(place, "loose", pattern="good/{name}7.png").images == 3


def test_a_large_container_is_estimated_from_its_first_images(place: str) -> None:
    Storage().write(f"{place}/large/a.tar", tar_bytes(normal_files(200)))
    found = forecast_of(place, "large")
    assert found.images == pytest.approx(200, rel=0.1) and found.images_from == "estimated from 1 of 1 containers"
    assert found.chunks == pytest.approx(25, abs=3)


def test_a_broken_container_is_no_end_of_a_forecast(place: str) -> None:
    Storage().write(f"{place}/broken/a.tar", tar_bytes(normal_files(5)))
    Storage().write(f"{place}/broken/b.tar", b"no tar at all" * 100)
    assert forecast_of(place, "broken").images == 6


def test_an_estimate_takes_what_differs_less_and_says_how_far_it_may_be() -> None:
    assert estimate([1, 1, 1], [10_240, 99_000, 5_000_000], 50_000, 10**12) == Count(50_000, 50_000, 50_000)
    assert estimate([10, 20, 40], [1000, 2000, 4000], 700, 10**6) == Count(10_000, 10_000, 10_000)
    assert estimate([1, 3], [100, 100], 10, 1000) == Count(20, 10, 30)
    assert estimate([0, 0], [100, 100], 10, 1000) == Count(0, 0, 0)
    assert estimate([0], [0], 1, 0) == Count(0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 10**9)), min_size=1, max_size=16), st.integers(0, 10**6))
def test_an_estimate_lies_between_its_ends(looks: list[tuple[int, int]], more: int) -> None:
    sizes = [size for _, size in looks]
    found = estimate([images for images, _ in looks], sizes, len(looks) + more, sum(sizes) + more * 1000)
    assert 0 <= found.low <= found.best <= found.high


def test_the_command_says_how_the_number_is_known(place: str, tmp_path: Path) -> None:
    job = tmp_path / "score.yaml"
    job.write_text(
        f"kind: score\nsource: {{uri: {place}/normal}}\nartifact: {place}/artifact\n"
        f"sink: {{uri: {tmp_path}/out}}\nflag: {{alpha: 0.1}}\n"
    )
    ended = CliRunner().invoke(main, ["plan", str(job), "--price", "0.4"])
    assert ended.exit_code == 0 and "Images     24 (counted)" in ended.output, ended.output
