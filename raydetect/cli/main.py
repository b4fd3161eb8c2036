"""The `raydetect` command line. Commands import torch and Ray only when needed, so that `--help` is fast."""

import json
import os
import signal
import sys
import threading
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from raydetect import __version__
from raydetect.cli.audit import audit
from raydetect.cli.calibrate import calibrate
from raydetect.cli.doctor import doctor
from raydetect.cli.evaluate import evaluate
from raydetect.cli.export import export
from raydetect.cli.init import init
from raydetect.cli.options import (
    BAD_JOB,
    cluster,
    errors,
    expect,
    job_file,
    ledger_of,
    load,
    load_checked,
    overrides,
    storage_options,
)
from raydetect.cli.plan import plan
from raydetect.cli.reflag import reflag
from raydetect.cli.report import report
from raydetect.cli.running.fit import fit
from raydetect.cli.running.score import score
from raydetect.cli.running.submit import submit
from raydetect.cli.verify import verify
from raydetect.errors import SpecError
from raydetect.progress.activity import told


def _print_versions(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    click.echo(f"raydetect {__version__}")
    click.echo(f"Python {sys.version.split()[0]}, torch {_installed('torch')}, Ray {_installed('ray')}")
    context.exit()


def _installed(package: str) -> str:
    """The version of a package, from its metadata: importing torch takes seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the versions of raydetect, Python, torch and Ray.",
)
@click.pass_context
def main(context: click.Context) -> None:
    """Find anomalous images in large archives: fit detectors, score archives on Ray, keep a ledger.

    Exit codes: 0 success, 1 the run failed, 2 the job file is invalid, 3 finished with too many bad rows,
    4 an audit raised an alarm.
    """
    if "GOMP_SPINCOUNT" not in os.environ:  # else threads that wait for others keep a core busy, which these may need
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if context.invoked_subcommand not in ("serve", "submit"):  # one waits for requests, the other shows a job's output
        context.with_resource(told("preparing"))


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
def serve(job: Path, overrides: tuple[str, ...], address: str | None, in_process: bool) -> None:
    """Serve detectors over HTTP, for single images and whole archives.

    Local endpoints run until stopped; on a cluster they keep running, and the same command again rolls out changes.
    """
    with errors(BAD_JOB):
        spec = expect(load(job, overrides), "serve", job)
        from raydetect.gateway.http.tokens import read_tokens

        tokens = read_tokens(spec)
    names = ", ".join(sorted(spec.detectors))

    starting = ExitStack()

    def ready(url: str, metrics: str) -> None:
        starting.close()
        click.echo(f"Serving {names} at {url}")
        click.echo(f"Metrics: {metrics or 'none without Ray'}")
        click.echo(f"Page: {url}/   API: {url}/openapi.json   Tokens: {len(tokens.known) or 'none needed'}")

    target = address or os.environ.get("RAY_ADDRESS")
    with errors(), starting:
        starting.enter_context(told("starting the endpoints"))
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

            comparison.print_comparison(comparison.compare())
            return
        if name is None:
            width = max(map(len, list_models()))
            for known in list_models():
                info = detector_class(known).info
                click.echo(f"{known:<{width}} {info.title}, {info.venue}: {info.summary}")
            return
        _print_detector(detector_class(name), name)


def _print_detector(kind: Any, name: str) -> None:
    from raydetect.config.validation import describe_fields

    info = kind.info
    click.echo(f"{info.title} ({info.venue}, {info.paper}): {info.summary}.")
    if info.auxiliary != "none":
        click.echo(f"Trains on auxiliary images: {info.auxiliary}.")
    click.echo(f"Labels needed: {info.labels}. Localises: {'yes' if info.localises else 'no'}.")
    click.echo(f"Published: {info.published}")
    click.echo(f"With preset: paper, looks at {_paper_view_text(name)}.")
    click.echo(f"\nParameters of detector.name: {name}")
    for field in describe_fields(kind.Params):
        click.echo(f"  {field.name}: {field.type} = {field.default}")
        click.echo(f"      {field.doc}")


def _paper_view_text(name: str) -> str:
    from raydetect.config.geometry.paper_views import paper_view
    from raydetect.config.view import STRETCH

    view = paper_view(name).view
    if view == STRETCH:
        return "the whole picture, stretched to the input, as by default"
    if view.size is None or view.crop is None:
        return "the centre of the picture, whose short side fills the input"
    return f"the central {_px(view.crop)} px of the picture, whose short side is resized to {min(view.size)} px"


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


for command in (audit, calibrate, doctor, evaluate, export, fit, init, plan, reflag, report, score, submit, verify):
    main.add_command(command)
