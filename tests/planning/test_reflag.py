"""Another rule for flags on results that exist: the rows of scoring with that rule, without scoring."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import CliRunner

from raydetect.cli.main import main
from raydetect.errors import ArtifactError, DamagedError, IncompleteError, ResumeError, SpecError
from raydetect.local import jobs
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.planning.reflag import Reflagged, plan_reflag
from raydetect.report.build import report_html
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.rows import read_rows
from raydetect.sinks.run_progress import progress
from raydetect.sinks.verify import verify
from raydetect.storage import Storage
from tests.builders.archives import normal_files, pack
from tests.builders.commands import killed_after
from tests.local.test_local import SCORE, fit, run, spec_of
from tests.objectstore import ObjectStore

pytestmark = pytest.mark.usefixtures("mixed_shards")
LOCATED = ("regions", "regions_left_out", "heatmap_uri", "close_up_uris")
RULES = ("flag.alpha=0.1", "flag.alpha=0.5", "flag.threshold=2.1", "flag.fdr=0.3", "flag={}", "flag=none")


def scored(folder: Path, rule: str, *more: str) -> ScorePlan:
    return run(f"sink.uri=file://{folder}", rule, *more)[0]


def reflag(ledger: Ledger, *rule: str) -> Reflagged:
    return plan_reflag(ledger, Storage(), rule).execute(lambda *_: None)


def rows_of(ledger: Ledger) -> list[dict[str, Any]]:
    return [row for _, _, table in read_rows(ledger) for row in table.to_pylist()]


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def timeless(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files without the times and hosts in records."""
    return {name: data for name, data in files.items() if not name.startswith("ledger/")}


PAIRS = [(old, RULES[(i + step) % len(RULES)]) for i, old in enumerate(RULES) for step in (1, 2)]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_rows_are_those_of_scoring_with_the_rule(old: str, new: str, tmp_path: Path) -> None:
    expected = rows_of(scored(tmp_path / "b", new).ledger)
    plan = scored(tmp_path / "a", old)
    before = files_of(tmp_path / "a")
    reflag(plan.ledger, new)
    found = rows_of(plan.ledger)
    assert without(found, *LOCATED) == without(expected, *LOCATED)
    assert verify(plan.ledger, lambda *_: None).whole
    assert progress(plan.ledger).finished
    kept = {name for name in before if name.startswith("heatmaps/")}
    assert all(files_of(tmp_path / "a")[name] == before[name] for name in kept)
    reflag(plan.ledger, old)
    assert files_of(tmp_path / "a") == before  # nothing is lost on the way


def test_results_in_a_bucket_are_reflagged_as_those_in_a_folder(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    old, new = "flag.threshold=2.1", "flag.threshold=1.8"
    expected = scored(tmp_path / "a", old).ledger
    reflag(expected, new)
    uri, endpoint = object_store.uri("line"), object_store.endpoint_url
    ledger = run(f"sink.uri={uri}", f"sink.storage.endpoint_url={endpoint}", old)[0].ledger
    ended = CliRunner().invoke(main, ["reflag", uri, "--set", new, "--endpoint-url", endpoint], catch_exceptions=False)
    assert ended.exit_code == 0 and "flag.threshold = 1.8, before flag.threshold = 2.1" in ended.output, ended.output
    assert without(rows_of(ledger), *LOCATED[2:]) == without(rows_of(expected), *LOCATED[2:])
    assert verify(ledger, lambda *_: None).whole and progress(ledger).finished
    again = CliRunner().invoke(main, ["reflag", uri, "--set", new, "--endpoint-url", endpoint], catch_exceptions=False)
    assert again.exit_code == 0 and "nothing to do" in again.output


def test_regions_and_heatmaps_are_equal_where_a_stricter_rule_needs_no_others(tmp_path: Path) -> None:
    wide, narrow = "flag.threshold=1.8", "flag.threshold=2.1"
    expected = rows_of(scored(tmp_path / "b", narrow).ledger)
    ledger = scored(tmp_path / "a", wide).ledger
    done = reflag(ledger, narrow)
    found = rows_of(ledger)
    assert done.flagged_before is not None and done.flagged_before > done.manifest["flagged"] > 0
    assert without(found, "heatmap_uri", "close_up_uris") == without(expected, "heatmap_uri", "close_up_uris")
    drawn = {row["key"] for row in expected if row["heatmap_uri"]}
    assert drawn and drawn <= {row["key"] for row in found if row["heatmap_uri"]}
    assert done.lacking == {} and "lacking" in ledger.manifest()["reflagged"]  # type: ignore[index]


def test_images_that_were_not_flagged_are_named(tmp_path: Path) -> None:
    narrow, wide = "flag.threshold=2.1", "flag.threshold=1.8"
    ledger = scored(tmp_path / "a", narrow).ledger
    old = {row["key"] for row in rows_of(ledger) if row["flagged"]}
    done = reflag(ledger, wide)
    new = [row["key"] for row in rows_of(ledger) if row["flagged"] and row["key"] not in old]
    assert new and set(done.lacking) == {"heatmap", "regions"}
    for lacking in done.lacking.values():
        assert (lacking.count, lacking.names) == (len(new), tuple(new[:5]))
    assert ledger.manifest()["reflagged"]["lacking"]["heatmap"]["count"] == len(new)  # type: ignore[index]


def test_every_reader_sees_the_new_flags(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.threshold=2.1").ledger
    command = CliRunner().invoke(main, ["reflag", str(tmp_path / "a"), "--set", "flag.threshold=1.8"])
    assert command.exit_code == 0, command.output
    assert "flag.threshold = 1.8, before flag.threshold = 2.1" in command.output
    query = f"select count(*) from read_parquet('{tmp_path}/a/scores/**/*.parquet') where flagged"
    ((flagged,),) = duckdb.sql(query).fetchall()
    manifest = ledger.manifest()
    assert manifest is not None and manifest["flagged"] == flagged == progress(ledger).flagged
    assert f"Flagged {flagged}; before " in command.output
    assert "image score at least 1.8" in report_html(ledger)
    table = tmp_path / "rows.csv"
    assert CliRunner().invoke(main, ["export", str(tmp_path / "a"), "--as", "csv", "-o", str(table)]).exit_code == 0
    assert table.read_text().count("true") == flagged
    again = CliRunner().invoke(main, ["reflag", str(tmp_path / "a"), "--set", "flag.threshold=1.8"])
    assert again.exit_code == 0 and "nothing to do" in again.output


def test_the_job_with_the_new_rule_is_complete_and_the_old_one_says_what_differs(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.alpha=0.1").ledger
    reflag(ledger, "flag.alpha=0.2")
    manifest = Storage().read(f"{ledger.uri}/manifest.json")
    plan = scored(tmp_path / "a", "flag.alpha=0.2")
    assert plan.todo == () and Storage().read(f"{ledger.uri}/manifest.json") == manifest
    with pytest.raises(ResumeError, match=r"spec\.flag\.alpha: 0\.2 -> 0\.1"):
        plan_score(spec_of(SCORE, f"sink.uri=file://{tmp_path}/a", "flag.alpha=0.1"))


def test_a_level_that_the_calibration_cannot_support_is_refused_in_the_words_of_scoring(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.alpha=0.1").ledger
    with pytest.raises(SpecError) as scoring:
        plan_score(spec_of(SCORE, "flag.alpha=0.01"))
    before = files_of(tmp_path / "a")
    with pytest.raises(SpecError) as reflagging:
        reflag(ledger, "flag.alpha=0.01")
    assert str(reflagging.value) == str(scoring.value) and "needs at least 99 held-out" in str(scoring.value)
    assert files_of(tmp_path / "a") == before


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.alpha=0.1").ledger
    for rule, text in (
        ((), "Add, for example, --set flag.alpha=0.05"),
        (("seed=1",), r"seed: unknown key.*Known: flag"),
        (("flag.alpa=1",), r"flag\.alpa: unknown key. Did you mean 'alpha'"),
        (("flag.alpha=2",), r"flag\.alpha: .*less than 1"),
    ):
        with pytest.raises(SpecError, match=text):
            reflag(ledger, *rule)


def test_another_artifact_is_refused_unless_no_calibration_is_needed(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.alpha=0.1").ledger
    pack("memory://data/normal", ".tar", normal_files(24), 2)
    fit()
    with pytest.raises(ArtifactError, match=r"was replaced since .*set flag\.threshold"):
        reflag(ledger, "flag.alpha=0.2")
    assert reflag(ledger, "flag.threshold=0.0").manifest["flagged"] == 17


def test_an_unfinished_or_damaged_run_is_refused_unchanged(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.alpha=0.1").ledger
    part = tmp_path / "a/scores/shard=00001/part-0000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-9] + b"x" + whole[-8:])
    before = files_of(tmp_path / "a")
    with pytest.raises(DamagedError, match=r"part-0000\.parquet: is damaged .*verify .*--repair"):
        reflag(ledger, "flag.alpha=0.2")
    assert files_of(tmp_path / "a") == before
    part.write_bytes(whole)
    (tmp_path / "a/ledger/00002.json").unlink()
    with pytest.raises(IncompleteError, match="1 of 3 shards have no ledger record"):
        reflag(ledger, "flag.alpha=0.2")


KILLED = """
    from raydetect.planning.reflag import plan_reflag
    from raydetect.sinks.ledger import Ledger

    plan_reflag(Ledger(sys.argv[2], Storage()), Storage(), ("flag.threshold=1.8",)).execute(lambda *_: None)
"""


def test_a_killed_reflag_is_refused_by_all_others_and_continued_by_the_same_command(tmp_path: Path) -> None:
    """Kills before every single write: run.json, 3 x (part, record), run.json, manifest.json."""
    expected = scored(tmp_path / "a", "flag.threshold=2.1").ledger
    old = files_of(tmp_path / "a")
    reflag(expected, "flag.threshold=1.8")
    new = timeless(files_of(tmp_path / "a"))
    ends = []
    for writes in range(20):
        for name, data in old.items():
            (tmp_path / "a" / name).write_bytes(data)
        ends.append(killed_after(writes, KILLED, expected.uri))
        if ends[-1] == 0:
            break
        is_under_way = "reflagging" in json.loads((tmp_path / "a/run.json").read_text())
        assert is_under_way == (1 <= writes < 8)
        if is_under_way:
            assert progress(expected).reflagging
            for work in (lambda: verify(expected, lambda *_: None), lambda: rows_of(expected)):
                with pytest.raises(ResumeError, match=r"`raydetect reflag .*` continues it"):
                    work()
            with pytest.raises(ResumeError, match=r"`raydetect reflag .*` continues it"):
                plan_score(spec_of(SCORE, f"sink.uri=file://{tmp_path}/a", "flag.threshold=1.8"))
            with pytest.raises(ResumeError, match=r"a reflag to flag\.threshold = 1\.8 was interrupted"):
                reflag(expected, "flag.alpha=0.2")
            reflag(expected)
        else:
            reflag(expected, "flag.threshold=1.8")
        assert timeless(files_of(tmp_path / "a")) == new
        assert verify(expected, lambda *_: None).whole
    assert ends == [-signal.SIGKILL] * 9 + [0]


def test_shards_that_are_scored_again_after_a_reflag_are_announced(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "a", "flag.threshold=2.1").ledger
    reflag(ledger, "flag.alpha=0.2")
    ledger.withdraw([1])
    plan = plan_score(spec_of(SCORE, f"sink.uri=file://{tmp_path}/a", "flag.alpha=0.2"))
    assert any(
        "reflagged; shards scored now have the regions and heatmaps of flag.alpha = 0.2" in n for n in plan.notes
    )
    jobs.score(plan, lambda *_: None)
    assert verify(ledger, lambda *_: None).whole


def test_the_results_of_a_night_belong_to_its_audit(tmp_path: Path) -> None:
    ledger = scored(tmp_path / "nights/00001/results", "flag.threshold=2.1").ledger
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/00001.json").write_text("{}")
    with pytest.raises(ResumeError, match="belongs to the audits in"):
        reflag(ledger, "flag.threshold=0.1")
    assert os.listdir(tmp_path / "claims") == ["00001.json"]
