"""`check` decodes the first images of a source by the view of the job, and gives the hints of fits and evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from raydetect.cli.main import main
from tests.builders.images import encode, normal_image
from tests.builders.rasters import raster

PARAMS = {"weights": "random", "image_size": [48, 48], "layers": ["layer1"], "coreset_sampling_ratio": 0.2}
DETECTOR = {"name": "patchcore", "preset": "smoke", "params": PARAMS}
CORNER = [[[0.001, 0.001], [0.002, 0.001], [0.002, 0.002]]]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def oblong(number: int) -> bytes:
    return encode(np.asarray(Image.fromarray(normal_image(number, 96)).resize((300, 150))))


def check(folder: Path, job: dict[str, Any]) -> Result:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return CliRunner().invoke(main, ["check", str(path)])


def check_fit(folder: Path, view: dict[str, Any]) -> Result:
    source = {"uri": f"{folder}/in"}
    return check(
        folder,
        {"kind": "fit", "source": source, "detector": DETECTOR, "artifact": f"{folder}/artifact", "view": view},
    )


def check_evaluation(folder: Path, view: dict[str, Any], *others: dict[str, Any]) -> Result:
    data = {"uri": f"{folder}/data", "layout": "mvtec_ad"}
    detectors = [DETECTOR, *others]
    return check(
        folder, {"kind": "evaluate", "output": f"{folder}/out", "data": data, "detectors": detectors, "view": view}
    )


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"bands": [4]}, "view.bands = [4], and it has 3 bands. Name others."),
        ({"region": CORNER}, "no px of it lies in view.region at the size of the input. Enlarge the region."),
        ({"region": CORNER, "tile": {}}, "no px of it lies in view.region at the size of the input."),
    ],
)
def test_a_source_that_the_view_cannot_look_at_is_refused(view: dict[str, Any], words: str, tmp_path: Path) -> None:
    for i in range(10):
        put(tmp_path / "in" / f"{i}.png", encode(normal_image(i, 64)))
    ended = check_fit(tmp_path, view)
    assert ended.exit_code == 2 and "ready" not in ended.output
    assert f"source.uri: none of the first 8 images can be read; file://{tmp_path}/in" in ended.output
    assert words in ended.output
    assert check_fit(tmp_path, {"bands": [3]}).exit_code == 0


def test_bands_that_must_be_chosen_are_said_before_the_fit(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.tif", raster(np.zeros((64, 64, 6), np.uint8), photometric="MINISBLACK"))
    ended = check_fit(tmp_path, {})
    assert ended.exit_code == 2
    assert "source.uri: its first image cannot be read; file://" in ended.output and "view.bands" in ended.output
    assert check_fit(tmp_path, {"bands": [6, 2, 1]}).exit_code == 0


def test_a_few_damaged_images_do_not_refuse_a_source(tmp_path: Path) -> None:
    for i in range(9):
        put(tmp_path / "in" / f"{i}.png", encode(normal_image(i, 64)) if i == 7 else b"\x89PNG\r\n\x1a\njunk")
    assert check_fit(tmp_path, {}).exit_code == 0
    (tmp_path / "in" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\njunk")
    assert "none of the first 8 images can be read" in check_fit(tmp_path, {}).output


def test_an_evaluation_gets_the_hints_of_its_fits(tmp_path: Path) -> None:
    for i in range(6):
        put(tmp_path / "in" / f"{i}.png", oblong(i))
        put(tmp_path / "data" / "cap" / "train" / "good" / f"{i}.png", oblong(i))
        put(tmp_path / "data" / "nut" / "train" / "good" / f"{i}.png", encode(normal_image(i, 64)))
        put(tmp_path / "data" / "cap" / "test" / "good" / f"{i}.png", encode(normal_image(i, 64)))
        put(tmp_path / "data" / "nut" / "test" / "hole" / f"{i}.png", encode(normal_image(i, 64)))

    def hints(ended: Result) -> list[str]:
        assert ended.exit_code == 0, ended.output
        return [line for line in ended.output.splitlines() if line.startswith("Hint: ")]

    found = hints(check_evaluation(tmp_path, {}))
    assert found == hints(check_fit(tmp_path, {})) and len(found) == 2
    assert "most images are oblong (2 times as wide as high) and are squeezed to 48 x 48 px" in found[0]
    assert "most images (300 x 150 px) are more than 4 times as large as the input (48 x 48 px)" in found[1]
    assert hints(check_evaluation(tmp_path, {"tile": {}})) == []
    wide = {**DETECTOR, "params": {**PARAMS, "image_size": [64, 128]}}
    assert hints(check_evaluation(tmp_path, {}, wide)) == found  # an input of the same ratio loses nothing
    larger = {**DETECTOR, "params": {**PARAMS, "image_size": [80, 80]}}
    assert [text.partition("squeezed to ")[2][:10] for text in hints(check_evaluation(tmp_path, {}, larger))] == [
        "48 x 48 px",
        "",
        "80 x 80 px",
    ]
    refused = check_evaluation(tmp_path, {"bands": [5]})
    assert refused.exit_code == 2 and "data.uri: none of the first 6 images can be read" in refused.output
