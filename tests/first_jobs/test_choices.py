"""Choices by the number of images, by what is in caches, and by the size of a source."""

from collections import Counter
from pathlib import Path

import pytest

from raydetect.config import SourceSpec, StorageOptions
from raydetect.detectors import _weights
from raydetect.first_jobs import machine
from raydetect.first_jobs.choices import LOCAL_BYTES, Looked, fit_job, score_job, workers_for
from raydetect.first_jobs.survey import Survey


def looked(images: int | None, size: tuple[int, int] = (256, 256), num_bytes: int = 1) -> Looked:
    names = [f"{i}.png" for i in range(images or 0)]
    kinds = Counter(prefix=images) if images else Counter(tar=1)
    survey = Survey(SourceSpec(uri="/x"), names, kinds, num_bytes, images, 10, Counter({size: 10}))
    return Looked.at(survey)


def no_network(url: str) -> None:
    raise OSError(f"{url} cannot be reached")


def test_weights_in_a_cache_come_first_and_random_ones_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "require_reachable", no_network)
    assert machine.choose_backbone().weights == "random"
    monkeypatch.setattr(machine, "require_reachable", lambda url: None)
    chosen = machine.choose_backbone()
    assert (chosen.name, chosen.weights) == ("resnet18", "imagenet") and "downloaded once" in chosen.why
    assert _weights.cached_imagenet("wide_resnet50_2") is None
    url = _weights._torchvision_url("wide_resnet50_2")
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    assert _weights.cached_imagenet("wide_resnet50_2") == cached
    chosen = machine.choose_backbone()
    assert (chosen.name, chosen.weights) == ("wide_resnet50_2", "imagenet") and str(cached) in chosen.why
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert machine.choose_backbone().name == "wide_resnet50_2"


@pytest.mark.parametrize(
    ("images", "expected"),
    [(8, {"method": "cross", "folds": 5}), (989, {"method": "cross", "folds": 5}), (990, {"method": "holdout"})],
)
def test_calibration_by_the_number_of_images(images: int, expected: dict[str, object]) -> None:
    assert fit_job(looked(images), "/a", StorageOptions()).values()["calibration"] == expected


def test_what_is_not_known_is_left_to_the_default() -> None:
    job = fit_job(looked(None), "/a", StorageOptions())
    assert "calibration" not in job.values() and "# calibration: the default" in job.text()


def test_many_patches_are_thinned_out_and_the_file_says_so() -> None:
    few, many = (fit_job(looked(count), "/a", StorageOptions()) for count in (100, 1000))
    assert "coreset_sampling_ratio" not in few.values()["detector"]["params"]
    assert many.values()["detector"]["params"]["coreset_sampling_ratio"] == 0.01
    assert "1,024,000 patch embeddings" in " ".join(many.text().replace("#", "").split())


def test_large_pictures_are_reduced_until_the_tiles_are_few() -> None:
    views = {
        side: fit_job(looked(10, (side, side)), "/a", StorageOptions()).values().get("view")
        for side in (1000, 1025, 2000, 6000)
    }
    assert views == {
        1000: None,
        1025: {"tile": {}, "scale": 0.5},
        2000: {"tile": {}, "scale": 0.25},
        6000: {"tile": {}, "scale": 0.25},
    }


def test_a_large_source_is_scored_by_more_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from raydetect.first_jobs import choices

    for module in (choices, machine):
        monkeypatch.setattr(module, "cores", lambda: 8)
    large, small = looked(10, num_bytes=LOCAL_BYTES + 1), looked(10, num_bytes=LOCAL_BYTES)
    assert (workers_for(large), workers_for(small)) == (4, 1)
    job = score_job(large, "/a", "/r", StorageOptions(region="x"), workers=workers_for(large)).values()
    assert job["resources"] == {"num_workers": 4, "cpus_per_worker": 2} and job["storage"] == {"region": "x"}
