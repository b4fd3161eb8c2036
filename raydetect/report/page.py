"""Renders a report as one self-contained HTML file from a template, its styles and its script.

All values from outside are escaped by jinja2, and a content security policy allows only the page's own script, by its
digest.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from raydetect import __version__
from raydetect.left_out import REASONS
from raydetect.report.gallery import cards, gallery_notes
from raydetect.report.pictures import Pictures
from raydetect.report.run_charts import Chart, distribution_chart, p_limit, timeline_chart
from raydetect.report.tally import MAX_BAD_PER_STATUS, CategorySums, Tally
from raydetect.sinks.ledger import Ledger, Totals
from raydetect.sinks.run_progress import fdr_text, flags_nothing, labelled_auroc, level_text, notes_text, regions_text

MAX_LABELLED = 1_000_000  # omit the AUROC above, as it needs all labelled scores in memory
MAX_CATEGORY_ROWS = 300
MAX_SPEC_LENGTH = 20_000


@dataclass(frozen=True, slots=True)
class Fact:
    """A key figure at the top of the page."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Extra:
    """Section that an audit adds to the report of a night.

    Attributes:
        title: title of the page.
        verdict: one sentence.
        alarm: whether the verdict is an alarm.
        rules: (rule, outcome, values behind the outcome).
        measures: (measure, this night, baseline, difference).
        charts: drift charts.
        note: what the night is compared with.
    """

    title: str
    verdict: str
    alarm: bool
    rules: Sequence[tuple[str, str, str]]
    measures: Sequence[tuple[str, str, str, str]]
    charts: Sequence[Chart]
    note: str


def render(
    ledger: Ledger, run: Mapping[str, Any], tally: Tally, pictures: Pictures, detector: str, extra: Extra | None = None
) -> str:
    """Renders the page of a results directory; the same results give the same page.

    Args:
        ledger: ledger of the results directory.
        run: content of its `run.json`.
        tally: tally of its rows.
        pictures: opens the images and heatmaps of the gallery.
        detector: description of the detector, shown at the top.
        extra: section of an audit.
    """
    environment = Environment(
        loader=FunctionLoader(_part), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script, style = _part("report.js"), _part("report.css")
    gallery = cards(tally.top_images.rows(), pictures)
    manifest = ledger.manifest()
    charts = [distribution_chart(tally, p_limit(run, manifest)), timeline_chart(tally.timeline)]
    return environment.get_template("report.html").render(
        title=extra.title if extra else f"Report of {_short_name(ledger.uri)}",
        script=script,
        style=style,
        policy=_policy(script),
        scored=[*_scored(run, detector, manifest), *_regions(run, tally)],
        facts=facts(ledger, run, tally, manifest),
        finished=tally.totals.shards >= int(run["num_shards"]),
        shards_left=int(run["num_shards"]) - tally.totals.shards,
        charts=[chart for chart in charts if chart is not None],
        gallery=gallery,
        gallery_notes=gallery_notes(gallery, tally.totals, ledger.uri),
        gallery_categories=sorted({card.category for card in gallery if card.category}),
        has_labels=any(card.label is not None for card in gallery),
        categories=_category_rows(tally),
        more_categories=max(0, len(tally.categories) - MAX_CATEGORY_ROWS),
        statuses=[(status, count) for status, count in sorted(tally.totals.statuses.items()) if status != "ok"],
        bad=tally.bad,
        most_bad=MAX_BAD_PER_STATUS,
        left_out=[(REASONS.get(why, why), entry) for why, entry in sorted(tally.totals.left_out.counts.items())],
        notes=notes_text(tally.totals.notes),
        box=_box(ledger, run, tally, manifest),
        spec=yaml.safe_dump(run["spec"], sort_keys=False, allow_unicode=True)[:MAX_SPEC_LENGTH],
        packages=sorted(run.get("packages", {}).items()),
        version=__version__,
        extra=extra,
    )


def facts(ledger: Ledger, run: Mapping[str, Any], tally: Tally, manifest: Mapping[str, Any] | None) -> list[Fact]:
    """Returns the key figures at the top of the page."""
    totals = tally.totals
    bad = _percent(totals.bad_rows, totals.rows)
    key_figures = [
        Fact("images", f"{totals.rows:,}", f"in {totals.shards:,} of {int(run['num_shards']):,} shards"),
        _flagged(run, tally, manifest),
        Fact("without a score", f"{totals.bad_rows:,}", bad, "bad" if totals.bad_rows else ""),
        Fact("heatmaps", f"{totals.heatmaps:,}", _pictures_text(run, totals)),
    ]
    quality = labelled_auroc(ledger) if 0 < totals.labelled <= MAX_LABELLED else None
    if quality is not None:
        key_figures.append(Fact("image AUROC", f"{quality[0]:.4f}", f"over {quality[1]:,} labelled images"))
    return key_figures


def _flagged(run: Mapping[str, Any], tally: Tally, manifest: Mapping[str, Any] | None) -> Fact:
    totals = tally.totals
    if flags_nothing(run):
        return Fact("flagged", "nothing", "by flag: none")
    note = _percent(totals.flagged, totals.rows)
    if run["spec"]["flag"].get("fdr") is not None:
        if manifest is None:
            return Fact("flagged", "open", "decided when all shards are committed (flag.fdr)")
        fdr = manifest["fdr"]
        if fdr["p_threshold"] is None:
            return Fact("flagged", "0", fdr_text(fdr))
        note += f"; at most {100 * fdr['false_share']:.2f} % of these expected normal, limit {100 * fdr['level']:g} %"
    return Fact("flagged", f"{totals.flagged:,}", note, "bad" if totals.flagged else "")


def _category_rows(tally: Tally) -> list[tuple[str, CategorySums, str]]:
    """Rows of the category table, largest flagged share first; empty if images have no category."""
    if set(tally.categories) <= {""}:
        return []
    order = sorted(tally.categories.items(), key=lambda item: (-item[1].flagged / max(item[1].images, 1), item[0]))
    return [(name or "(none)", sums, _percent(sums.flagged, sums.images)) for name, sums in order[:MAX_CATEGORY_ROWS]]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} % of images" if whole else ""


def _scored(run: Mapping[str, Any], detector: str, manifest: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    spec = run["spec"]
    uris = spec["source"]["uri"]
    return [
        ("Source", uris if isinstance(uris, str) else ", ".join(uris)),
        ("Detector", f"{detector}, {spec['artifact']}"),
        ("Flagged when", _rule(run, manifest)),
    ]


def _pictures_text(run: Mapping[str, Any], totals: Totals) -> str:
    more = f", with {totals.close_ups:,} close-ups" if totals.close_ups else ""
    return f"of style {run['spec']['sink']['style']}{more}"


def _regions(run: Mapping[str, Any], tally: Tally) -> list[tuple[str, str]]:
    """How many regions the rows have; nothing for a run that an older version began."""
    return [("Regions", regions_text({**run, **tally.totals.plain()}))] if "region_threshold" in run else []


def _rule(run: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> str:
    """Describes the flagging rule of the job, with the resulting limit for a rule over the whole archive."""
    flag = run["spec"]["flag"]
    if flags_nothing(run):
        return "never, by flag: none"
    if flag.get("fdr") is not None:
        rule = f"false discovery rate at most {100 * flag['fdr']:g} % over the whole archive (Benjamini-Hochberg)"
        if manifest is None:
            return f"{rule}; decided when all shards are committed"
        limit = manifest["fdr"]["p_threshold"]
        return f"{rule}: p-value at most {limit:.6g}" if limit is not None else f"{rule}: no p-value is small enough"
    if flag.get("alpha") is not None:
        return f"p-value at most {flag['alpha']}"
    if flag.get("threshold") is not None:
        return f"image score at least {flag['threshold']}"
    limit, note = p_limit(run, manifest), level_text(run)
    return f"p-value at most {limit:.4g}" + (f": {note}" if note else "") if limit is not None else note


def _box(
    ledger: Ledger, run: Mapping[str, Any], tally: Tally, manifest: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    result = run["result"]
    finished = manifest is not None and tally.totals.shards >= int(run["num_shards"])
    return [
        ("Results", ledger.uri),
        ("Artifact", str(result["artifact"])),
        ("Archive fingerprint", str(result["archive"])),
        ("Bytes of the archive", f"{int(run['num_bytes']):,}"),
        ("Finished", "yes" if finished else "no"),
    ]


def _short_name(uri: str) -> str:
    """Returns the last two names of a path, enough to distinguish runs."""
    return "/".join(uri.partition("://")[2].rstrip("/").split("/")[-2:]) or uri


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _part(name: str) -> str:
    return (files("raydetect.report") / "templates" / name).read_text("utf-8")
