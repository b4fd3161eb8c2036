"""Exports: run lengths and polygons against slow loops and pycocotools, and files that other tools open safely."""

import csv
import io
import json
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from raydetect.cli.main import main
from raydetect.errors import SpecError
from raydetect.export.coco import write_coco
from raydetect.export.naming import file_name
from raydetect.export.outlines import length_text, polygon, regions, run_lengths
from raydetect.export.table import write_csv
from raydetect.report.pictures import Pictures
from raydetect.sinks.csv_cells import PUT, cell
from raydetect.sinks.rows import read_rows
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.results import HOSTILE, make_results, names_of
from tests.local.test_local import fit, run
from tests.reference.regions import flood
from tests.scoring.test_regions import maps_of

masks = st.integers(1, 9).flatmap(
    lambda height: st.integers(1, 9).flatmap(
        lambda width: st.lists(st.booleans(), min_size=height * width, max_size=height * width).map(
            lambda bits: np.asarray(bits, dtype=bool).reshape(height, width)
        )
    )
)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def slow_lengths(text: str) -> list[int]:
    """Run lengths of COCO's text form, letter by letter."""
    lengths: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        while True:
            bits = ord(text[place]) - 48
            place += 1
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:
                    value -= 1 << shift
                break
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
    return lengths


def slow_mask(lengths: list[int], height: int, width: int) -> np.ndarray:
    """The mask of run lengths, pixel by pixel."""
    flat = [place % 2 for place, length in enumerate(lengths) for _ in range(length)]
    assert len(flat) == height * width
    return np.asarray([[flat[x * height + y] for x in range(width)] for y in range(height)], dtype=bool)


def slow_filled(outline: list[int], height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies inside a polygon: an odd number of its edges to the right."""
    points = list(zip(outline[::2], outline[1::2], strict=True))
    inside = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            crossings = 0
            for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
                if x1 == x2 and x1 > x + 0.5 and min(y1, y2) < y + 0.5 < max(y1, y2):
                    crossings += 1
            inside[y, x] = crossings % 2 == 1
    return inside


def without_holes(mask: np.ndarray) -> np.ndarray:
    """A region with what it encloses: all that a flood from outside, also across corners, does not reach."""
    padded = Image.fromarray(np.pad(mask, 1).astype(np.uint8) * 255)
    flooded, wide = np.asarray(padded) > 0, True
    reached = np.zeros_like(flooded)
    reached[0, 0] = True
    while wide:
        near = reached.copy()
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                near |= np.roll(reached, (down, across), axis=(0, 1))
        near &= ~flooded
        wide = bool((near != reached).any())
        reached = near
    return ~reached[1:-1, 1:-1]


@given(masks)
@settings(max_examples=150, deadline=None)
def test_run_lengths_and_their_text_give_the_mask_back(mask: np.ndarray) -> None:
    lengths = run_lengths(mask)
    text = length_text(lengths)
    assert slow_lengths(text) == lengths
    assert (slow_mask(lengths, *mask.shape) == mask).all()


@given(masks)
@settings(max_examples=150, deadline=None)
def test_regions_are_the_parts_of_a_mask_and_polygons_enclose_them(mask: np.ndarray) -> None:
    found = list(regions(mask))
    assert (sum((region.mask_HW.astype(int) for region in found), np.zeros(mask.shape, int)) == mask).all()
    for region in found:
        rows, columns = np.nonzero(region.mask_HW)
        width, height = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
        assert region.box == (columns.min(), rows.min(), width, height)
        assert region.area_px == region.mask_HW.sum()
        assert (slow_filled(polygon(region), *mask.shape) == without_holes(region.mask_HW)).all()


@given(masks)
@settings(max_examples=100, deadline=None)
def test_pycocotools_reads_both(mask: np.ndarray) -> None:
    packed = {"size": list(mask.shape), "counts": length_text(run_lengths(mask)).encode()}
    assert (coco.decode(packed) == mask).all()
    assert coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] == packed["counts"]
    for region in regions(mask):
        drawn = coco.decode(coco.merge(coco.frPyObjects([polygon(region)], *mask.shape)))
        assert (drawn == without_holes(region.mask_HW)).all()


def test_a_large_blob_with_a_hole() -> None:
    picture = Image.new("1", (300, 200))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 10, 280, 190), fill=1)
    draw.ellipse((100, 60, 200, 140), fill=0)
    mask = np.asarray(picture)
    (region,) = regions(mask)
    assert (slow_mask(slow_lengths(length_text(run_lengths(mask))), 200, 300) == mask).all()
    assert region.box == (20, 10, 261, 181)
    assert (slow_filled(polygon(region), 200, 300) == without_holes(mask)).all()


def test_file_names_are_flat_and_differ() -> None:
    members = (*HOSTILE, "a/b.png", "a-b.png", "../../etc/x.JPG", "", "\u00e9.png")
    names = {file_name(f"s3://b/a.tar#{member}", "tar://x::s3://b/a.tar") for member in members}
    assert len(names) == len(members)
    for name in names:
        assert all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in name)
        assert name.count(".") <= 1 and not name.startswith((".", "-"))
    assert file_name("s3://b/a#1.tar#bolt/x.JPG", "tar://x::s3://b/a#1.tar").startswith("bolt-x-")
    assert file_name("k#x.JPG", "k/x.JPG").endswith(".jpg")


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_holds_the_thresholded_maps(tmp_path: Path, polygons: bool) -> None:
    ledger = make_results(f"file://{tmp_path}", names_of(18), "map")
    options = ["--polygons"] if polygons else []
    ended = call("export", ledger.uri, "--as", "coco", "-o", f"{tmp_path}/c.json", "--map-threshold", "3", *options)
    assert ended.exit_code == 0 and f"Annotations: {tmp_path}/c.json" in ended.output, ended.output
    body = json.loads((tmp_path / "c.json").read_text())
    pictures = Pictures(ledger, ledger.require_run(), Storage())
    rows = {row["key"]: row for _, _, table in read_rows(ledger) for row in table.to_pylist() if row["heatmap_uri"]}
    assert len(body["images"]) == len(rows) == 15 and body["info"]["map_threshold"] == 3
    of_image: dict[int, list[dict[str, object]]] = {image["id"]: [] for image in body["images"]}
    for annotation in body["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    for image in body["images"]:
        row = rows[image["key"]]
        expected = pictures.anomaly_map(row) >= 3
        drawn = np.zeros((96, 96), dtype=bool)
        for annotation in of_image[image["id"]]:
            outline = annotation["segmentation"]
            if polygons:
                drawn |= slow_filled(outline[0], 96, 96)  # type: ignore[index]
            else:
                drawn |= slow_mask(slow_lengths(outline["counts"]), 96, 96)  # type: ignore[call-overload,index]
        assert (drawn == expected).all() and expected.any() == row["flagged"]
    assert sum(annotation["area"] for annotation in body["annotations"]) == sum(
        int((pictures.anomaly_map(row) >= 3).sum()) for row in rows.values()
    )


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("view", ["{}", "{size: [96, 96], crop: [64, 64]}"])
def test_coco_has_one_annotation_for_each_region_with_the_numbers_of_its_row(
    tmp_path: Path, view: str, polygons: bool
) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit(f"view={view}")
    plan, manifest = run("sink.style=map", "sink.heatmaps=flagged")
    pictures = Pictures(plan.ledger, plan.ledger.require_run(), Storage())
    counts = write_coco(pictures, tmp_path / "c.json", None, polygons)
    body = json.loads((tmp_path / "c.json").read_text())
    flagged = {row["key"]: row for _, _, table in read_rows(plan.ledger) for row in table.to_pylist() if row["flagged"]}
    assert counts == (len(flagged), manifest["regions"]) == (len(body["images"]), len(body["annotations"]))
    assert manifest["regions"] > 5
    maps = maps_of(plan, list(flagged))
    corner, pitch = (Fraction(0), Fraction(3, 2)) if view == "{}" else (Fraction(16), Fraction(1))
    for image in body["images"]:
        row = flagged[image["key"]]
        found = [one for one in body["annotations"] if one["image_id"] == image["id"]]
        told = sorted(flood(maps[row["key"]], manifest["region_threshold"]["value"]), key=lambda region: -max(
            maps[row["key"]][pixel] for pixel in region
        ))  # fmt: skip
        for annotation, region, pixels in zip(found, row["regions"], told, strict=True):
            assert annotation["bbox"] == [region[name] for name in ("x", "y", "width", "height")]
            assert (annotation["area"], annotation["score"]) == (region["area_px"], region["peak_score"])
            expected = np.zeros((96, 96), dtype=bool)
            for y, x in np.ndindex(96, 96):
                half = Fraction(1, 2)
                expected[y, x] = (int((y + half - corner) // pitch), int((x + half - corner) // pitch)) in pixels
            if polygons:
                drawn = np.zeros((96, 96), dtype=bool)
                for outline in annotation["segmentation"]:
                    drawn |= slow_filled(outline, 96, 96)
            else:
                drawn = slow_mask(slow_lengths(annotation["segmentation"]["counts"]), 96, 96)
            assert not (expected & ~drawn).any()  # the stored map is rounded: some pixels more
            whole = without_holes(expected) if polygons else expected
            assert (drawn & ~whole).sum() <= 4
            rows, columns = np.nonzero(drawn)
            assert (columns.min(), rows.min()) == (region["x"], region["y"])
            assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (region["width"], region["height"])


def test_coco_of_a_run_with_overlays_has_the_boxes_of_the_regions(tmp_path: Path) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
    plan, manifest = run("sink.heatmaps=none")
    pictures = Pictures(plan.ledger, plan.ledger.require_run(), Storage())
    assert write_coco(pictures, tmp_path / "c.json", None, True)[1] == manifest["regions"] > 0
    body = json.loads((tmp_path / "c.json").read_text())
    assert body["info"]["outlines"].startswith("boxes")
    for annotation in body["annotations"]:
        x, y, width, height = annotation["bbox"]
        box = np.zeros((96, 96), dtype=bool)
        box[y : y + height, x : x + width] = True
        assert (slow_filled(annotation["segmentation"][0], 96, 96) == box).all()
    with pytest.raises(SpecError, match="outlines need anomaly maps"):
        write_coco(pictures, tmp_path / "d.json", 3.0, True)


def test_csv_holds_regions_as_json(tmp_path: Path) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
    ledger = run()[0].ledger
    assert write_csv(ledger, tmp_path / "rows.csv") == 17
    rows = [row for _, _, table in read_rows(ledger) for row in table.to_pylist()]
    with (tmp_path / "rows.csv").open(newline="") as handle:
        for line, row in zip(csv.DictReader(handle), rows, strict=True):
            assert (json.loads(line["regions"]) if line["regions"] else None) == row["regions"]
    assert any(row["regions"] for row in rows)


def test_outlines_of_overlays_are_refused(tmp_path: Path) -> None:
    ledger = make_results(f"file://{tmp_path}", names_of(6))
    ended = call("export", ledger.uri, "--as", "coco", "-o", f"{tmp_path}/c.json")
    assert ended.exit_code == 2 and "sink.style: map" in ended.output and not (tmp_path / "c.json").exists()
    assert "Leave them out" in call("export", ledger.uri, "--as", "csv", "--polygons").output
    assert call("export", ledger.uri, "--as", "csv", "-o", str(tmp_path)).exit_code == 2


def test_csv_holds_every_row_and_no_formula(tmp_path: Path) -> None:
    names = names_of(9)
    names[0].insert(0, "=1+1/test/x/a.png")
    ledger = make_results(f"file://{tmp_path}", names)
    ended = call("export", ledger.uri, "--as", "csv", "-o", f"{tmp_path}/new/rows.csv")
    assert ended.exit_code == 0 and "Wrote 10 rows." in ended.output
    with (tmp_path / "new" / "rows.csv").open(newline="") as handle:
        written = list(csv.DictReader(handle))
    rows = [row for _, _, table in read_rows(ledger) for row in table.to_pylist()]
    for line, row in zip(written, rows, strict=True):
        for name, value in row.items():
            text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert line[name].removeprefix("'") == text
    assert any(line["category"] == "'=1+1" for line in written)
    assert not any(value.startswith(("=", "+", "@")) for line in written for value in line.values())


FORMULAS = [
    "=1+cmd|calc!A0",
    "+1",
    "-1",
    "@SUM(A1)",
    "\uff1d1",
    "\uff0b1",
    "\uff0d1",
    "\uff201",
    "  =1",
    '"=1',
    "\u200b=1",
]
SEPARATORS = [",", ";", "\t", "|", "\n", "\r", "\r\n"]
hostile_texts = st.lists(st.sampled_from([*FORMULAS, *SEPARATORS, "'", '"', " ", "x", "a;", "|"]), max_size=6).map(
    "".join
)


def as_spreadsheets_read(text: str, delimiter: str) -> list[str]:
    return [field for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) for field in row]


@given(st.lists(st.lists(hostile_texts | st.floats(-9, 9), min_size=1, max_size=4), min_size=1, max_size=3))
@example([["x" + before + blank + text] for before in SEPARATORS for text in FORMULAS for blank in ("", " ", '"')])
@settings(max_examples=400, deadline=None)
def test_no_separator_makes_a_formula_of_a_text_and_every_text_comes_back(table: list[list[Any]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["key", *map(cell, row)] for row in table])
    for delimiter in ",;\t|":
        for field in as_spreadsheets_read(out.getvalue(), delimiter):
            begin = field.lstrip(' "\n\r\t\u200b')
            is_number = delimiter == "," and re.fullmatch(r"-[0-9.e-]+", begin)
            assert is_number or not begin.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")), (field, delimiter)
    rows = list(csv.reader(io.StringIO(out.getvalue(), newline="")))
    for written, row in zip(rows, table, strict=True):
        for text, value in zip(written[1:], row, strict=True):
            assert (PUT.sub(r"\1", text) if isinstance(value, str) else float(text)) == value


def test_guarding_a_long_text_is_linear() -> None:
    started = time.thread_time()
    for text in (";" * 200_000, "\n" * 200_000, " " * 200_000, "'" * 200_000, '"; ' * 70_000 + "x"):
        assert cell(text) == text
    assert time.thread_time() - started < 2.0


@pytest.mark.parametrize("style", ["overlay", "map"])
def test_the_folder_holds_flagged_images_as_they_are_stored(tmp_path: Path, style: str) -> None:
    names = names_of(12)
    names[2] += [name.replace("/", "_") for name in HOSTILE]
    ledger = make_results(f"file://{tmp_path}", names, style)
    ended = call("export", ledger.uri, "--as", "folder", "-o", f"{tmp_path}/out")
    rows = [row for _, _, table in read_rows(ledger) for row in table.to_pylist()]
    flagged = [row for row in rows if row["flagged"]]
    assert ended.exit_code == 0 and f"Wrote {len(flagged)} flagged images.\n" in ended.output, ended.output
    pictures = Pictures(ledger, ledger.require_run(), Storage())
    with (tmp_path / "out" / "flagged.csv").open(newline="") as handle:
        for line, row in zip(csv.DictReader(handle), flagged, strict=True):
            assert (tmp_path / "out" / line["image"]).read_bytes() == pictures.encoded(row["image_uri"])
            assert Image.open(tmp_path / "out" / line["overlay"]).size == (96, 96)
    assert len(list((tmp_path / "out" / "images").iterdir())) == len(flagged)
    (tmp_path / "archive" / "part-0.tar").unlink()
    again = call("export", ledger.uri, "--as", "folder", "-o", f"{tmp_path}/again")
    assert again.exit_code == 0 and "pictures could not be read" in again.output
