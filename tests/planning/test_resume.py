"""A run is finished only when it is: lost records and files, two drivers in one directory, archives that change."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from raydetect.artifacts.store import StoredDetectors
from raydetect.errors import ResumeError, StorageError
from raydetect.local import jobs
from raydetect.planning.committer import Committer
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.planning.stream import Stream
from raydetect.records import Receipt
from raydetect.scoring.scorer import Scorer, score_and_write
from raydetect.sinks.run_progress import progress
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.sinks.verify import repair, verify
from raydetect.storage import FileInfo, Storage
from tests.builders.archives import mixed_files, normal_files, pack, tar_bytes
from tests.builders.ledgers import make_old, rewrite_record
from tests.local.test_local import SCORE, fit, rows, run, spec_of

pytestmark = pytest.mark.usefixtures("mixed_shards")
RESULTS = "memory://data/results"


def planned(*overrides: str) -> ScorePlan:
    return plan_score(spec_of(SCORE, *overrides))


def at_the_end(plan: ScorePlan, work: Any) -> dict[str, Any]:
    """Scores, and does something when the last shard is committed."""

    receipts: list[Receipt] = []

    def on_progress(done: ScoredChunk | Receipt) -> None:
        if isinstance(done, Receipt):
            receipts.append(done)
            if len(receipts) == len(plan.todo):
                work()

    return jobs.score(plan, on_progress)


def chunks_of(plan: ScorePlan) -> list[ScoredChunk]:
    """The scored chunks of all shards, in order."""
    scorer = Scorer(StoredDetectors(plan.artifact, Storage()), plan.spec)
    scored = Stream(plan, partial(score_and_write, scorer, plan.sink), 1, 1).scored()
    return sorted(scored, key=lambda chunk: (chunk.facts.shard, chunk.facts.number))


def committed(committer: Committer, chunks: list[ScoredChunk]) -> list[int]:
    """Adds chunks; returns the shards that they complete."""
    receipts = [receipt for chunk in chunks for receipt in committer.add(chunk)] + committer.finish()
    return [receipt.shard for receipt in receipts]


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Storage().read(f"{RESULTS}/{name}"))
    return found


def test_a_record_that_was_removed_before_the_end_leaves_the_run_unfinished() -> None:
    expected = rows(run(f"sink.uri={RESULTS}-whole")[0])
    plan = planned()
    with pytest.raises(
        StorageError, match=r"1 of 3 shards have no ledger record \(00000 of memory:.*part-0\.tar\)"
    ) as e:
        at_the_end(plan, lambda: Storage().delete(f"{RESULTS}/ledger/00000.json"))
    assert e.value.exit_code == 1 and "The same command scores them again." in str(e.value)
    assert not Storage().exists(f"{RESULTS}/manifest.json") and not progress(plan.ledger).finished
    again, manifest = run()
    assert [shard.index for shard in again.todo] == [0] and (manifest["shards"], manifest["rows"]) == (3, 17)
    assert [row["image_score"] for row in rows(again)] == [row["image_score"] for row in expected]


def test_results_that_were_removed_in_mid_run_are_noticed_at_the_next_commit() -> None:
    plan = planned()
    chunks = chunks_of(plan)
    plan.begin()
    with Committer(plan) as committer:
        assert committed(committer, chunks[:2]) == [0]
        Storage().delete_folder(RESULTS)
        with pytest.raises(StorageError, match=r"run\.json: was removed") as e:
            committed(committer, chunks[2:4])
    assert e.value.exit_code == 1
    assert not Storage().exists(f"{RESULTS}/manifest.json") and not Storage().exists(f"{RESULTS}/ledger")
    assert run()[1]["rows"] == 17


def test_what_a_listing_lacks_is_asked_for_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings of some stores lag behind what was written."""
    plain = Storage.list

    def lagging(self: Storage, uri: str) -> Iterator[FileInfo]:
        late = ("ledger/00001.json", "part-0000.parquet")
        return (file for file in plain(self, uri) if not file.uri.endswith(late))

    monkeypatch.setattr(Storage, "list", lagging)
    _, manifest = run()
    assert (manifest["shards"], manifest["rows"]) == (3, 17)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_file_of_a_committed_shard_that_is_not_whole_leaves_the_run_unfinished(how: str) -> None:
    plan, lost = planned("sink.heatmaps=all"), f"{RESULTS}/heatmaps/shard=00001/part-0000.zip"

    def harm() -> None:
        if how == "gone":
            Storage().delete(lost)
        else:
            Storage().write(lost, Storage().read(lost)[:-1])

    with pytest.raises(
        StorageError, match=r"1 files of committed shards .*\(heatmaps/shard=00001/part-0000\.zip\).* verify .*--repair"
    ):
        at_the_end(plan, harm)
    assert not Storage().exists(f"{RESULTS}/manifest.json")


@pytest.mark.parametrize(
    "change", [{"run": "0" * 64}, {"fingerprint": "other"}, {"span": [0, 9]}, {"uri": "memory:///data/other.tar"}]
)
def test_a_record_of_another_job_or_archive_is_not_counted(change: dict[str, Any]) -> None:
    plan = planned()
    with pytest.raises(StorageError, match=r"1 ledger records are of another job or archive \(ledger/00001\.json\)"):
        at_the_end(plan, lambda: rewrite_record(plan.ledger, 1, lambda body: body.update(change)))
    assert not Storage().exists(f"{RESULTS}/manifest.json")


def test_records_of_an_older_raydetect_are_taken() -> None:
    plan, manifest = run("sink.heatmaps=all")
    make_old(plan.ledger)
    assert run("sink.heatmaps=all")[1] == manifest
    Storage().delete(f"{RESULTS}/ledger/00001.json")
    assert run("sink.heatmaps=all")[1] == manifest


def test_status_says_when_records_are_missing_beside_a_manifest() -> None:
    plan, manifest = run("flag={fdr: 0.3}")
    assert progress(plan.ledger).finished and progress(plan.ledger).plain()["lost_records"] == 0
    Storage().delete(f"{RESULTS}/ledger/00000.json")
    Storage().delete(f"{RESULTS}/ledger/00002.json")
    told = progress(plan.ledger)
    assert not told.finished and told.plain()["lost_records"] == 2 and told.flagged is None
    assert "not finished: manifest.json is there, but the records of 2 shards are missing" in told.lines()[0]
    again = planned("flag={fdr: 0.3}")
    assert [shard.index for shard in again.todo] == [0, 2]
    again.begin()
    assert not Storage().exists(f"{RESULTS}/manifest.json")  # it tells of rows that are scored anew
    assert jobs.score(again, lambda *_: None) == manifest and progress(plan.ledger).finished


def other_plan() -> ScorePlan:
    fit("seed=1", "artifact=memory://data/other")
    return planned("artifact=memory://data/other")


def test_a_driver_whose_run_json_arrives_after_another_job_has_scored_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, quick = planned(), other_plan()
    plain = Storage.write
    ended: list[dict[str, Any]] = []

    def late(self: Storage, uri: str, data: bytes) -> None:
        if uri.endswith("run.json") and not ended:
            ended.append({})
            ended[0] = jobs.score(quick, lambda *_: None)
        plain(self, uri, data)

    monkeypatch.setattr(Storage, "write", late)
    with pytest.raises(ResumeError, match="another job took the results directory over"):
        jobs.score(slow, lambda *_: None)
    monkeypatch.undo()
    assert {row["artifact"] for row in rows(quick)} == {quick.artifact.digest}
    again = planned("artifact=memory://data/other")  # the job whose records are there can always go on
    assert again.todo == () and jobs.score(again, lambda *_: None) == ended[0]
    assert progress(again.ledger).finished


def test_a_driver_whose_directory_was_taken_over_stops_at_its_next_commit() -> None:
    mine, other = planned(), other_plan()
    chunks = chunks_of(mine)
    mine.begin()
    with Committer(mine) as committer:
        assert committed(committer, chunks[:2]) == [0]
        body = {"format_version": 1, **other.run}
        Storage().write(f"{RESULTS}/run.json", json.dumps(body).encode())
        with pytest.raises(ResumeError, match=r"another job took the results directory over .*artifact: ") as e:
            committed(committer, chunks[2:4])
    assert e.value.exit_code == 2 and mine.ledger.committed() == {0}
    with pytest.raises(ResumeError, match="committed shard 00000 is of another job"):
        Storage().delete(f"{RESULTS}/run.json")
        planned("artifact=memory://data/other")


def test_a_driver_that_is_taken_over_after_its_last_commit_is_not_finished() -> None:
    mine, other = planned(), other_plan()
    body = json.dumps({"format_version": 1, **other.run}).encode()
    with pytest.raises(ResumeError, match="another job took the results directory over"):
        at_the_end(mine, lambda: Storage().write(f"{RESULTS}/run.json", body))
    assert not Storage().exists(f"{RESULTS}/manifest.json")


def add_shard(name: str) -> None:
    """Two images more."""
    Storage().write(f"memory://data/mixed/{name}", tar_bytes(mixed_files(2, 0)))


def test_a_finished_run_goes_on_when_its_archive_grew() -> None:
    plan, _ = run()
    before = rows(plan)
    add_shard("part-9.tar")
    grown = planned()
    assert [shard.index for shard in grown.todo] == [3] and grown.before is not None
    grown.begin()
    assert not Storage().exists(f"{RESULTS}/manifest.json") and stored("run.json")["num_shards"] == 4
    assert not progress(grown.ledger).finished
    manifest = jobs.score(grown, lambda *_: None)
    assert (manifest["shards"], manifest["rows"]) == (4, 19) and manifest["result"] == grown.run["result"]
    assert [row for row in rows(grown) if "part-9" not in row["key"]] == before
    assert stored("run.json")["result"] == grown.run["result"] and progress(grown.ledger).finished
    assert planned().before is None and planned().todo == ()


def test_a_run_goes_on_when_a_shard_that_is_not_committed_changed() -> None:
    run()
    Storage().delete(f"{RESULTS}/ledger/00001.json")
    Storage().write("memory://data/mixed/part-1.tar", tar_bytes(mixed_files(4, 0)))
    plan, manifest = run()
    assert [shard.index for shard in plan.todo] == [1]
    assert manifest["rows"] == sum("part-1" not in row["key"] for row in rows(plan)) + 4
    assert stored("run.json")["num_bytes"] == sum(shard.size_bytes for shard in plan.shards)


def test_a_committed_shard_that_is_another_one_now_is_refused_by_name() -> None:
    plan, _ = run()
    unchanged = stored("run.json")
    add_shard("part-00.tar")  # sorts between the others
    with pytest.raises(
        ResumeError, match=r"committed shard 00001 was memory:.*part-1\.tar and is now memory:.*part-00\.tar"
    ):
        run()
    Storage().delete("memory://data/mixed/part-00.tar")
    Storage().delete("memory://data/mixed/part-2.tar")
    with pytest.raises(ResumeError, match=r"committed shard 00002 \(memory:.*part-2\.tar\) is not in it any more"):
        run()
    assert stored("run.json") == unchanged and progress(plan.ledger).finished


def test_a_job_that_differs_in_more_than_the_archive_is_refused_as_ever() -> None:
    run()
    add_shard("part-9.tar")
    with pytest.raises(ResumeError, match=r"spec\.chunk_images: 4 -> 5"):
        run("chunk_images=5")


def test_a_run_json_that_changed_since_planning_is_not_written_over() -> None:
    run()
    add_shard("part-9.tar")
    first = planned()
    add_shard("part-99.tar")
    run()
    with pytest.raises(ResumeError, match="archive: "):
        first.begin()
    assert stored("run.json")["num_shards"] == 5


def test_older_records_go_on_only_where_a_uri_is_one_shard() -> None:
    plan, _ = run()
    make_old(plan.ledger)
    add_shard("part-9.tar")
    assert run()[1]["shards"] == 4
    pack("memory://data/loose", "", normal_files(4), 1)
    overrides = ("source={uri: memory://data/loose, shard_images: 2}", "sink.uri=memory://data/loose-results")
    loose, _ = run(*overrides)
    make_old(loose.ledger)
    pack("memory://data/loose/zz", "", normal_files(2), 1)
    with pytest.raises(ResumeError, match="is not recorded"):
        run(*overrides)


def test_a_finished_run_is_finished_on_a_disk_that_is_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, manifest = run()
    expected = rows(plan)

    def refuse(storage: Storage, uri: str, *_: object) -> None:
        raise StorageError(f"{uri}: cannot write it: the disk is mounted read-only.")

    for name in ("write", "delete"):
        monkeypatch.setattr(Storage, name, refuse)
    again, second = run()
    assert second == manifest and rows(again) == expected


def test_a_run_that_is_found_not_to_be_whole_is_not_finished_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, manifest = run()
    Storage().delete(f"{RESULTS}/scores/shard=00001/part-0000.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", lambda storage, uri: storage.read(f"{uri}/refused"))
        with pytest.raises(StorageError, match=r"1 files of committed shards are missing .*--repair"):
            run()
    assert plan.ledger.manifest() == manifest
    with pytest.raises(StorageError, match=r"1 files of committed shards are missing .*--repair"):
        run()
    assert plan.ledger.manifest() is None
    verification = verify(plan.ledger, lambda *_: None)
    repair(plan.ledger, verification)
    assert run()[1] == manifest
