"""False discovery control: Benjamini-Hochberg against a slow one, its promise over draws, and the decision of a run."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from raydetect.audit.statistics import Statistics
from raydetect.cli.main import main
from raydetect.config import FlagSpec
from raydetect.config.validation import to_plain
from raydetect.errors import SpecError
from raydetect.export.folder import write_folder
from raydetect.export.table import write_csv
from raydetect.metrics.conformal import p_values, threshold_for
from raydetect.metrics.discovery import discover
from raydetect.report.build import report_html
from raydetect.report.pictures import Pictures
from raydetect.report.tally import tally
from raydetect.sinks.rows import read_rows
from raydetect.sinks.run_progress import fdr_text, progress
from tests.local.test_local import data, rows, run, spec_of  # noqa: F401 (a fixture)

DRAWS = 200


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60),
    st.sampled_from([20, 200]),
    st.sampled_from([0.01, 0.05, 0.1, 0.5]),
)
def test_what_is_flagged_is_what_scipy_rejects(ranks: list[int], size: int, level: float) -> None:
    values = np.array(ranks) / size
    expected = false_discovery_control(values) <= level * (1 + 1e-9)
    found = discover(Counter(values.tolist()), level, size - 1)
    flagged = np.zeros(len(values), bool) if found.p_threshold is None else values <= found.p_threshold
    assert flagged.tolist() == expected.tolist() and found.flagged == expected.sum()
    assert found.false_share <= level * (1 + 1e-9)
    if found.p_threshold is None and min(ranks) == 1:
        at_best = Counter(ranks)[min(ranks)]
        enough = Counter({1 / (found.needed_held_out + 1): at_best, 1.0: len(ranks) - at_best})
        assert discover(enough, level, found.needed_held_out).flagged >= at_best
        too_few = Counter({1 / found.needed_held_out: at_best, 1.0: len(ranks) - at_best})
        assert found.needed_held_out < 2 or discover(too_few, level, found.needed_held_out - 1).flagged < at_best
    else:
        assert found.needed_held_out == 0


def interval(shares: list[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval."""
    half = 1.96 * float(np.std(shares, ddof=1)) / np.sqrt(len(shares))
    mean = float(np.mean(shares))
    return mean, mean - half, mean + half


@pytest.mark.parametrize(("level", "normal", "anomalous"), [(0.05, 400, 100), (0.1, 300, 300), (0.2, 450, 50)])
def test_the_false_discovery_rate_of_a_mixed_archive_is_at_most_the_level(
    level: float, normal: int, anomalous: int
) -> None:
    random, shares, found = np.random.default_rng(7), [], []
    for _ in range(DRAWS):
        held = np.sort(random.gamma(2.0, size=999))
        scores = np.concatenate([random.gamma(2.0, size=normal), 6 + random.gamma(2.0, size=anomalous)])
        values = p_values(held, scores)
        decision = discover(Counter(values.tolist()), level, len(held))
        flagged = values <= (decision.p_threshold or 0.0)
        shares.append(flagged[:normal].sum() / max(1, flagged.sum()))
        found.append(flagged[normal:].mean())
    mean, low, high = interval(shares)
    print(f"level {level}: false discovery rate {mean:.4f} [{low:.4f}, {high:.4f}], found {np.mean(found):.3f}")
    assert mean <= level
    assert high <= level * 1.05  # the rate is level * share of normal images, and the interval lies there
    assert low <= level * normal / (normal + anomalous) * 1.1 and np.mean(found) > 0.5


def bound(level: float, held: int, tested: int) -> tuple[float, float]:
    """Where the mean flagged share of normal images lies: P(p <= level) exactly, with four standard errors."""
    share = np.floor(level * (held + 1) * (1 + 1e-9)) / (held + 1)
    variance = share * (1 - share) * (1 / tested + 1 / (held + 2))
    half = 4 * np.sqrt(variance / DRAWS)
    return share - half, share + half


@pytest.mark.parametrize("level", [0.01, 0.05, 0.1])
def test_the_flagged_share_of_held_out_normal_images_is_inside_its_interval(level: float) -> None:
    random, shares = np.random.default_rng(3), []
    for _ in range(DRAWS):
        scores = random.permutation(random.lognormal(size=600))
        shares.append(float((scores[300:] >= threshold_for(np.sort(scores[:300]), level)).mean()))
    low, high = bound(level, 300, 300)
    assert low <= np.mean(shares) <= high


def test_a_job_states_one_rule() -> None:
    for words in ("flag={fdr: 0.1, alpha: 0.1}", "flag={fdr: 0.1, threshold: 3}", "flag={fdr: 1.5}"):
        with pytest.raises(SpecError, match=r"set only one of|less than 1"):
            spec_of_score(words)
    assert spec_of_score("flag={fdr: 0.1}").flag == FlagSpec(fdr=0.1)
    assert spec_of_score("flag={}").flag == FlagSpec()


def spec_of_score(*overrides: str):  # type: ignore[no-untyped-def]
    from tests.local.test_local import SCORE

    return spec_of(SCORE, *overrides)


@pytest.mark.usefixtures("data")
def test_the_decision_is_in_the_manifest_and_rows_are_left_open() -> None:
    plan, manifest = run("flag={fdr: 0.3}", "sink.heatmaps=flagged")
    found, fdr = rows(plan), manifest["fdr"]
    assert all(row["flagged"] is None and row["threshold"] is None for row in found)
    counts = Counter(row["p_value"] for row in found)
    assert fdr.items() >= to_plain(discover(counts, 0.3, 99)).items()
    chosen = [row for row in found if row["p_value"] <= fdr["p_threshold"]]
    assert len(chosen) == fdr["flagged"] == manifest["flagged"] > 0
    assert {row["key"] for row in found if row["image_score"] >= fdr["threshold"]} == {row["key"] for row in chosen}
    assert fdr["expected_false"] == pytest.approx(17 * fdr["p_threshold"])
    assert fdr["false_share"] == pytest.approx(fdr["expected_false"] / fdr["flagged"]) and fdr["false_share"] <= 0.3
    drawn = {row["key"] for row in found if row["heatmap_uri"]}
    assert drawn == {row["key"] for row in found if row["p_value"] <= 0.3} >= {row["key"] for row in chosen}
    told = progress(plan.ledger)
    assert told.flagged == fdr["flagged"] and told.plain()["fdr"] == fdr
    assert any("flagged if p_value <=" in line for line in told.lines())


@pytest.mark.usefixtures("data")
def test_an_unfinished_run_says_that_the_end_decides_and_a_resumed_one_decides_alike() -> None:
    plan, manifest = run("flag={fdr: 0.3}")
    storage, uri = plan.ledger.storage, plan.ledger.uri
    storage.delete(f"{uri}/manifest.json")
    storage.delete(f"{uri}/ledger/00001.json")
    told = progress(plan.ledger)
    assert told.flagged is None and any("when all shards are committed" in line for line in told.lines())
    assert run("flag={fdr: 0.3}")[1] == manifest
    stored = json.loads(storage.read(f"{uri}/manifest.json"))
    assert stored["fdr"] == manifest["fdr"]


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("level", [0.3, 0.08])
def test_reports_exports_and_nights_tell_the_decision(level: float, tmp_path: Path) -> None:
    plan, manifest = run(f"flag={{fdr: {level}}}", "sink.heatmaps=all")
    ledger, limit = plan.ledger, manifest["fdr"]["p_threshold"]
    chosen = {row["key"] for row in rows(plan) if limit is not None and row["p_value"] <= limit}
    assert bool(chosen) == (level == 0.3)
    told = [row for _, _, table in read_rows(ledger) for row in table.to_pylist()]
    assert {row["key"] for row in told if row["flagged"]} == chosen
    assert {row["flagged"] for row in told if row["key"] not in chosen} == {False}
    assert {row["threshold"] for row in told} == {manifest["fdr"]["threshold"]}
    night = Statistics("image_score")
    counted = tally(ledger, ledger.require_run(), 5, night.add)
    sums = [counted.totals.flagged, night.flagged, sum(span.flagged for span in counted.timeline.spans)]
    assert sums == [len(chosen)] * 3 and sum(sums.flagged for sums in counted.categories.values()) == len(chosen)
    page = report_html(ledger, 5)
    asked = f"false discovery rate at most {100 * level:g} % over the whole archive (Benjamini-Hochberg)"
    decided = "no p-value is small enough" if limit is None else f"p-value at most {limit:.6g}"
    assert f"Flagged when</dt><dd>{asked}: {decided}<" in page and "least None" not in page
    assert (f"limit {100 * level:g} %" if chosen else "no p-value of 17 images is small enough") in page
    pictures = Pictures(ledger, ledger.require_run(), plan.archive.storage)
    count, missing = write_folder(pictures, tmp_path)
    assert count == len(chosen) and not missing
    write_csv(ledger, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert {row["key"] for row in csv.DictReader(file) if row["flagged"] == "true"} == chosen


@pytest.mark.usefixtures("data")
def test_a_report_of_an_unfinished_run_leaves_flags_open(tmp_path: Path) -> None:
    plan, _ = run("flag={fdr: 0.3}")
    plan.ledger.storage.delete(f"{plan.ledger.uri}/manifest.json")
    page = report_html(plan.ledger, 5)
    assert "decided when all shards are committed" in page
    assert "(Benjamini-Hochberg); decided when all shards are committed<" in page
    ended = CliRunner().invoke(main, ["export", plan.ledger.uri, "--as", "folder", "-o", f"{tmp_path}/out"])
    assert ended.exit_code == 2 and "decided when the run is finished" in ended.output
    assert all(row["flagged"] is None for _, _, table in read_rows(plan.ledger) for row in table.to_pylist())


@pytest.mark.usefixtures("data")
def test_too_small_a_calibration_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(SpecError, match=r"flag\.fdr = 0\.01 needs at least 99 held-out normal images"):
        run("flag={fdr: 0.01}")


def test_when_nothing_is_flagged_the_needed_size_is_told() -> None:
    found = discover({1 / 100: 1, 0.5: 99}, 0.05, 99)
    assert (found.flagged, found.p_threshold, found.needed_held_out) == (0, None, 1999)
    assert "need 1,999 held-out normal images" in fdr_text({**to_plain(found), "false_share": found.false_share})
    assert discover({}, 0.1, 99).tested == 0
    assert fdr_text({**to_plain(discover({}, 0.1, 99)), "false_share": 0.0}).startswith("no p-value of 0 images")


def test_no_size_is_told_where_a_larger_calibration_would_not_help() -> None:
    """The best image is below one held-out image, and its p-value stays near 2 / 100 however many are held out."""
    found = discover({2 / 100: 1, 0.5: 99}, 0.05, 99)
    assert (found.flagged, found.p_threshold, found.needed_held_out) == (0, None, 0)
    assert fdr_text({**to_plain(found), "false_share": 0.0}) == (
        "no p-value of 100 images is small enough for a false discovery rate of 5 %."
    )
    random = np.random.default_rng(1)
    score = 2.3  # 1 % of normal images are above it
    values = [float(p_values(np.sort(random.normal(size=size)), np.array([score]))[0]) for size in (99, 1999, 99_999)]
    assert all(discover({value: 1, 0.5: 99}, 0.05, 99_999).flagged == 0 for value in values[1:])


def test_real_bottles_keep_the_promises(real_data: Path, real_weights: Path) -> None:
    """PatchCore on half of the training bottles; the other half and the test images are scored once, then split."""
    from raydetect.detectors._registry import build_detector
    from tests.builders.bottle import fit_in_memory, read_bottles, scores_of

    train, test = read_bottles(real_data, "train", 128), read_bottles(real_data, "test", 128)
    random = np.random.default_rng(0)
    order = random.permutation(len(train.names))
    detector = build_detector(
        "patchcore",
        {"backbone": "resnet18", "weights": str(real_weights), "image_size": [128, 128],
         "coreset_sampling_ratio": 0.05},
    )  # fmt: skip
    detector.load_weights()
    fit_in_memory(detector, train.only(order[:100]))
    normal, defects = scores_of(detector, train.only(order[100:])), scores_of(detector, test.only(test.labels == 1))
    for level in (0.05, 0.1):
        shares = []
        for _ in range(DRAWS):
            mixed = random.permutation(normal)
            held, new = np.sort(mixed[:69]), mixed[69:]
            shares.append(float((new >= threshold_for(held, level)).mean()))
        low, high = bound(level, 69, len(normal) - 69)
        print(f"alpha {level}: flagged share of normal bottles {np.mean(shares):.4f}, promised [{low:.4f}, {high:.4f}]")
        assert low <= np.mean(shares) <= high
    false = []
    for _ in range(DRAWS):
        mixed = random.permutation(normal)
        held, new = np.sort(mixed[:69]), np.concatenate([mixed[69:], random.choice(defects, 20, replace=False)])
        values = p_values(held, new)
        decision = discover(Counter(values.tolist()), 0.1, len(held))
        flagged = values <= (decision.p_threshold or 0.0)
        false.append(flagged[: len(normal) - 69].sum() / max(1, flagged.sum()))
    mean, low, high = interval(false)
    print(f"fdr 0.1: false discovery rate on bottles {mean:.4f} [{low:.4f}, {high:.4f}]")
    assert mean <= 0.1
