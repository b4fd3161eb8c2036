"""Sinks: rows readable by any Parquet reader, heatmaps by URI, the ledger and its checks."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydetect.errors import ResumeError, StorageError
from raydetect.export.table import write_csv
from raydetect.records import Chunk, Receipt, Row
from raydetect.sinks.heatmaps import map_png, overlay_png, ramp_colours, read_map_png
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import ResultsSink, encode_rows, zip_pictures
from raydetect.sinks.rows import read_part, read_rows
from raydetect.sinks.run_progress import labelled_auroc, progress
from raydetect.sinks.scored_chunk import SCHEMA
from raydetect.storage import Storage
from tests.builders.ledgers import write_part

GOLDEN = [
    "key: string not null",
    "image_uri: string not null",
    "chunk: string not null",
    "status: string not null",
    "error: string not null",
    "width: int32",
    "height: int32",
    "brightness: double",
    "sharpness: double",
    "image_score: double",
    "p_value: double",
    "threshold: double",
    "flagged: bool",
    "heatmap_uri: string",
    "artifact: string not null",
    "label: int8",
    "category: string",
    "defect: string",
    "mask_uri: string",
    "meta: string not null",
    "note: string not null",
    "sha256: string not null",
    "regions: list<item: struct<x: int32 not null, y: int32 not null, width: int32 not null, height: int32 not nul "
    "(... 105 chars omitted)",
    "  child 0, item: struct<x: int32 not null, y: int32 not null, width: int32 not null, height: int32 not null, "
    "area_px: (... 93 chars omitted)",
    "      child 0, x: int32 not null",
    "      child 1, y: int32 not null",
    "      child 2, width: int32 not null",
    "      child 3, height: int32 not null",
    "      child 4, area_px: int64 not null",
    "      child 5, peak_score: double not null",
    "      child 6, peak_x: int32 not null",
    "      child 7, peak_y: int32 not null",
    "regions_left_out: int64",
    "close_up_uris: list<item: string>",
    "  child 0, item: string",
]


def rows(chunk: Chunk, count: int = 5) -> list[Row]:
    scored = [
        Row(
            key=f"s3://b/a.tar#{i}.png",
            image_uri=f"tar://{i}.png::s3://b/a.tar",
            chunk=chunk.id,
            status="ok",
            image_score=i / 3,
            p_value=0.5,
            threshold=1.0,
            flagged=i > 3,
            label=int(i > 3),
            artifact="d",
        )
        for i in range(count)
    ]
    return [*scored, Row(key="bad", image_uri="x", chunk=chunk.id, status="empty", error="zero bytes")]


def write_run(uri: str, shards: int = 3) -> Ledger:
    storage = Storage()
    sink, ledger = ResultsSink(uri, storage), Ledger(uri, storage)
    ledger.begin({"result": {"spec": {"a": 1}}, "num_shards": shards})
    for shard in range(shards):
        parts = []
        for number in range(2):
            chunk = Chunk(shard, number, number == 1, ())
            parts.append(write_part(sink, chunk, rows(chunk), {0: b"png0", 4: b"png4"}))
        statuses = {"ok": 10, "empty": 2}
        sink.commit(Receipt(shard=shard, uri="u", fingerprint="f", rows=12, statuses=statuses, parts=tuple(parts)))
    return ledger


def test_the_schema_is_unchanged() -> None:
    assert str(SCHEMA).split("\n") == GOLDEN
    table = pq.read_table(io.BytesIO(encode_rows(rows(Chunk(0, 0, True, ())))))
    assert table.schema.equals(SCHEMA)
    assert pq.ParquetFile(io.BytesIO(encode_rows([]))).metadata.num_rows == 0


def test_compression_is_zstd_and_bytes_are_repeatable() -> None:
    data = encode_rows(rows(Chunk(0, 0, True, ())))
    assert pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).compression == "ZSTD"
    assert data == encode_rows(rows(Chunk(0, 0, True, ())))
    assert zip_pictures({"2": b"b", "1": b"a"}) == zip_pictures({"1": b"a", "2": b"b"})


def test_duckdb_pandas_and_pyarrow_read_the_scores(tmp_path: Path) -> None:
    write_run(f"file://{tmp_path}")
    folder = tmp_path / "scores"
    parts = f"read_parquet('{folder}/**/*.parquet', hive_partitioning=1)"
    count, total, last = duckdb.sql(f"select count(*), sum(image_score), max(shard) from {parts}").fetchall()[0]
    frame = pd.read_parquet(folder)
    table = ds.dataset(folder, partitioning="hive").to_table()
    assert count == len(frame) == table.num_rows == 36
    assert total == pytest.approx(frame["image_score"].sum()) and int(last) == 2
    assert sorted(frame["shard"].astype(str).unique()) == ["0", "1", "2"]
    assert frame.loc[frame["status"] == "empty", "image_score"].isna().all()
    uri = frame.loc[frame["heatmap_uri"].notna(), "heatmap_uri"].iloc[1]
    with fsspec.open(uri) as handle:
        assert handle.read() == b"png4"


def test_notes_are_counted_and_reported(tmp_path: Path) -> None:
    sink, chunk = ResultsSink(f"file://{tmp_path}", Storage()), Chunk(0, 0, True, ())
    noted = [
        replace(row, note=note)
        for row, note in zip(rows(chunk, 2), ("exif_ignored; pages_not_read: 3", "", "exif_ignored"), strict=True)
    ]
    part = write_part(sink, chunk, noted, {})
    assert part.notes == {"exif_ignored": 2, "pages_not_read": 1}
    ledger = Ledger(f"file://{tmp_path}", Storage())
    ledger.begin({"result": {"spec": {}}, "num_shards": 1})
    ledger.write_receipt(
        Receipt(shard=0, uri="u", fingerprint="f", rows=3, statuses=part.statuses, parts=(part,), committed_unix=1.0)
    )
    found = progress(ledger)
    assert "Notes      2 exif_ignored, 1 pages_not_read" in found.lines() and found.plain()["notes"] == part.notes
    assert ledger.finish({})["notes"] == {"exif_ignored": 2, "pages_not_read": 1}
    table = read_part(ledger, part, ("key", "note"))
    assert table["note"].to_pylist() == [row.note for row in noted]


@pytest.mark.parametrize("columns", [None, ("key", "status"), ("note", "key")])
def test_parts_without_note_and_sha256_columns_are_read(tmp_path: Path, columns: tuple[str, ...] | None) -> None:
    ledger = write_run(f"file://{tmp_path}")
    for path in (tmp_path / "scores").rglob("*.parquet"):
        pq.write_table(pq.ParquetFile(path).read().drop_columns(["note", "sha256"]), path)
    for path in (tmp_path / "ledger").glob("*.json"):
        record = json.loads(path.read_text())
        for part in record["parts"]:
            del part["notes"]
        path.write_text(json.dumps(record))
    tables = [table for _, _, table in read_rows(ledger, columns)]
    assert all(table.column_names == list(columns or SCHEMA.names) for table in tables)
    if columns is None:
        assert tables[0].schema.equals(SCHEMA) and set(tables[0]["note"].to_pylist()) == {""}
    assert progress(ledger).totals.notes == {}
    assert write_csv(ledger, tmp_path / "rows.csv") == 36


def test_writing_a_chunk_twice_changes_nothing(tmp_path: Path) -> None:
    write_run(f"file://{tmp_path}")
    before = {p: p.read_bytes() for p in (tmp_path / "scores").rglob("*.parquet")}
    write_run(f"file://{tmp_path}")
    assert before == {p: p.read_bytes() for p in (tmp_path / "scores").rglob("*.parquet")}
    with zipfile.ZipFile(tmp_path / "heatmaps" / "shard=00001" / "part-0001.zip") as archive:
        assert archive.namelist() == ["0001-000000.png", "0001-000004.png"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_only_committed_shards_count(tmp_path: Path) -> None:
    ledger = write_run(f"file://{tmp_path}")
    (tmp_path / "ledger" / "00001.json").unlink()
    (tmp_path / "ledger" / "notes.txt").write_text("a user's note")
    assert ledger.committed() == {0, 2}
    assert len(ledger.part_uris()) == 4 and not any("shard=00001" in uri for uri in ledger.part_uris())
    found = progress(ledger)
    assert (found.totals.rows, found.totals.bad_rows, found.finished) == (24, 4, False)
    assert "2 of 3 committed" in "\n".join(found.lines())
    assert labelled_auroc(ledger) == (1.0, 20)


def test_a_directory_of_another_job_is_refused_with_the_differences(tmp_path: Path) -> None:
    ledger = write_run(f"file://{tmp_path}")
    ledger.begin({"result": {"spec": {"a": 1}}, "num_shards": 3})
    with pytest.raises(ResumeError, match=r"spec\.a: 1 -> 2"):
        ledger.begin({"result": {"spec": {"a": 2}}})


@pytest.mark.parametrize("name", ["run.json", "manifest.json"])
def test_damaged_and_newer_records_are_refused(tmp_path: Path, name: str) -> None:
    ledger = write_run(f"file://{tmp_path}")
    (tmp_path / name).write_text('{"format_version": 99}')
    with pytest.raises(ResumeError, match="has format 99"):
        progress(ledger)
    (tmp_path / name).write_text('{"format')
    with pytest.raises(StorageError, match="is damaged"):
        progress(ledger)


def test_a_damaged_receipt_is_an_error(tmp_path: Path) -> None:
    ledger = write_run(f"file://{tmp_path}")
    path = tmp_path / "ledger" / "00002.json"
    for text in ("[]", "{}", json.dumps({**json.loads(path.read_text()), "rows": "many"})):
        path.write_text(text)
        with pytest.raises(StorageError, match="damaged"):
            ledger.receipt(2)
    with pytest.raises(StorageError, match="holds no run"):
        progress(replace(ledger, uri=f"file://{tmp_path}/elsewhere"))


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(0.01, 100), st.integers(0, 2**31))
def test_a_map_round_trips_through_png_within_half_a_step(low: float, width: float, seed: int) -> None:
    high = low + width
    original = np.random.default_rng(seed).uniform(low, high, (9, 7)).astype(np.float32).clip(low, high)
    data, clipped = map_png(original, low, high)
    step = width / 65535
    allowed = step / 2 + 4 * np.finfo(np.float32).eps * max(abs(low), abs(high))
    assert np.abs(read_map_png(data, low, high).astype(np.float64) - original).max() <= allowed
    assert clipped <= (original.astype(np.float64) < low).sum() + (original.astype(np.float64) > high).sum()
    assert Image.open(io.BytesIO(data)).mode.startswith("I;16")


def test_clipped_pixels_are_counted_and_a_bad_scale_is_refused() -> None:
    data, clipped = map_png(np.array([[-1.0, 0.5, 2.0]]), 0.0, 1.0)
    assert clipped == 2
    np.testing.assert_allclose(read_map_png(data, 0.0, 1.0), [[0.0, 0.5, 1.0]], atol=1e-5)
    with pytest.raises(ValueError, match="high > low"):
        map_png(np.zeros((1, 1)), 1.0, 1.0)


def test_an_overlay_leaves_the_normal_range_unchanged_and_marks_the_rest() -> None:
    image = np.full((40, 60, 3), 120, np.uint8)
    heat = np.zeros((10, 15), np.float32)
    heat[4:7, 9:12] = 10.0
    drawn = np.asarray(Image.open(io.BytesIO(overlay_png(image, heat, 0.0, 10.0)))).astype(int)
    assert drawn.shape == image.shape
    assert (drawn[:, :20] == 120).all()
    assert np.abs(drawn[20, 40] - 120).max() > 60
    lightness = ramp_colours(np.linspace(0, 1, 50)) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 0).all()
