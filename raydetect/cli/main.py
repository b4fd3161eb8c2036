"""The `raydetect` command line. Commands import torch and Ray only when needed, so that `--help` is fast."""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect import __version__
from raydetect.cli.audit import audit
from raydetect.cli.calibrate import calibrate
from raydetect.cli.evaluate import evaluate
from raydetect.cli.export import export
from raydetect.cli.options import (
    BAD_JOB,
    cluster,
    errors,
    expect,
    job_file,
    job_values,
    ledger_of,
    load,
    load_checked,
    overrides,
    parse,
    replace,
    storage_options,
    with_replace,
)
from raydetect.cli.plan import plan
from raydetect.cli.reflag import reflag
from raydetect.cli.report import report
from raydetect.cli.scoring import accepted_text, changed_text, retried_text, run_score
from raydetect.cli.verify import verify
from raydetect.errors import SpecError
from raydetect.records import BAD_STATUSES

if TYPE_CHECKING:
    from raydetect.config import FitSpec
    from raydetect.planning.plan import ScorePlan
    from raydetect.records import FitReport


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raydetect")
def main() -> None:
    """Find anomalous images in large archives: fit detectors, score archives on Ray, keep a ledger.

    Exit codes: 0 success, 1 the run failed, 2 the job file is invalid, 3 finished with too many bad rows,
    4 an audit raised an alarm.
    """


@main.command()
@job_file
@overrides
def check(job: Path, overrides: tuple[str, ...]) -> None:
    """Find all mistakes in a job file, without a cluster."""
    with errors(BAD_JOB):
        from raydetect.check import find_problems
        from raydetect.check.preview import source_lines

        spec = load_checked(job, overrides)
        problems = find_problems(spec)
    if problems:
        for sentence in problems:
            click.echo(f"{job}: {sentence}", err=True)
        sys.exit(BAD_JOB)
    with errors(BAD_JOB):
        lines = source_lines(spec)
    for line in lines:
        click.echo(line)
    click.echo(f"{job}: ready to {spec.kind}.")


@main.command()
@job_file
@overrides
@cluster
@click.option("--local", "in_process", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--extend", metavar="ARTIFACT", help="Add the images to this artifact's memory bank instead of fitting a new one."
)
@replace
def fit(
    job: Path, overrides: tuple[str, ...], address: str | None, in_process: bool, extend: str | None, replace: bool
) -> None:
    """Fit a detector on normal images and write the artifact."""
    with errors(BAD_JOB):
        spec = expect(load(job, _with_extend(with_replace(overrides, replace), extend)), "fit", job)
        from raydetect.artifacts.replacement import existing_artifact
        from raydetect.check import find_problems

        problems = find_problems(spec)
        if problems:
            raise SpecError(" ".join(problems))
        from raydetect.progress import FitDisplay
        from raydetect.storage import Storage

        replaced = existing_artifact(spec.artifact, Storage(spec.storage))
    with errors(), FitDisplay() as display:
        if in_process:
            from raydetect.local import jobs as local

            report = local.fit(spec, display.on_progress)
        else:
            from raydetect.distributed.fitting.fit import fit as fit_on_ray

            report = fit_on_ray(spec, address, display.on_progress)
    _print_fit(spec, report)
    if replaced is not None:
        click.echo(f"Replaced {replaced.text}.")


def _with_extend(overrides: tuple[str, ...], extend: str | None) -> tuple[str, ...]:
    return overrides if extend is None else (*overrides, f"extend={extend}")


def _print_fit(spec: "FitSpec", report: "FitReport") -> None:
    from raydetect.metrics.conformal import usual_level_text
    from raydetect.progress import bytes_text

    facts = report.facts
    images, seconds = facts["images"], facts["seconds"]
    by_workers = f" by {facts['workers']} workers" if facts["workers"] > 1 else ""
    per_category = f" for each of {facts['categories']} categories" if "categories" in facts else ""
    total = sum(seconds.values())
    click.echo(f"Fitted {spec.detector.title}{per_category} on {images['fitted']} images{by_workers} in {total:.0f} s.")
    for phase, elapsed in seconds.items():
        peak = bytes_text(facts["peak_memory_bytes"][phase])
        click.echo(f"  {phase:<10} {elapsed:8.1f} s   peak memory of a worker so far {peak}")
    for member in facts.get("members", [facts]):
        if "coreset" in member:
            click.echo(_coreset_text(member["coreset"]))
    _print_labels(facts)
    click.echo(f"Weights: {facts['weights']}")
    if "random seed:" in str(facts["weights"]):
        click.echo("Note: random weights find only coarse defects; set `weights:` to a file for real use.")
    for hint in facts.get("hints", ()):
        click.echo(f"Hint: {hint}")
    for reason in facts["bad_reasons"]:
        click.echo(f"Bad: {reason}")
    left_out = f"{images['bad']} bad and {images['labelled_anomalous_left_out']} labelled anomalous left out"
    click.echo(f"Calibrated on {_calibrated_text(facts)}; {left_out}.")
    note = "" if "categories" in facts else usual_level_text(images["held_out"])
    if note:
        click.echo(f"Note: {note}.")
    click.echo(f"Artifact: {report.uri} (sha256 {report.digest[:16]})")


def _calibrated_text(facts: Mapping[str, Any]) -> str:
    images = facts["images"]["held_out"]
    if "categories" in facts:
        return f"{images:,} normal images that the scoring fits had not seen"
    if "folds" not in facts:
        return f"{images:,} held-out normal images"
    return f"{images:,} normal images, each scored by one of {facts['folds']} fits that had not seen it"


def _print_labels(facts: Mapping[str, Any]) -> None:
    """Prints how labels were read, and a note if they may be inverted."""
    from raydetect.archives.labels import labels_text
    from raydetect.left_out import left_out_of, left_out_text

    counts = [(label, text, count) for label, text, count in facts["labels"]]
    normal, anomalous = (sum(count for label, _, count in counts if label == wanted) for wanted in (0, 1))
    if normal or anomalous:
        click.echo(f"label: {labels_text(counts)}")
    if normal < anomalous:
        click.echo(
            f"Note: only {normal:,} of {normal + anomalous:,} labelled images are normal. If labels are inverted, set "
            "source.normal_names."
        )
    left_out = left_out_text(left_out_of(facts["left_out"]))
    if left_out:
        click.echo(f"Left out: {left_out}.")


def _coreset_text(coreset: dict[str, Any]) -> str:
    proven = coreset["proven_ratio"]
    ratio = "without a proven bound" if proven is None else f"at most {proven:.2f} times the best possible"
    return (
        f"Memory bank: {coreset['rows']:,} of {coreset['of']:,} patch embeddings ({coreset['mode']}), covering radius "
        f"{coreset['covering_radius']:.3g}, {ratio}."
    )


@main.command()
@job_file
@overrides
@cluster
@click.option("--local", "in_process", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--retry",
    multiple=True,
    type=click.Choice(sorted(BAD_STATUSES)),
    metavar="STATUS",
    help="Rescore shards that contain rows with this status, such as unreadable or bad_shard.",
)
@click.option(
    "--accept-new",
    is_flag=True,
    help="Score what is new in an archive that has changed since; what was scored keeps its rows.",
)
def score(
    job: Path,
    overrides: tuple[str, ...],
    address: str | None,
    in_process: bool,
    retry: tuple[str, ...],
    accept_new: bool,
) -> None:
    """Score an archive; running the same job again resumes it."""
    with errors(BAD_JOB):
        spec = expect(load(job, overrides), "score", job)
        if spec.engine == "serve" and not (in_process or address or os.environ.get("RAY_ADDRESS")):
            raise SpecError("engine: serve needs the cluster on which `raydetect serve` runs. Set --address.")
        from raydetect.planning.plan import plan_score

        plan = plan_score(spec, retry=retry, accept_new=accept_new)
        plan.begin()
    if retry:
        click.echo(retried_text(plan, retry), err=True)
    done = len(plan.shards) - len(plan.todo)
    if accept_new:
        click.echo(accepted_text(plan), err=True)
    elif plan.before is not None:
        click.echo(changed_text(plan.before, plan), err=True)
    if done:
        click.echo(f"{done} of {len(plan.shards)} shards are committed already; continuing with the rest.", err=True)
    for note in plan.notes:
        click.echo(f"Note: {note}", err=True)
    with errors():
        _summary(plan, run_score(plan, address, in_process))


def _summary(plan: "ScorePlan", manifest: dict[str, Any]) -> None:
    from raydetect.left_out import left_out_of, left_out_text
    from raydetect.sinks.run_progress import (
        NOTHING_FLAGGED,
        fdr_text,
        flags_nothing,
        heatmaps_text,
        labelled_auroc,
        level_text,
        notes_text,
        regions_text,
    )
    from raydetect.storage import join_uri

    uri = plan.ledger.uri
    kinds = ", ".join(f"{count:,} {status}" for status, count in manifest["statuses"].items())
    click.echo(f"Scored {manifest['rows']:,} images in {manifest['shards']:,} shards ({kinds or 'none'}).")
    left_out = left_out_text(left_out_of(manifest["left_out"]))
    if left_out:
        click.echo(f"Left out: {left_out}.")
    flagged = f": {NOTHING_FLAGGED}" if flags_nothing(manifest) else f" {manifest['flagged']:,}"
    click.echo(f"Flagged{flagged}; heatmaps {heatmaps_text(manifest)}.")
    if level_text(plan.run):
        click.echo(f"Note: {level_text(plan.run)}.")
    click.echo(f"Regions: {regions_text(manifest)}.")
    if manifest.get("notes"):  # none in manifests of older versions
        click.echo(f"Notes: {notes_text(manifest['notes'])}.")
    if "fdr" in manifest:
        click.echo(f"False discoveries: {fdr_text(manifest['fdr'])}")
    quality = labelled_auroc(plan.ledger)
    if quality is not None:
        mean = ", mean of the fleet's categories" if plan.artifact.categories else ""
        click.echo(f"Image AUROC over {quality[1]:,} labelled images{mean}: {quality[0]:.4f}")
    click.echo(f"Rows: {join_uri(uri, 'scores')}")
    click.echo(f"Manifest: {join_uri(uri, 'manifest.json')}")


@main.command()
@job_file
@overrides
@click.option("--address", required=True, help="Ray dashboard, http://HOST:8265.")
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is accepted.")
def submit(job: Path, overrides: tuple[str, ...], address: str, no_wait: bool) -> None:
    """Submit a job file to a cluster (Ray Jobs), follow its log and exit with its code."""
    with errors(BAD_JOB):
        values = job_values(job, overrides)
        parse(values, job)
        from raydetect.distributed import submit as jobs
    with errors():
        client, name = jobs.submit(address, values)
        click.echo(f"Submitted {name} to {address}.", err=True)
        if no_wait:
            click.echo(name)
            return
        code = jobs.follow(client, name, lambda text: click.echo(text, nl=False))
    click.echo(f"{name} ended with exit code {code}.", err=True)
    sys.exit(code)


@main.command()
@job_file
@overrides
@cluster
@click.option("--local", "in_process", is_flag=True, help="Run in this process, without Ray.")
def serve(job: Path, overrides: tuple[str, ...], address: str | None, in_process: bool) -> None:
    """Serve detectors over HTTP, for single images and whole archives.

    Local endpoints run until stopped; on a cluster they keep running, and the same command again rolls out changes.
    """
    with errors(BAD_JOB):
        spec = expect(load(job, overrides), "serve", job)
        from raydetect.gateway.http.tokens import read_tokens

        tokens = read_tokens(spec)
    names = ", ".join(sorted(spec.detectors))

    def ready(url: str, metrics: str) -> None:
        click.echo(f"Serving {names} at {url}")
        click.echo(f"Metrics: {metrics or 'none without Ray'}")
        click.echo(f"Page: {url}/   API: {url}/openapi.json   Tokens: {len(tokens.known) or 'none needed'}")

    target = address or os.environ.get("RAY_ADDRESS")
    with errors():
        if in_process:
            from raydetect.local.serving import serve_here

            serve_here(spec, tokens, ready, _wait_for_signal)
        else:
            from raydetect.distributed.serving.run import serve_on_ray

            serve_on_ray(spec, tokens, target, ready, _wait_for_signal)
    click.echo(f"Deployed to {target}; the endpoints keep running there." if target and not in_process else "Stopped.")


def _wait_for_signal() -> None:
    """Blocks until SIGINT or SIGTERM, then restores their handlers."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    stop.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)


@main.command()
@click.argument("results")
@storage_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(results: str, endpoint_url: str | None, profile: str | None, anon: bool, as_json: bool) -> None:
    """Show the progress of a results directory, using only its ledger."""
    with errors(BAD_JOB):
        from raydetect.sinks.run_progress import progress

        run_progress = progress(ledger_of(results, endpoint_url, profile, anon))
    if as_json:
        click.echo(json.dumps(run_progress.plain(), indent=1, sort_keys=True))
        return
    for line in run_progress.lines():
        click.echo(line)


@main.command()
@click.argument("name", required=False)
@click.option("--compare", is_flag=True, help="Print a comparison table.")
def detectors(name: str | None, compare: bool) -> None:
    """List the detectors, or the parameters of one detector with defaults and descriptions."""
    with errors(BAD_JOB):
        from raydetect.detectors._registry import detector_class, list_models

        if compare:
            if name is not None:
                raise SpecError("--compare: compares all detectors. Omit the name.")
            from raydetect.cli import comparison

            comparison.print_comparison(*comparison.compare())
            return
        if name is None:
            for known in list_models():
                info = detector_class(known).info
                click.echo(f"{known:<12} {info.title}, {info.venue}: {info.summary}")
            return
        _print_detector(detector_class(name), name)


def _print_detector(kind: Any, name: str) -> None:
    from raydetect.config.validation import describe_fields

    info = kind.info
    click.echo(f"{info.title} ({info.venue}, {info.paper}): {info.summary}.")
    click.echo(f"Labels needed: {info.labels}. Localises: {'yes' if info.localises else 'no'}.")
    click.echo(f"Published: {info.published}")
    click.echo(f"\nParameters of detector.name: {name}")
    for field in describe_fields(kind.Params):
        click.echo(f"  {field.name}: {field.type} = {field.default}")
        click.echo(f"      {field.doc}")


for command in (audit, calibrate, evaluate, export, plan, reflag, report, verify):
    main.add_command(command)
