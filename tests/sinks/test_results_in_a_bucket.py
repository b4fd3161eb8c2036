"""`status`, `verify`, `report` and `export` of results in an object store, with keys from the environment."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from raydetect.cli.main import main
from tests.builders.results import make_results, names_of
from tests.objectstore import ObjectStore, free_port


@pytest.fixture
def results(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URI of a run in a bucket and the options to access it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    ledger = make_results(object_store.uri("line"), names_of(12), "map", object_store)
    return [ledger.uri, "--endpoint-url", object_store.endpoint_url]


def output_of(*arguments: str) -> str:
    ended = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_status_report_and_exports_work(results: list[str], tmp_path: Path, object_store: ObjectStore) -> None:
    assert "finished" in output_of("status", *results)
    page = tmp_path / "report.html"
    assert str(page) in output_of("report", *results, "-o", str(page))
    text = page.read_text()
    assert text.count("data:image/jpeg") >= 8 and "No image:" not in text and object_store.secret not in text
    output_of("export", *results, "--as", "csv", "-o", str(tmp_path / "rows.csv"))
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    output_of("export", *results, "--as", "coco", "-o", str(tmp_path / "coco.json"))
    assert json.loads((tmp_path / "coco.json").read_text())["annotations"]
    output_of("export", *results, "--as", "folder", "-o", str(tmp_path / "flagged"))
    with (tmp_path / "flagged" / "flagged.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all((tmp_path / "flagged" / row["image"]).stat().st_size for row in rows)


def test_damage_in_a_bucket_is_found_and_repaired(results: list[str], object_store: ObjectStore) -> None:
    assert "3 shards, 3 parts, 3 heatmap zips: all intact." in output_of("verify", *results)
    object_store.storage.delete(f"{results[0]}/scores/shard=00001/part-0000.parquet")
    object_store.storage.write(f"{results[0]}/heatmaps/shard=00002/part-0000.zip", b"PK")
    ended = CliRunner().invoke(main, ["verify", *results, "--repair"], catch_exceptions=False)
    assert ended.exit_code == 1 and "(scores/shard=00001/part-0000.parquet)" in ended.output
    assert "(heatmaps/shard=00002/part-0000.zip)" in ended.output
    assert "not finished" in output_of("status", *results) and "1 of 3 committed" in output_of("status", *results)
    assert "1 shards, 1 parts, 1 heatmap zips: all intact." in output_of("verify", *results)
    missing = CliRunner().invoke(main, ["verify", f"{results[0]}/nowhere", *results[1:]])
    assert missing.exit_code == 2 and "holds no run.json" in missing.output


def test_a_wrong_endpoint_is_an_error_of_one_sentence(results: list[str], tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"  # s3fs keeps one client per endpoint, with the keys of its first use
    for command in (["report", results[0], "-o", str(tmp_path / "r.html")], ["export", results[0], "--as", "csv"]):
        ended = CliRunner().invoke(main, [*command, "--endpoint-url", nowhere])
        assert ended.exit_code == 1 and "cannot be reached" in ended.output and "Traceback" not in ended.output
