"""The programs that compare views, on tiny pictures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.reproduce import small_defects, views
from jobs.reproduce.run import Picture
from jobs.reproduce.view_data import COLUMNS, Counts, copied, first, mask_of, strips
from raydetect.config import STRETCH
from raydetect.views.view import View
from tests.builders.images import defect_image, encode, normal_image

PARAMS = {"backbone": "resnet18", "layers": ["layer1"], "weights": "random", "max_bank_vectors": 50}


def a_data_set(folder: Path, train: int, normal: int, defective: int) -> Path:
    """Square pictures of 96 px with a manifest."""
    folder.mkdir()
    rows = []
    for i in range(train + normal):
        (folder / f"{i}.png").write_bytes(encode(normal_image(i)))
        rows.append({"path": f"{i}.png", "split": "train" if i < train else "test", "label": 0, "defect": "good"})
    for i in range(defective):
        picture, mask = defect_image(i, "blob")
        (folder / f"bad{i}.png").write_bytes(encode(picture))
        (folder / f"mask{i}.png").write_bytes(encode((mask * 255).astype(np.uint8)))
        rows.append({"path": f"bad{i}.png", "split": "test", "label": 1, "defect": "blob", "mask": f"mask{i}.png"})
    with (folder / "manifest.csv").open("w") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_kinds_of_defects_take_turns_in_a_subset() -> None:
    pictures = [Picture(Path(f"{i}"), 1, kind, None) for i, kind in enumerate("aaabbc")]
    assert [p.path.name for p in first(pictures, 1, 5)] == ["0", "3", "5", "1", "4"]
    assert first(pictures, 0, 5) == []


def test_boxes_become_a_mask(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("2 3 5 4 1\n0 0 1 1 2\n")
    Image.new("L", (8, 6)).save(tmp_path / "a.png")
    mask = np.asarray(mask_of(Picture(tmp_path / "a.png", 1, "pit", tmp_path / "a.txt")))
    expected = np.zeros((6, 8), np.uint8)
    expected[3, 2:5] = expected[0, 0] = 255
    np.testing.assert_array_equal(mask, expected)


def test_a_strip_shows_one_test_bottle_where_its_mask_is(tmp_path: Path) -> None:
    source, made = a_data_set(tmp_path / "source", train=13, normal=1, defective=2), tmp_path / "made"
    made.mkdir()
    strips(source, made, Counts(train=1, normal=1, defective=2))
    rows = list(csv.DictReader((made / "manifest.csv").open()))
    assert [(row["split"], row["label"]) for row in rows] == [
        ("train", "0"),
        ("test", "0"),
        ("test", "1"),
        ("test", "1"),
    ]
    for row, place, number in ((rows[2], 1, 0), (rows[3], 2, 1)):
        picture, mask = defect_image(number, "blob")
        shown = np.asarray(Image.open(made / row["path"]).convert("RGB"))
        assert shown.shape == (192, 768, 3)
        own = np.s_[:, place * 192 : (place + 1) * 192]
        expected = Image.fromarray(picture).resize((192, 192), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(shown[own], np.asarray(expected))
        whole = np.zeros((192, 768), bool)
        whole[own] = mask.repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(np.asarray(Image.open(made / row["mask"])) > 0, whole)
    with pytest.raises(ValueError, match="has no normal bottles left for test strip 1"):
        strips(source, made, Counts(train=2, normal=1, defective=2))


def test_every_view_of_a_data_set_becomes_a_line(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    a_data_set(root / "tiny", train=6, normal=2, defective=2)
    looks = (views.Look("stretch", {}, (32, 32)), views.Look("tiles", {"tile": {"overlap": 8}, "scale": 0.5}, (32, 32)))
    lines = views.compared(views.DataSet("tiny", "tiny", copied, Counts(6, 2, 2), looks), root, PARAMS)
    assert [line["inputs_per_image"] for line in lines] == [1, 4]
    assert all(0 <= line[name] <= 1 for line in lines for name in views.METRICS)
    assert lines[0]["images"]["anomalous"] == 2
    assert views.table(lines).count("\n") == 3


def test_a_small_defect_is_found_in_tiles(tmp_path: Path) -> None:
    amounts = small_defects.Amounts(side=512, fit=3, calibration=2, test=4)
    params = {**PARAMS, "image_size": [128, 128]}
    found = small_defects.measure(tmp_path, amounts, params, {"tiles": {"tile": {"overlap": 32}}, "stretch": {}})
    assert [found["views"][name]["inputs_per_image"] for name in ("tiles", "stretch")] == [25, 1]
    assert found["views"]["tiles"]["image_auroc"] == 1.0 and found["views"]["tiles"]["at_the_right_place"] == 2
    assert {"constant", "textured"} == set(found["seams"])
    assert "2 of 2" in small_defects.tables(found)


def test_steps_at_seams_are_told_from_others() -> None:
    spec = {"tile": {"size": [16, 16], "overlap": 0}}
    layout = View.of_record(spec).layout((32, 32), (16, 16))
    map_HW = np.zeros((32, 32))
    map_HW[:, 16:] = 1
    assert small_defects.seam_steps(map_HW, layout) == {"seams": 0.5, "elsewhere": 0.0}
    assert [len(cuts) for cuts in small_defects.seams(View(STRETCH).layout((32, 32), (16, 16)))] == [0, 0]


@pytest.mark.parametrize("name", ["views", "small_defects"])
def test_the_stored_tables_are_those_of_the_stored_figures(name: str) -> None:
    figures = json.loads((views.RESULTS / f"{name}.json").read_text())
    shown = views.table(figures["lines"]) if name == "views" else small_defects.tables(figures)
    document = (views.RESULTS / "README.md").read_text()
    assert shown in document and views.replaced(document, name, shown) == document
