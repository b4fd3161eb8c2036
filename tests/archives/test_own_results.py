"""A sink may lie inside its source: what raydetect writes is never taken for images, whatever pattern finds it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from raydetect.archives.open import open_archive
from raydetect.config import SourceSpec
from raydetect.storage import Storage
from tests.audit.test_audit import call, job, summary
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.nights import audit_job
from tests.local.test_local import fit, rows, run


@pytest.fixture
def data() -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()


def keys(plan: Any) -> list[str]:
    return [row["key"] for row in rows(plan)]


@pytest.mark.parametrize("source", ["memory://data/mixed", "memory://data/mixed/**", "memory://data/mixed/*"])
def test_results_inside_the_source_are_not_scored(data: None, source: str) -> None:
    inside = ("sink.uri=memory://data/mixed/results", "sink.heatmaps=all", f"source.uri={source}")
    first, manifest = run(*inside)
    expected = keys(first)
    assert len(expected) == 17 and manifest["heatmaps"] == 17
    Storage().delete("memory://data/mixed/results/manifest.json")
    Storage().delete("memory://data/mixed/results/ledger/00001.json")  # as after a kill, with the parts there
    again, manifest = run(*inside)
    assert [shard.index for shard in again.todo] == [1] and keys(again) == expected
    (note,) = again.notes
    assert "results of raydetect" in note and "memory:///data/mixed/results" in note
    other, found = run(*inside[1:], "sink.uri=memory://data/mixed/other")
    assert keys(other) == expected and found["left_out"] == manifest["left_out"]


@pytest.mark.parametrize("pattern", ["**/*.zip", "**/*.parquet"])
def test_a_pattern_that_names_only_files_of_results_finds_nothing_new(data: None, pattern: str) -> None:
    run("sink.uri=memory://data/mixed/results", "sink.heatmaps=all")
    pack("memory://data/mixed/more", Path(pattern).suffix, normal_files(4), 1)
    archive = open_archive(SourceSpec(uri=f"memory://data/mixed/{pattern}"), Storage())
    assert [shard.uri for shard in archive.shards()] == [f"memory:///data/mixed/more/part-0{Path(pattern).suffix}"]


def test_the_sink_may_be_the_source_itself_and_folders_of_like_names_are_read(data: None) -> None:
    pack(
        "memory://data/mixed",
        "",
        [(f"scores/test/good/{i}.png", data) for i, (_, data) in enumerate(normal_files(3))],
        1,
    )
    pack(
        "memory://data/mixed",
        "",
        [(f"heatmaps/test/good/{i}.png", data) for i, (_, data) in enumerate(normal_files(2))],
        1,
    )
    here = ("sink.uri=memory://data/mixed", "sink.heatmaps=all", "source.uri=memory://data/mixed")
    first, _ = run(*here)
    found = keys(first)
    assert len(found) == 17 + 5
    Storage().delete("memory://data/mixed/ledger/00000.json")
    again, _ = run(*here)
    assert [shard.index for shard in again.todo] == [0] and keys(again) == found


def test_a_results_file_that_is_named_is_read(data: None) -> None:
    run("sink.heatmaps=all", "sink.uri=memory://data/results")
    zips = [file.uri for file in Storage().list("memory://data/results/heatmaps")]
    archive = open_archive(SourceSpec(uri=tuple(zips)), Storage())
    assert sum(1 for shard in archive.shards() for _ in archive.read(shard)) == 17


def test_audits_inside_their_archive_score_what_is_new_alone(tmp_path: Path) -> None:
    from tests.builders.nights import add_night, fit_line

    fit_line(tmp_path)
    inside = {"sink": {"uri": f"{tmp_path}/archive/audits", "heatmaps": "all"}}
    for number, name in enumerate("abc", 1):
        add_night(tmp_path, name, "normal", 100 * number, count=4)
        ended = call("audit", job(tmp_path, alarm_when=[], **inside), "--local")
        assert ended.exit_code == 0, ended.output
        assert ("results of raydetect" in ended.output) == (number > 1)
    (tmp_path / "audits").symlink_to(tmp_path / "archive" / "audits")
    assert [summary(tmp_path, number)["images"] for number in (1, 2, 3)] == [4, 4, 4]
    shutil.rmtree(tmp_path / "archive" / "audits" / "nights" / "00003" / "results" / "ledger")
    (tmp_path / "archive" / "audits" / "summaries" / "00003.json").unlink()
    assert call("audit", job(tmp_path, alarm_when=[], **inside), "--local").exit_code == 0
    assert summary(tmp_path, 3)["images"] == 4 and audit_job(tmp_path)["kind"] == "audit"
