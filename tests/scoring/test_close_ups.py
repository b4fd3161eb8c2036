"""Close-ups: where they lie, that their px are those of the picture, and rows, zips and pages of whole jobs."""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from raydetect.config import FlagSpec, ServeSpec, ViewSpec, public_spec, result_digest, result_settings
from raydetect.export.coco import write_coco
from raydetect.gateway.single_images import online_spec
from raydetect.images import decode
from raydetect.images.decode import decode_and_cut, decode_image
from raydetect.images.opening import DecodeRules
from raydetect.images.rasters import opening
from raydetect.images.rasters.picture import RasterPicture
from raydetect.records import AnomalousRegion
from raydetect.report.build import report_html
from raydetect.report.pictures import Pictures, reach_of
from raydetect.sinks import parquet
from raydetect.sinks.close_ups import close_up_places, close_up_png
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.rows import read_rows
from raydetect.sinks.scored_chunk import SCHEMA, ScoredChunk
from raydetect.sinks.verify import verify
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.images import defect_image, encode, normal_image
from tests.builders.rasters import raster
from tests.local.test_local import SCORE, fit, rows, run, spec_of

RULES = DecodeRules(10**8, True)
CYAN = (0, 229, 255)
SCALE = 13  # 96 px become 1248, more than an overlay has
PATTERN = "source.pattern={category}/test/{defect}/{name}"


def region(x: int, y: int, width: int, height: int, peak: tuple[int, int] | None = None) -> AnomalousRegion:
    peak_x, peak_y = peak or (x, y)
    return AnomalousRegion(
        x=x, y=y, width=width, height=height, area_px=1, peak_score=1.0, peak_x=peak_x, peak_y=peak_y
    )


@pytest.mark.parametrize(
    ("found", "size", "expected"),
    [
        (region(1000, 800, 20, 10), (4000, 3000), (946, 741, 1074, 869)),  # its middle in the middle, 128 px
        (region(1000, 800, 100, 200), (4000, 3000), (950, 700, 1150, 1100)),  # twice its box
        (region(1000, 800, 400, 511), (4000, 3000), (944, 799, 1456, 1311)),  # all of it, 512 px
        (region(100, 800, 2000, 40, (1500, 810)), (4000, 3000), (1244, 756, 1756, 884)),  # a scratch: at its peak
        (region(0, 2990, 10, 10), (4000, 3000), (0, 2872, 128, 3000)),  # at the border: moved inside
        (region(3700, 0, 300, 3000, (3999, 0)), (4000, 3000), (3488, 0, 4000, 512)),
        (region(5, 40, 9, 9), (4000, 90), (0, 0, 128, 90)),  # a strip is as high as it is
    ],
)  # fmt: skip
def test_a_close_up_shows_the_surroundings_of_its_region(
    found: AnomalousRegion, size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert close_up_places([found], size) == [expected]


def test_the_first_of_many_large_regions_have_the_largest_close_ups() -> None:
    def sizes(regions: list[AnomalousRegion]) -> list[tuple[int, int]]:
        return [(right - left, lower - upper) for left, upper, right, lower in close_up_places(regions, (9000, 9000))]

    large_one, small_one = region(1000, 1000, 900, 900), region(5000, 5000, 3, 3)
    assert sizes([large_one] * 8) == [(512, 512)] * 8
    assert sizes([large_one] * 10) == [(512, 512)] * 7 + [(478, 478), (131, 131), (128, 128)]
    assert sizes([large_one] * 6 + [small_one] * 14) == [(512, 512)] * 6 + [(128, 128)] * 14
    assert sizes([large_one] * 200) == [(128, 128)] * 128


@given(st.integers(0, 300), st.tuples(st.integers(1, 30_000), st.integers(1, 30_000)), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_close_ups_lie_in_the_picture_hold_their_peaks_and_are_bounded_together(
    count: int, size: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    regions = []
    for _ in range(count):
        first, last = np.sort(random.integers(0, size, (2, 2)), axis=0)
        peak = random.integers(first, last + 1)
        regions.append(region(*first.tolist(), *(last - first + 1).tolist(), (int(peak[0]), int(peak[1]))))
    places = close_up_places(regions, size)
    assert len(places) == min(count, 128)
    assert sum((right - left) * (lower - upper) for left, upper, right, lower in places) <= 1 << 21
    for one, (left, upper, right, lower) in zip(regions, places, strict=False):
        assert 0 <= left <= one.peak_x < right <= size[0] and 0 <= upper <= one.peak_y < lower <= size[1]
        assert min(128, size[0]) <= right - left <= 512 and min(128, size[1]) <= lower - upper <= 512
        if one.width <= right - left:
            assert left <= one.x and one.x + one.width <= right
        if one.height <= lower - upper:
            assert upper <= one.y and one.y + one.height <= lower


def test_the_line_lies_around_the_region_and_all_else_is_the_picture() -> None:
    part_HWC = np.random.default_rng(3).integers(0, 200, (128, 160, 3)).astype(np.uint8)
    png = close_up_png(Image.fromarray(part_HWC), (500, 300, 660, 428), region(560, 340, 30, 20))
    shown_HWC = np.asarray(Image.open(io.BytesIO(png)))
    drawn_HW = np.zeros((128, 160), bool)
    drawn_HW[40 - 4 : 60 + 4, 60 - 4 : 90 + 4] = True
    drawn_HW[40 - 2 : 60 + 2, 60 - 2 : 90 + 2] = False
    assert np.array_equal(shown_HWC[~drawn_HW], part_HWC[~drawn_HW])
    cyan_HW = (shown_HWC == CYAN).all(-1)
    expected_HW = np.zeros((128, 160), bool)
    expected_HW[40 - 3 : 60 + 3, 60 - 3 : 90 + 3] = True
    expected_HW[40 - 2 : 60 + 2, 60 - 2 : 90 + 2] = False
    assert np.array_equal(cyan_HW, expected_HW) and not shown_HWC[drawn_HW & ~cyan_HW].any()


PLACES = [(0, 0, 128, 130), (201, 77, 345, 300), (272, 172, 400, 300)]


def strips(values_HWC: np.ndarray, orientation: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values_HWC).save(buffer, "TIFF", compression="tiff_adobe_deflate", tiffinfo={274: orientation})
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_parts_of_a_large_tiff_are_read_on_their_own(orientation: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    values_HWC = np.random.default_rng(5).integers(0, 256, (420, 400, 3)).astype(np.uint8)
    if orientation is None:
        data = raster(values_HWC, photometric="RGB", compress="deflate", tiled=True, blockxsize=64, blockysize=64)
    else:
        data = strips(values_HWC, orientation)
    picture = decode_image(data, RULES)
    small = picture.copy()
    small.thumbnail((100, 100))
    read: list[int] = []
    plain_read = RasterPicture.read

    def watched(self: RasterPicture, place: Any) -> Image.Image:
        read.append((place[2] - place[0]) * (place[3] - place[1]))
        return plain_read(self, place)

    def refused(*_: Any) -> Any:
        raise AssertionError("the whole picture was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(opening, "SHOWN_PIXELS", 10_000)
        patch.setattr(decode, "loaded_image", refused)
        patch.setattr(RasterPicture, "read", watched)
        whole, parts = decode_and_cut(data, RULES, 100, PLACES)
    assert max(whole.size) == max(small.size) == 100 and read[-3:] == [(r - x) * (b - y) for x, y, r, b in PLACES]
    for part, place in zip(parts, PLACES, strict=True):
        assert part.mode == "RGB" and np.array_equal(np.asarray(part), np.asarray(picture.crop(place)))


def test_parts_show_the_bands_and_the_range_of_the_view() -> None:
    values_HWC = np.random.default_rng(6).integers(0, 5000, (300, 320, 4)).astype(np.uint16)
    data = raster(values_HWC, tiled=True, blockxsize=64, blockysize=64)
    spec = ViewSpec(bands=(4, 1, 2), range=(1000, 3001))
    _, (part,) = decode_and_cut(data, RULES, 100, [(20, 30, 148, 158)], spec)
    expected_HWC = np.clip(np.rint((values_HWC[30:158, 20:148][..., [3, 0, 1]] - 1000.0) / 2001.0 * 255), 0, 255)
    assert np.array_equal(np.asarray(part), expected_HWC)


def large(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC.repeat(SCALE, 0).repeat(SCALE, 1)[:, : 1248 - 40]


def jpeg(image_HWC: np.ndarray) -> bytes:
    """A JPEG that is turned by its EXIF orientation."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


def large_files() -> dict[str, bytes]:
    """Large pictures in three formats with defects, large normal ones, and small ones with defects."""
    files = {f"widget/test/good/{i}.png": encode(large(normal_image(60_000 + i))) for i in range(2)}
    for i, defect in enumerate(("scratch", "blob", "spot", "blob")):
        image_HWC = large(defect_image(i, defect)[0])
        files[f"widget/test/{defect}/png{i}.png"] = encode(image_HWC)
        files[f"widget/test/{defect}/jpg{i}.jpg"] = jpeg(image_HWC)
        files[f"widget/test/{defect}/tif{i}.tif"] = raster(
            image_HWC, photometric="RGB", tiled=True, blockxsize=128, blockysize=128, compress="deflate"
        )
        files[f"widget/test/{defect}/small{i}.png"] = encode(defect_image(i, defect)[0])
    return files


@pytest.fixture
def files() -> Iterator[dict[str, bytes]]:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    made = large_files()
    pack("memory://data/mixed", ".tar", sorted(made.items()), 2)
    fit()
    yield made


def scored(*overrides: str) -> tuple[Any, dict[str, Any]]:
    return run(PATTERN, "flag.alpha=0.4", *overrides)


def stored(ledger: Ledger, uri: str) -> np.ndarray:
    match = re.fullmatch(r"zip://([^:]+)::" + re.escape(ledger.uri) + "/(.*)", uri)
    assert match is not None
    with zipfile.ZipFile(io.BytesIO(Storage().read(f"{ledger.uri}/{match[2]}"))) as pictures:
        return np.asarray(Image.open(io.BytesIO(pictures.read(match[1]))))


def boxes_HW(row: dict[str, Any], place: tuple[int, int, int, int], index: int) -> np.ndarray:
    """Where a line may be drawn in a close-up."""
    drawn_HW = np.zeros((row["height"] + 20, row["width"] + 20), bool)
    one = row["regions"][index]
    x, y, end_x, end_y = one["x"] + 10, one["y"] + 10, one["x"] + one["width"] + 10, one["y"] + one["height"] + 10
    drawn_HW[y - 4 : end_y + 4, x - 4 : end_x + 4] = True
    drawn_HW[y - 2 : end_y + 2, x - 2 : end_x + 2] = False
    return drawn_HW[place[1] + 10 : place[3] + 10, place[0] + 10 : place[2] + 10]


def check_rows(plan: Any, files: dict[str, bytes]) -> int:
    """Compares every close-up with its picture as Pillow decodes it; returns their number."""
    seen: dict[str, int] = {}
    for row in rows(plan):
        name = row["key"].partition("#")[2]
        if not row["regions"] or max(row["width"], row["height"]) <= 1024:
            assert row["close_up_uris"] is None
            continue
        kind = name.rpartition(".")[2]
        picture_HWC = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(files[name]))).convert("RGB"))
        assert picture_HWC.shape == (row["height"], row["width"], 3)
        places = close_up_places([AnomalousRegion(**one) for one in row["regions"]], (row["width"], row["height"]))
        for index, (uri, place) in enumerate(zip(row["close_up_uris"], places, strict=True)):
            shown_HWC = stored(plan.ledger, uri)
            left, upper, right, lower = place
            plain_HW = ~boxes_HW(row, place, index)
            assert np.array_equal(shown_HWC[plain_HW], picture_HWC[upper:lower, left:right][plain_HW])
            seen[kind] = seen.get(kind, 0) + 1
    assert set(seen) == {"png", "jpg", "tif"}
    return sum(seen.values())


def test_rows_of_a_job_name_close_ups_with_the_px_of_their_pictures(files: dict[str, bytes]) -> None:
    plan, manifest = scored()
    count = check_rows(plan, files)
    found = rows(plan)
    assert manifest["close_ups"] == count > 10
    assert manifest["heatmaps"] == sum(row["heatmap_uri"] is not None for row in found) == manifest["flagged"]
    assert any(row["flagged"] and row["regions"] and row["width"] == 96 for row in found)  # small: drawn in full
    assert verify(plan.ledger, lambda *_: None).whole
    pictures = Pictures(plan.ledger, plan.run, reach_of(plan.run).source)
    row = next(row for row in found if row["close_up_uris"])
    assert len(pictures.close_ups(row, 1)) == 1


def test_a_resumed_run_has_the_same_rows_and_bytes(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with zips of chunks, which their workers write."""
    for zip_bytes in (parquet.CHUNK_ZIP_BYTES, 50_000):
        monkeypatch.setattr(parquet, "CHUNK_ZIP_BYTES", zip_bytes)
        sink = f"memory://data/results-{zip_bytes}"
        whole, manifest = scored(f"sink.uri={sink}")
        names = [file.uri for file in Storage().list(f"{sink}/heatmaps")]
        assert any("chunk-" in name for name in names) == (zip_bytes == 50_000)
        before, kept = rows(whole), {name: Storage().read(name) for name in names}
        Storage().delete(f"{sink}/ledger/00001.json")
        Storage().delete(f"{sink}/manifest.json")
        Storage().delete(next(name for name in names if "shard=00001" in name))
        again, after = scored(f"sink.uri={sink}")
        assert rows(again) == before and after == manifest
        assert {name: Storage().read(name) for name in names} == kept
        assert check_rows(again, files) == manifest["close_ups"] and verify(again.ledger, lambda *_: None).whole


def test_a_missing_close_up_is_damage(files: dict[str, bytes]) -> None:
    plan, _ = scored()
    path = "memory://data/results/heatmaps/shard=00000/part-0000.zip"
    with zipfile.ZipFile(io.BytesIO(Storage().read(path))) as pictures:
        kept = {name: pictures.read(name) for name in pictures.namelist()[:-1]}
    Storage().write(path, parquet.zip_pictures(kept))
    assert not verify(plan.ledger, lambda *_: None).whole


def test_a_job_may_have_none_and_maps_have_none(files: dict[str, bytes]) -> None:
    for override in ("sink.close_ups=false", "sink.style=map", "sink.heatmaps=none", "sink.max_regions=0"):
        plan, manifest = scored(override, f"sink.uri=memory://data/{override.replace('=', '-')}")
        assert manifest["close_ups"] == 0 and all(row["close_up_uris"] is None for row in rows(plan))


def test_with_a_false_discovery_rate_images_that_are_not_flagged_lose_theirs(files: dict[str, bytes]) -> None:
    plan, manifest = run(PATTERN, "flag={fdr: 0.2}")
    read = [row for _, _, table in read_rows(plan.ledger) for row in table.to_pylist()]
    assert manifest["flagged"] == sum(row["flagged"] for row in read)
    assert all(row["close_up_uris"] is None for row in read if not row["flagged"])
    assert manifest["close_ups"] >= sum(len(row["close_up_uris"] or ()) for row in read)


def test_the_page_shows_stored_close_ups_and_decodes_no_large_picture(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, manifest = scored()
    asked: list[int | None] = []
    plain = Pictures.decoded

    def watched(self: Pictures, data: bytes, longest_px: int | None = None) -> Image.Image:
        asked.append(longest_px)
        return plain(self, data, longest_px)

    monkeypatch.setattr(Pictures, "decoded", watched)
    text = report_html(plan.ledger)
    found = sum(min(4, len(row["close_up_uris"] or ())) for row in rows(plan))
    assert text.count('<img class="close-up"') == found > 5 and f"{manifest['close_ups']:,} close-ups" in text
    assert all(longest == 1024 for longest in asked)
    assert text.count('<img class="zoom"') == sum(
        bool(row["regions"]) and not row["close_up_uris"] for row in rows(plan)
    )
    Storage().delete("memory://data/results/heatmaps/shard=00000/part-0000.zip")
    assert "No close-ups: " in report_html(plan.ledger)


def test_coco_has_the_regions_as_before(files: dict[str, bytes], tmp_path: Path) -> None:
    plan, manifest = scored()
    pictures = Pictures(plan.ledger, plan.run, reach_of(plan.run).source)
    assert write_coco(pictures, tmp_path / "c.json", None, True)[1] == manifest["regions"] > 0


def test_results_of_a_version_without_close_ups_are_resumed_and_read(tmp_path: Path) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
    sink = f"sink.uri=file://{tmp_path}"
    run(sink)
    for path in (tmp_path / "scores").rglob("*.parquet"):
        pq.write_table(pq.ParquetFile(path).read().drop_columns(["close_up_uris"]), path)
    for path in [*(tmp_path / "ledger").glob("*.json"), tmp_path / "run.json", tmp_path / "manifest.json"]:
        body = json.loads(path.read_text())
        for part in body["parts"] if isinstance(body.get("parts"), list) else []:
            part["bytes"], part["sha256"] = (tmp_path / part["path"]).stat().st_size, ""
            del part["close_ups"]
        body.pop("close_ups", None)
        body.get("spec", {}).get("sink", {}).pop("close_ups", None)
        path.write_text(json.dumps(body))
    (tmp_path / "ledger" / "00001.json").unlink()
    assert verify(Ledger(f"file://{tmp_path}", Storage()), lambda *_: None).damaged == set()
    (tmp_path / "manifest.json").unlink()
    again, manifest = run(sink)
    assert len(again.todo) == 1 and manifest["rows"] == 17 and verify(again.ledger, lambda *_: None).whole
    tables = [table for _, _, table in read_rows(again.ledger)]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    assert "Most anomalous" in report_html(again.ledger)


def test_without_close_ups_it_is_another_job_and_the_usual_setting_is_not_written_down() -> None:
    usual, other = spec_of(SCORE), spec_of(SCORE, "sink.close_ups=false")
    assert "close_ups" not in result_settings(public_spec(usual))["sink"]
    assert result_settings(public_spec(other))["sink"]["close_ups"] is False
    assert result_digest(usual) != result_digest(other)


def test_close_ups_travel_with_their_chunk(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """As between the machines of a cluster."""
    plan, _ = scored()
    before = rows(plan)
    plain = parquet.ResultsSink.write

    def travelled(self: parquet.ResultsSink, *given: Any) -> ScoredChunk:
        chunk = plain(self, *given)
        again = ScoredChunk.from_bytes(chunk.to_bytes())
        assert dict(again.close_ups) == dict(chunk.close_ups) and again.picture_bytes == chunk.picture_bytes
        return again

    monkeypatch.setattr(parquet.ResultsSink, "write", travelled)
    Storage().filesystem("memory://data/results")[0].rm("/data/results", recursive=True)
    again, _ = scored()
    assert rows(again) == before


def test_single_images_make_none() -> None:
    served = ServeSpec(kind="serve", detectors={"a": "memory://data/artifact"})
    assert not online_spec(served, "memory://data/artifact", FlagSpec(alpha=0.1)).sink.close_ups
