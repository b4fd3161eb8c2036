"""The report's numbers against slow counts, what strangers write into it, and what it does without an archive."""

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydetect.cli.main import main
from raydetect.records import Part, Receipt
from raydetect.report.build import report_html
from raydetect.report.region_pictures import needed_px, with_boxes, zoom_box, zoomed
from raydetect.report.tally import MAX_BAD_PER_STATUS, tally
from raydetect.report.timeline import MAX_SPANS, Timeline
from raydetect.report.top_images import PER_CATEGORY, TopImages
from raydetect.sinks.parquet import encode_rows
from raydetect.sinks.rows import read_rows
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.results import HOSTILE, make_large_results, make_results, names_of, run_record
from tests.local.test_local import fit, run


class Page(HTMLParser):
    """Tags with their attributes, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def all_rows(ledger: Any) -> list[dict[str, Any]]:
    return [row for _, _, table in read_rows(ledger) for row in table.to_pylist()]


def test_sums_are_those_of_a_loop_over_all_rows() -> None:
    ledger = make_results("memory://r", names_of(60, ("bolt", "plate", "ring")))
    found = tally(ledger, ledger.require_run(), 7)
    rows = all_rows(ledger)
    assert len(rows) == 60
    counts = Counter((row["category"], row["status"]) for row in rows)
    for name, sums in found.categories.items():
        mine = [row for row in rows if row["category"] == name]
        scored = [row for row in mine if row["status"] == "ok"]
        assert sums.images == len(mine) and sums.bad == counts[name, "not_an_image"]
        assert sums.flagged == sum(row["flagged"] is True for row in mine)
        assert sums.highest == max(row["image_score"] for row in scored)
        assert sums.labelled == len(scored) and sums.anomalous == sum(row["label"] for row in scored)
        assert sums.missed == sums.false_alarms == 0
    for label in (0, 1):
        assert found.distributions[label].total == sum(row["label"] == label for row in rows)
    assert found.threshold == 2.0 and found.totals.rows == 60
    shown = found.top_images.rows()
    assert len(shown) == 7 and shown == sorted(shown, key=lambda row: -row["image_score"])
    best = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -row["image_score"])
    assert [row["key"] for row in shown[:4]] == [row["key"] for row in best[:4]]


def test_one_bad_category_does_not_hide_the_others() -> None:
    table = next(t for _, _, t in read_rows(make_results("memory://r", names_of(9))))
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    import pyarrow as pa

    made = [{**rows[0], "key": f"a{i}", "category": "loud", "image_score": 9.0 + i} for i in range(40)]
    made += [{**rows[0], "key": f"b{i}", "category": "still", "image_score": 1.0 + i} for i in range(3)]
    top_images = TopImages(20)
    for start in range(0, len(made), 5):
        top_images.add(pa.Table.from_pylist(made[start : start + 5], schema=table.schema))
    chosen = top_images.rows()
    assert len(chosen) == 20 and sum(row["category"] == "still" for row in chosen) == 3 <= PER_CATEGORY
    assert [row["key"] for row in chosen[:14]] == [f"a{39 - i}" for i in range(14)]


def test_a_fleet_is_ranked_by_p_values_and_never_by_raw_scores() -> None:
    ledger = make_results("memory://r", names_of(30))
    run = {**ledger.require_run(), "result": run_record("memory://r", 3, fleet=["bolt", "plate"])["result"]}
    found = tally(ledger, run, 10)
    assert found.measure == "p_value" and found.threshold is None
    assert max(one.high for one in found.distributions.values()) <= 1.0
    p_values = [row["p_value"] for row in found.top_images.rows()]
    assert p_values == sorted(p_values)


def test_the_time_line_keeps_a_bounded_number_of_equal_spans() -> None:
    line = Timeline()
    for shard in range(1000):
        part = Part(shard=shard, number=0, last=True, path="p", sha256="s", rows=10, statuses={}, flagged=shard % 3)
        line.add(Receipt(shard=shard, uri=f"u{shard}", fingerprint="f", rows=10, statuses={"ok": 9}, parts=(part,)))
    assert len(line.spans) <= MAX_SPANS and line.shards_each == 16
    assert sum(span.images for span in line.spans) == 10_000 and sum(span.bad for span in line.spans) == 1000
    for span in line.spans[:-1]:
        assert span.last - span.first == 15 and span.flagged == sum(s % 3 for s in range(span.first, span.last + 1))
    assert line.spans[-1].last == 999 and line.spans[-1].last_uri == "u999"


@pytest.mark.parametrize("style", ["overlay", "map"])
def test_the_page_needs_no_network_and_is_the_same_each_time(style: str) -> None:
    ledger = make_results("memory://r", names_of(12), style)
    text = report_html(ledger, 6)
    assert text == report_html(ledger, 6)
    page = Page(text)
    images = [of for tag, of in page.tags if tag == "img"]
    assert len(images) == 12 and all((of["src"] or "").startswith("data:image/jpeg;base64,") for of in images)
    for _, of in page.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert (of.get(name) or "data:").startswith("data:")
        assert not [name for name in of if name.startswith("on")]
    assert "http" not in re.sub(r"http-equiv", "", re.sub(r"base64,[^\"]+", "", text))
    assert "url(" not in text and "@import" not in text
    assert "image AUROC" in text and "1.0000" in text and "threshold 2" in text


def test_what_strangers_write_is_text_and_nothing_else() -> None:
    hostile = [name.replace("/", "_") for name in HOSTILE]
    names = [hostile, ["<svg onload=alert(4)>/test/x/a.png", "b.png", "c.png"]]
    text = report_html(make_results("memory://r", names), 20)
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1 and "b" in tags
    assert not [of for _, of in page.tags if any(key.startswith("on") for key in of)]
    assert not [of for tag, of in page.tags if tag == "img" and of.get("src") == "x"]
    words = "".join(page.words)
    for name in hostile:
        assert name in words
    assert "{{ 7 * 7 }}" in words and "49.png" not in words
    assert words.count("<svg onload=alert(4)>") >= 2  # gallery or table, and the filter


def test_a_run_that_is_not_finished_and_has_no_archive_left_is_reported_too(tmp_path: Path) -> None:
    ledger = make_results(f"file://{tmp_path}", names_of(12))
    (tmp_path / "results" / "ledger" / "00001.json").unlink()
    (tmp_path / "results" / "manifest.json").unlink()
    for part in (tmp_path / "archive").iterdir():
        part.unlink()
    text = report_html(ledger)
    assert "Not finished: 1 shards are left" in text and "No image:" in text
    moved = tmp_path / "moved"
    (tmp_path / "results").rename(moved)
    ended = call("report", str(moved), "-o", str(tmp_path / "a" / "page.html"), "--pictures", "3")
    assert ended.exit_code == 0 and "Reported 8 images in 2 shards" in ended.output, ended.output
    page = Page((tmp_path / "a" / "page.html").read_text())
    assert len([1 for tag, of in page.tags if tag == "img" and of["class"] == "heat"]) == 3  # found where they are now


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    ended = call("report", str(tmp_path))
    assert ended.exit_code == 2 and "holds no run.json" in ended.output
    make_results(f"file://{tmp_path}", names_of(6))
    ended = call("report", f"{tmp_path}/results", "-o", f"{tmp_path}/results/run.json/x.html")
    assert ended.exit_code == 2 and "cannot be written" in ended.output
    (tmp_path / "results" / "scores" / "shard=00000" / "part-0000.parquet").write_bytes(b"PAR1 and no more")
    ended = call("report", f"{tmp_path}/results", "-o", f"{tmp_path}/x.html")
    assert ended.exit_code == 1 and "is not a valid Parquet part" in ended.output and "shard 0" in ended.output


def test_bad_images_are_sampled_by_status_and_counted_in_full() -> None:
    ledger = make_large_results("memory://big", 2, 3, 10_000)
    found = tally(ledger, ledger.require_run(), 5)
    assert found.totals.statuses == {"ok": 59_940, "corrupt": 60} and len(found.bad) == MAX_BAD_PER_STATUS
    assert found.distributions[None].total == 59_940


def test_no_row_can_point_the_report_at_a_file_of_this_machine(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hush")
    ledger = make_results("memory://r", [["a.png", "b.png"]])
    record = json.loads(ledger.storage.read("memory://r/results/ledger/00000.json"))
    rows = all_rows(ledger)
    from raydetect.records import Row

    wrong = [Row(**{**rows[0], "image_uri": f"github://x::{secret}", "heatmap_uri": f"zip://000000.png::{secret}"})]
    ledger.storage.write("memory://r/results/" + record["parts"][0]["path"], encode_rows(wrong))
    text = report_html(ledger)
    assert "unknown container" in text and "is not a heatmap of a results directory" in text


def test_a_real_run_names_its_detector_and_measures_its_pictures() -> None:
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(4, 1), 2)
    fit()
    plan, manifest = run("sink.heatmaps=all", "sink.style=map")
    text = report_html(plan.ledger, 5)
    assert f"patchcore ({plan.artifact.digest[:16]})" in text and "p-value at most 0.1" in text
    pictures = [of for tag, of in Page(text).tags if tag == "img"]
    assert len([of for of in pictures if of["class"] != "zoom"]) == 10  # overlays are drawn from maps
    located = sorted(all_rows(plan.ledger), key=lambda row: -row["image_score"])[:5]
    assert len(pictures) - 10 == sum(bool(row["regions"]) for row in located) > 0
    for row in located:
        for region in (row["regions"] or ())[:1]:
            assert f"of {region['width']} x {region['height']} px, {region['peak_score']:.4g} at (" in text
    for row in all_rows(plan.ledger):
        assert 0 < row["brightness"] < 1 and row["sharpness"] > 0
    fit("seed=1")
    assert "(since replaced)" in report_html(plan.ledger, 0) and manifest["rows"] == 7


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.integers(1, 1024),
)
@settings(max_examples=100, deadline=None)
def test_the_zoomed_part_holds_the_region_and_stays_in_the_picture(
    size: tuple[int, int], place: tuple[float, float, float, float], longest_px: int
) -> None:
    width, height = size
    x, y = int(place[0] * (width - 1)), int(place[1] * (height - 1))
    region = {
        "x": x,
        "y": y,
        "width": 1 + int(place[2] * (width - 1 - x)),
        "height": 1 + int(place[3] * (height - 1 - y)),
    }
    left, upper, right, lower = zoom_box(region, size)
    assert 0 <= left <= x + 1e-6 and x + region["width"] <= right + 1e-6 <= width + 2e-6
    assert 0 <= upper <= y + 1e-6 and y + region["height"] <= lower + 1e-6 <= height + 2e-6
    shown = max(size) * min(1.0, 360 / (right - left))
    assert needed_px([region], size, 1) >= min(shown, max(size)) - 1e-6
    scale = min(1.0, longest_px / max(size))
    picture = Image.new("RGB", (max(1, round(width * scale)), max(1, round(height * scale))), (90, 90, 90))
    zoom = zoomed(picture, [region], size)
    assert zoom.width == 360
    boxed = np.asarray(with_boxes(picture, [region], size, 360))
    assert ((boxed == (0, 229, 255)).all(-1).any() or min(picture.size) < 8) and picture.getextrema()[0] == (90, 90)


def test_a_box_is_drawn_around_its_region() -> None:
    region = {"x": 300, "y": 200, "width": 100, "height": 60}
    drawn = (np.asarray(with_boxes(Image.new("RGB", (800, 400)), [region], (800, 400), 400)) == (0, 229, 255)).all(-1)
    rows, columns = np.nonzero(drawn)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (150 - 3, 199 + 3, 100 - 3, 129 + 3)
    assert not drawn[100:130, 150:200].any()


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from raydetect.report.build import report_html\n"
        "from raydetect.sinks.ledger import Ledger\n"
        "from raydetect.storage import Storage\n"
        "report_html(Ledger(sys.argv[1], Storage()), 12)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for name, shards in (("small", 4), ("large", 40)):
        ledger = make_large_results(f"file://{tmp_path}/{name}", shards, 4, 2500)
        ended = subprocess.run([sys.executable, "-c", code, ledger.uri], capture_output=True, text=True, check=True)
        peaks.append(int(ended.stdout) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks  # MB; ten times the rows, of which 25 MB are numbers alone
