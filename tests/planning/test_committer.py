"""One Parquet file for each shard: the same whatever the order of chunks, and no row is ever seen twice."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from raydetect.errors import StorageError
from raydetect.local import jobs
from raydetect.planning import committer as committing
from raydetect.planning.committer import Committer, commit_all
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.sinks import parquet
from raydetect.sinks.parquet import ResultsSink
from raydetect.sinks.rows import read_rows
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.sinks.verify import verify
from raydetect.storage import Storage
from tests.local.test_local import SCORE, spec_of
from tests.planning.test_resume import chunks_of, committed

pytestmark = pytest.mark.usefixtures("mixed_shards")
ALL = "sink.heatmaps=all"


@pytest.fixture
def plan(tmp_path: Path) -> ScorePlan:
    return planned(tmp_path)


def planned(folder: Path) -> ScorePlan:
    return plan_score(spec_of(SCORE, ALL, f"sink.uri=file://{folder}/results"))


def files_of(plan: ScorePlan) -> dict[str, bytes]:
    root = Path(plan.ledger.uri.removeprefix("file://"))
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("scores", "heatmaps")
        for path in sorted((root / folder).rglob("*.*"))
    }


def keys_seen(plan: ScorePlan) -> Counter[str]:
    """Keys that a reader of all Parquet files sees now."""
    pattern = plan.ledger.uri.removeprefix("file://") + "/scores/**/*.parquet"
    if not list(Path(plan.ledger.uri.removeprefix("file://")).glob("scores/**/*.parquet")):
        return Counter()
    return Counter(key for (key,) in duckdb.sql(f"select key from read_parquet('{pattern}')").fetchall())


def score_all(plan: ScorePlan) -> list[ScoredChunk]:
    chunks = chunks_of(plan)
    plan.begin()
    with Committer(plan) as committer:
        assert sorted(committed(committer, chunks)) == [0, 1, 2]
    return chunks


def test_a_chunk_survives_its_encoding(plan: ScorePlan) -> None:
    for chunk in chunks_of(plan):
        again = ScoredChunk.from_bytes(chunk.to_bytes())
        assert again.facts == chunk.facts and again.rows.equals(chunk.rows) and again.pictures == chunk.pictures
        assert (
            chunk.pictures and again.images == chunk.images and (again.bad, again.flagged) == (chunk.bad, chunk.flagged)
        )


def test_files_are_the_same_for_any_order_of_chunks_and_for_repeated_ones(plan: ScorePlan, tmp_path: Path) -> None:
    chunks = score_all(plan)
    expected = files_of(plan)
    assert list(expected) == [f"scores/shard=0000{i}/part-0000.parquet" for i in range(3)] + [
        f"heatmaps/shard=0000{i}/part-0000.zip" for i in range(3)
    ]
    for seed in range(5):
        order = [*chunks, *chunks[::2]]
        random.Random(seed).shuffle(order)
        Storage().delete_folder(plan.ledger.uri)
        again = planned(tmp_path)
        again.begin()
        with Committer(again) as committer:
            assert sorted(committed(committer, order)) == [0, 1, 2]
        assert files_of(again) == expected


def test_a_large_shard_has_several_parts_with_the_same_rows(
    plan: ScorePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_all(plan)
    whole = [table.drop_columns("heatmap_uri") for _, _, table in read_rows(plan.ledger)]
    Storage().delete_folder(plan.ledger.uri)
    monkeypatch.setattr(parquet, "PART_ROWS", 4)
    again = planned(tmp_path)
    score_all(again)
    receipts = list(again.ledger.receipts())
    assert [len(receipt.parts) for receipt in receipts] == [2, 2, 2]
    assert [[part.number for part in receipt.parts if part.last] for receipt in receipts] == [[1]] * 3
    rows = [row for _, _, table in read_rows(again.ledger) for row in table.drop_columns("heatmap_uri").to_pylist()]
    assert rows == [row for table in whole for row in table.to_pylist()]
    assert keys_seen(again).most_common(1)[0][1] == 1


def test_large_heatmaps_of_a_chunk_are_written_by_its_worker(plan: ScorePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CHUNK_ZIP_BYTES", 1)
    chunks = score_all(plan)
    assert not any(chunk.pictures for chunk in chunks)
    names = [name for name in files_of(plan) if name.startswith("heatmaps")]
    assert names == [f"heatmaps/shard=0000{shard}/chunk-000{number}.zip" for shard in range(3) for number in range(2)]
    (receipt, *_) = plan.ledger.receipts()
    assert [one.path for one in receipt.parts[0].heatmap_zips] == names[:2]
    assert verify(plan.ledger, lambda *_: None).whole


def test_heatmaps_that_a_killed_run_wrote_are_kept(plan: ScorePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CHUNK_ZIP_BYTES", 1)
    plan.begin()
    old_files(plan, chunks_of(plan))
    manifest = jobs.score(plan, lambda _: None)
    assert manifest["heatmaps"] == 17 and verify(plan.ledger, lambda *_: None).whole


def test_complete_shards_are_committed_although_the_source_fails_afterwards(plan: ScorePlan) -> None:
    chunks = chunks_of(plan)

    def failing() -> Iterator[ScoredChunk]:
        yield from (chunk for chunk in chunks if chunk.facts.shard == 1)
        raise StorageError("s3://archive: the token has expired.")

    plan.begin()
    with pytest.raises(StorageError, match="expired"):
        commit_all(plan, failing(), lambda _: None)
    assert plan.ledger.committed() == {1}


def old_files(plan: ScorePlan, chunks: list[ScoredChunk]) -> None:
    """What a version with one file for each chunk leaves when it is killed before the records are written."""
    for chunk in chunks:
        ResultsSink(plan.ledger.uri, Storage()).write_part(chunk.facts.number, [chunk])


@pytest.mark.parametrize("small_parts", [False, True])
def test_no_reader_sees_a_row_twice_while_an_interrupted_run_goes_on(
    plan: ScorePlan, small_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = chunks_of(plan)
    plan.begin()
    old_files(plan, chunks)
    assert max(keys_seen(plan).values()) == 1 and len(keys_seen(plan)) == 17
    if small_parts:
        monkeypatch.setattr(parquet, "PART_ROWS", 6)
    monkeypatch.setattr(committing, "WRITERS", 1)
    write, delete = Storage.write, Storage.delete
    seen: list[int] = []

    def look(work: Any) -> Any:
        def looked(self: Storage, uri: str, *data: bytes) -> Any:
            result = work(self, uri, *data)
            seen.append(max(keys_seen(plan).values(), default=0))
            return result

        return looked

    monkeypatch.setattr(Storage, "write", look(write))
    monkeypatch.setattr(Storage, "delete", look(delete))
    score_all(plan)
    assert len(seen) > 9 and max(seen) == 1
    assert len(keys_seen(plan)) == 17


def test_a_finished_run_holds_only_what_its_records_name(plan: ScorePlan) -> None:
    chunks = chunks_of(plan)
    plan.begin()
    old_files(plan, chunks)
    manifest = jobs.score(plan, lambda _: None)
    assert (manifest["parts"], manifest["rows"]) == (3, 17)
    named = {path for receipt in plan.ledger.receipts() for part in receipt.parts for path in
             [part.path, *(one.path for one in part.heatmap_zips)]}  # fmt: skip
    assert set(files_of(plan)) == named
