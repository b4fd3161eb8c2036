"""`raydetect verify`: every kind of damage is found, repaired and scored again; storage failures are not damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from raydetect.cli.main import main
from raydetect.errors import DamagedError, MissingError, StorageError
from raydetect.sinks.consistency import rows_digest
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import encode_rows
from raydetect.sinks.verify import Verification, verify
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.ledgers import make_old, rewrite_record
from tests.builders.results import make_results, names_of
from tests.local.test_local import SCORE, fit, rows, run
from tests.sinks.test_sinks import rows as some_rows

PART = "scores/shard=00001/part-0000.parquet"
ZIP = "heatmaps/shard=00001/part-0000.zip"


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def checked(ledger: Ledger) -> Verification:
    return verify(ledger, lambda *_: None)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Three shards of four images, each with one part and one heatmap zip."""
    ledger = make_results(f"file://{tmp_path}", names_of(12))
    assert len(ledger.committed()) == 3
    return ledger


def path_of(ledger: Ledger, name: str) -> Path:
    return Path(ledger.uri.removeprefix("file://")) / name


def test_intact_results_have_no_damage(ledger: Ledger) -> None:
    found = checked(ledger)
    assert found.whole and found.finished and found.damaged == set()
    assert found.lines() == ["3 shards, 3 parts, 3 heatmap zips: all intact."]
    assert (found.rows, found.unnamed, found.num_shards) == (12, 0, 3)
    ended = call("verify", ledger.uri, "--json")
    assert ended.exit_code == 0
    state = json.loads(ended.stdout)
    assert state["whole"] is True and state["rows"] == 12 and state["damage"] == {} and state["repaired"] is False


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("harm", "name", "kind"),
    [
        (Path.unlink, PART, "missing_files"),
        (Path.unlink, ZIP, "missing_files"),
        (flip, PART, "changed_files"),
        (flip, ZIP, "changed_files"),
        (cut, PART, "changed_files"),
        (cut, ZIP, "changed_files"),
        (lambda path: path.write_bytes(b""), ZIP, "changed_files"),
        (lambda path: path.write_text("{"), "ledger/00001.json", "damaged_records"),
        (lambda path: path.write_text("{}"), "ledger/00001.json", "damaged_records"),
    ],
)
def test_a_damaged_file_is_named_and_its_record_removed(
    ledger: Ledger, harm: Callable[[Path], object], name: str, kind: str
) -> None:
    harm(path_of(ledger, name))
    found = checked(ledger)
    assert {kind: (of.count, of.names) for kind, of in found.damage.items()} == {kind: (1, [name])}
    assert found.damaged == {1}
    ended = call("verify", ledger.uri)
    assert ended.exit_code == 1 and f"({name})" in ended.output and "1 shards are damaged" in ended.output
    assert f"`raydetect verify {ledger.uri} --repair`" in ended.output
    assert ledger.committed() == {0, 1, 2} and ledger.manifest() is not None  # nothing is removed without --repair
    repaired = call("verify", ledger.uri, "--repair")
    assert repaired.exit_code == 1 and "ledger records of 1 shards were removed" in repaired.output
    assert ledger.committed() == {0, 2} and ledger.manifest() is None
    again = call("verify", ledger.uri)
    assert again.exit_code == 0 and "not finished: 2 of 3 shards are committed" in again.output
    assert "2 shards, 2 parts, 2 heatmap zips: all intact." in again.output


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"run": "0" * 64}, "foreign_records", "ledger/00001.json"),
        ({"rows": 5}, "damaged_records", "ledger/00001.json"),
        ({"statuses": {"ok": 4}}, "damaged_records", "ledger/00001.json"),
        ({"parts": []}, "damaged_records", "ledger/00001.json"),
        ({"shard": 2}, "damaged_records", "ledger/00001.json"),
        ({"part": {"flagged": 3}}, "counts", PART),
        ({"part": {"statuses": {"ok": 2, "empty": 2}}}, "counts", PART),
        ({"part": {"heatmaps": 2}}, "counts", PART),
        ({"part": {"zips": ()}}, "counts", PART),
        ({"part": {"path": "../../elsewhere"}}, "missing_files", "../../elsewhere"),
        ({"part": {"last": False}}, "damaged_records", "ledger/00001.json"),
    ],
)
def test_a_record_that_does_not_match_is_named(ledger: Ledger, change: dict[str, Any], kind: str, name: str) -> None:
    def work(body: dict[str, Any]) -> None:
        body["parts"][0].update(change.get("part", {}))
        if "statuses" in change.get("part", {}):
            body["statuses"] = change["part"]["statuses"]
        body.update({key: value for key, value in change.items() if key != "part"})

    rewrite_record(ledger, 1, work)
    found = checked(ledger)
    assert found.damage[kind].names == [name] and found.damaged == {1}


def test_an_invalid_part_with_the_recorded_sha256(ledger: Ledger) -> None:
    """The sha256 matches, so the content itself must be checked."""
    import hashlib

    digest = hashlib.sha256(b"PAR1 no more").hexdigest()
    for name in (PART, ZIP):
        path_of(ledger, name).write_bytes(b"PAR1 no more")

    def change(body: dict[str, Any]) -> None:
        (part,) = body["parts"]
        part["sha256"] = part["zips"][0]["sha256"] = digest

    rewrite_record(ledger, 1, change)
    found = checked(ledger)
    assert found.damage["broken_files"].names == [PART, ZIP]


def test_zips_of_an_older_raydetect_are_opened(ledger: Ledger) -> None:
    make_old(ledger)
    assert checked(ledger).whole
    flip(path_of(ledger, ZIP))
    assert checked(ledger).damage["broken_files"].names == [ZIP]
    path_of(ledger, ZIP).unlink()
    assert checked(ledger).damage["missing_files"].names == [ZIP]


def write_part(ledger: Ledger, shard: int, keys: list[tuple[str, str]]) -> None:
    """Writes a part whose rows have these keys and statuses, with a matching record."""
    import dataclasses
    import hashlib
    from collections import Counter

    from raydetect.records import Chunk, Part

    row = some_rows(Chunk(shard, 0, True, ()), 1)[0]
    data = encode_rows([dataclasses.replace(row, key=key, status=status) for key, status in keys])
    path = f"scores/shard={shard:05d}/part-0000.parquet"
    ledger.storage.write(f"{ledger.uri}/{path}", data)
    statuses = dict(Counter(status for _, status in keys))
    part = Part(
        shard=shard, number=0, last=True, path=path, rows=len(keys), statuses=statuses,
        sha256=hashlib.sha256(data).hexdigest(),
    )  # fmt: skip

    def work(body: dict[str, Any]) -> None:
        body.update(rows=len(keys), statuses=statuses, parts=[dataclasses.asdict(part)])

    rewrite_record(ledger, shard, work)


def test_a_key_of_two_scored_rows_is_damage_unless_a_status_explains_it(ledger: Ledger) -> None:
    write_part(ledger, 0, [("a", "ok"), ("b", "ok"), ("a", "duplicate_key"), ("b", "duplicate_key")])
    write_part(ledger, 2, [("c", "ok"), ("b", "corrupt")])
    ledger.finish({})
    assert checked(ledger).damage == {}
    write_part(ledger, 2, [("c", "ok"), ("b", "ok")])
    ledger.finish({})
    found = checked(ledger)
    assert found.damage["keys"].names == ["b"] and found.damaged == {0, 2}


def test_a_manifest_with_other_sums_or_missing_records(ledger: Ledger) -> None:
    manifest = path_of(ledger, "manifest.json")
    original = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(original), "rows": 13}))
    found = checked(ledger)
    assert found.damage["manifest"].names == ["rows is 13, but 12 in the records"] and found.damaged == set()
    assert "--repair` removes what is damaged" in found.lines()[-1]
    manifest.write_text("{")
    assert "manifest" in checked(ledger).damage
    manifest.write_text(original)
    path_of(ledger, "ledger/00001.json").unlink()
    found = checked(ledger)
    assert found.damage["missing_records"].names == ["ledger/00001.json"] and not found.finished
    assert found.unnamed == 2 and "files that no record names: 2" in "\n".join(found.lines())
    manifest.unlink()
    assert checked(ledger).whole
    for index in (0, 2):
        path_of(ledger, f"ledger/{index:05d}.json").unlink()
    assert checked(ledger).lines()[-2:] == [
        "The run is not finished: 0 of 3 shards are committed.",
        "0 shards, 0 parts, 0 heatmap zips: all intact.",
    ]


def test_files_of_killed_runs_are_counted_and_stay(ledger: Ledger) -> None:
    for name in ("scores/shard=00001/part-0007.parquet", "heatmaps/shard=00009/part-0000.zip"):
        path_of(ledger, name).parent.mkdir(parents=True, exist_ok=True)
        path_of(ledger, name).write_bytes(b"x")
    ended = call("verify", ledger.uri, "--repair")
    assert ended.exit_code == 0 and "files that no record names: 2" in ended.output and "all intact." in ended.output
    assert path_of(ledger, "heatmaps/shard=00009/part-0000.zip").exists() and ledger.manifest() is not None


def test_a_directory_without_a_run(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"holds no run\.json"):
        checked(Ledger(f"file://{tmp_path}/nowhere", Storage()))
    assert call("verify", str(tmp_path / "nowhere")).exit_code == 2
    path_of(ledger, "run.json").unlink()
    ended = call("verify", ledger.uri)
    assert ended.exit_code == 1 and "run.json is missing" in ended.output and "--repair`" in ended.output


def test_a_storage_failure_is_an_error_and_not_damage(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Storage.read

    def failing(self: Storage, uri: str) -> bytes:
        if uri.endswith(PART):
            raise StorageError(f"{uri}: the storage cannot be reached (down). Check storage.endpoint_url.")
        return plain(self, uri)

    monkeypatch.setattr(Storage, "read", failing)
    ended = call("verify", ledger.uri, "--repair")
    assert ended.exit_code == 1 and "cannot be reached" in ended.output and "damaged" not in ended.output
    assert ledger.committed() == {0, 1, 2} and ledger.manifest() is not None


def test_a_run_is_repaired_by_the_same_job(tmp_path: Path) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
    overrides = ("sink.heatmaps=all", "flag={fdr: 0.3}")
    plan, manifest = run(*overrides)
    expected = rows(plan)
    assert {receipt.run for receipt in plan.ledger.receipts()} == {rows_digest(plan.run)}
    whole = call("verify", SCORE["sink"]["uri"])
    assert whole.exit_code == 0 and "3 shards, 3 parts, 3 heatmap zips: all intact." in whole.output
    for name in ("scores/shard=00000/part-0000.parquet", "heatmaps/shard=00002/part-0000.zip"):
        data = plan.ledger.storage.read(f"{plan.ledger.uri}/{name}")
        plan.ledger.storage.write(f"{plan.ledger.uri}/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    ended = call("verify", plan.ledger.uri, "--repair")
    assert ended.exit_code == 1 and "sha256 differs from their record: 2 (" in ended.output
    again, second = run(*overrides)
    assert [shard.index for shard in again.todo] == [0, 2] and second == manifest and rows(again) == expected
    assert call("verify", plan.ledger.uri).exit_code == 0


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1, "result": {"spec": 1}, "num_shards": -1}'])
@pytest.mark.parametrize("name", ["run.json", "manifest.json", "ledger/00001.json"])
def test_status_score_and_verify_report_a_damaged_record_alike(name: str, text: str) -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
    plan, manifest = run()
    expected, storage = rows(plan), plan.ledger.storage
    storage.write(f"{plan.ledger.uri}/{name}", text.encode())
    hint = f"`raydetect verify {plan.ledger.uri} --repair` removes what is damaged; then start the same job again."
    status = call("status", plan.ledger.uri)
    assert status.exit_code == 1 and f"{plan.ledger.uri}/{name}: is damaged (" in status.output
    assert hint in status.output
    if name != "manifest.json":  # it is created from the records in any case
        with pytest.raises(DamagedError, match="--repair` removes what is damaged") as caught:
            run()
        assert caught.value.exit_code == 1 and f"{name}: is damaged (" in str(caught.value)
    found = call("verify", plan.ledger.uri)
    assert found.exit_code == 1 and hint in found.output
    assert call("verify", plan.ledger.uri, "--repair").exit_code == 1
    again, second = run()
    assert [shard.index for shard in again.todo] == ([1] if name.startswith("ledger") else [])
    assert second == manifest and rows(again) == expected and call("verify", plan.ledger.uri).exit_code == 0


def test_a_newer_record_is_not_damage(ledger: Ledger) -> None:
    path_of(ledger, "run.json").write_text('{"format_version": 2}')
    for command in ("status", "verify"):
        ended = call(command, ledger.uri)
        assert ended.exit_code == 2 and "has format 2" in ended.output and "Update raydetect" in ended.output


def test_a_path_with_spaces_is_quoted_for_the_shell(tmp_path: Path) -> None:
    ledger = make_results(f"file://{tmp_path}/out [line 4]", names_of(6))
    path_of(ledger, PART).unlink()
    ended = call("verify", ledger.uri)
    assert ended.exit_code == 1 and f"`raydetect verify '{ledger.uri}' --repair`" in ended.output


@pytest.mark.parametrize("how", ["lost", "cut"])
def test_status_names_missing_files_of_a_finished_run(ledger: Ledger, how: str) -> None:
    intact = call("status", ledger.uri)
    assert intact.exit_code == 0 and ": finished\n" in intact.output and "Missing" not in intact.output
    for name in (PART, ZIP):
        path = path_of(ledger, name)
        path.unlink() if how == "lost" else path.write_bytes(path.read_bytes()[:-1])
    status = call("status", ledger.uri)
    assert status.exit_code == 0 and ": not finished\n" in status.output
    assert f"Missing    2 files of committed shards are missing or have another size ({PART}, {ZIP})." in status.output
    assert f"`raydetect verify {ledger.uri} --repair`" in status.output
    plain = json.loads(call("status", ledger.uri, "--json").stdout)
    assert plain["finished"] is False and PART in plain["missing"]


def test_status_verify_and_report_need_read_access_only(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("read-only")

    for name in ("write", "delete", "delete_folder"):
        monkeypatch.setattr(Storage, name, refuse)
    for command in (("status", ledger.uri), ("verify", ledger.uri), ("report", ledger.uri, "-o", f"{tmp_path}/r.html")):
        ended = call(*command)
        assert ended.exit_code == 0, ended.output
