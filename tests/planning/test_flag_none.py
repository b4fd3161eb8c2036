"""`flag: none` decides nothing: scores and p-values are stored, and everything says that nothing is flagged."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.cli.main import main
from raydetect.config import FlagSpec, ScoreSpec, parse_job, public_spec, result_digest, result_settings
from raydetect.config.validation import apply_overrides, parse_yaml
from raydetect.errors import SpecError
from raydetect.sinks.verify import verify
from tests.local.test_local import SCORE, rows, run, spec_of

NONE = "flag=none"


def command(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_the_text_is_read_and_stands_for_no_rule() -> None:
    values = {**parse_yaml("flag: none", "job"), **{k: v for k, v in SCORE.items() if k != "flag"}}
    spec = parse_job(values, "job")
    assert isinstance(spec, ScoreSpec) and spec.flag == FlagSpec(nothing=True) and not spec.flag.is_usual
    assert spec.flag.smallest_p(3) is None and spec.flag.text == "flag: none"
    assert spec_of({**SCORE, "flag": public_spec(spec)["flag"]}).flag == spec.flag
    assert result_digest(spec) != result_digest(spec_of(SCORE, "flag={}"))


def test_rules_replace_each_other_on_the_command_line() -> None:
    assert apply_overrides({"flag": "none"}, ["flag.alpha=0.1"]) == {"flag": {"alpha": 0.1}}
    assert apply_overrides({"flag": {"alpha": 0.1}}, [NONE]) == {"flag": "none"}
    assert apply_overrides({"flag": {"nothing": True}}, ["flag.fdr=0.1"]) == {"flag": {"fdr": 0.1}}


@pytest.mark.parametrize("flag", ["None", "nothing", ["none"], {"nothing": True, "alpha": 0.1}])
def test_other_words_are_refused(flag: Any) -> None:
    with pytest.raises(SpecError, match="flag"):
        spec_of({**SCORE, "flag": flag})


def test_an_audit_needs_a_rule() -> None:
    audit = {**{k: v for k, v in SCORE.items() if k != "kind"}, "kind": "audit", "flag": "none"}
    with pytest.raises(SpecError, match=r"flag: none decides nothing, but an audit compares the flagged share"):
        parse_job(audit, "job")


def test_settings_of_results_of_earlier_versions_are_the_same() -> None:
    settings = result_settings(public_spec(spec_of(SCORE)))
    assert settings["flag"] == {"alpha": 0.1, "threshold": None, "fdr": None}
    assert result_settings(public_spec(spec_of(SCORE, NONE)))["flag"]["nothing"] is True


@pytest.mark.usefixtures("mixed_shards")
def test_rows_have_scores_and_p_values_and_no_flag() -> None:
    expected = rows(run("sink.uri=memory://data/flagged", "flag.alpha=0.1")[0])
    plan, manifest = run(NONE)
    assert any("sink.heatmaps: flagged stores no heatmap" in note for note in plan.notes)
    found = rows(plan)
    same = ("key", "image_score", "p_value", "brightness")
    assert [[row[n] for n in same] for row in found] == [[row[n] for n in same] for row in expected]
    empty = ("flagged", "threshold", "heatmap_uri", "regions")
    assert all(row[name] is None for row in found for name in empty)
    assert any(row["flagged"] for row in expected)
    assert (manifest["flagged"], manifest["heatmaps"], manifest["regions"]) == (0, 0, 0)
    assert "fdr" not in manifest and verify(plan.ledger, lambda *_: None).whole


def test_every_command_says_that_nothing_is_flagged(tmp_path: Path, mixed_shards: None) -> None:
    job, out = tmp_path / "score.yaml", str(tmp_path / "out")
    job.write_text(yaml.safe_dump({**SCORE, "sink": {"uri": out}, "flag": "none"}))
    assert "ready to score" in command("check", str(job)).output
    done = command("score", str(job), "--local")
    assert done.exit_code == 0 and "Flagged: nothing, by flag: none; heatmaps 0." in done.output, done.output
    assert "Flagged    nothing, by flag: none" in command("status", out).output
    assert json.loads(command("status", out, "--json").output)["flagged"] is None
    page = tmp_path / "page.html"
    assert "none flagged, by flag: none" in command("report", out, "-o", str(page)).output
    assert "never, by flag: none" in page.read_text()
    table = tmp_path / "rows.csv"
    assert command("export", out, "--as", "csv", "-o", str(table)).exit_code == 0
    folder = command("export", out, "--as", "folder", "-o", str(tmp_path / "folder"))
    assert folder.exit_code == 2 and "has no flagged images, by flag: none" in folder.output
    assert "raydetect reflag" in folder.output
    assert command("verify", out).exit_code == 0
    again = command("score", str(job), "--local", "--set", "flag.alpha=0.1")
    assert again.exit_code == 2 and "spec.flag.nothing: true -> null" in again.output


@pytest.mark.usefixtures("mixed_shards")
def test_heatmaps_of_all_images_are_drawn() -> None:
    assert run(NONE, "sink.heatmaps=all")[1]["heatmaps"] == 17


@pytest.mark.parametrize(
    ("overrides", "is_said"),
    [
        ((), False),
        (("sink.max_regions=0",), True),
        ((NONE,), True),
        ((NONE, "sink.style=map"), False),
        (("sink.max_regions=0", "sink.style=map", "sink.heatmaps=none"), True),
    ],
)
@pytest.mark.usefixtures("mixed_shards")
def test_the_plan_says_whether_outlines_can_be_exported(
    overrides: tuple[str, ...], is_said: bool, tmp_path: Path
) -> None:
    plan, _ = run(f"sink.uri=file://{tmp_path}/out", *overrides)
    said = [note for note in plan.notes if "`raydetect export --as coco` will not be possible" in note]
    assert len(said) == is_said
    done = command("export", f"{tmp_path}/out", "--as", "coco", "-o", str(tmp_path / "coco.json"))
    assert done.exit_code == (2 if is_said else 0), done.output
    if is_said:
        assert "Score into another sink.uri with sink.style: map" in done.output
