"""`raydetect score`: scores an archive."""

import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from raydetect.cli.options import BAD_JOB, cluster, errors, in_process, overrides, shown_place
from raydetect.cli.running.folder_job import job_or_images, score_of
from raydetect.cli.running.placement import Size, Wanted, ray, runs_here
from raydetect.cli.running.run import accepted_text, changed_text, retried_text, run_score
from raydetect.errors import SpecError
from raydetect.progress.activity import doing
from raydetect.records import BAD_STATUSES

if TYPE_CHECKING:
    from raydetect.config import ScoreSpec
    from raydetect.planning.plan import ScorePlan


@click.command()
@job_or_images
@overrides
@cluster
@in_process
@ray
@click.option("--artifact", help="With images instead of a job file: the fitted detector.")
@click.option("--out", metavar="RESULTS", help="With images: where the results go.")
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
    job: str,
    overrides: tuple[str, ...],
    address: str | None,
    in_process: bool,
    on_ray: bool,
    artifact: str | None,
    out: str | None,
    retry: tuple[str, ...],
    accept_new: bool,
) -> None:
    """Score an archive; running the same job again resumes it.

    JOB_OR_IMAGES is a job file, or with --artifact and --out a folder, archive, glob or URI of images.
    """
    with errors(BAD_JOB), doing("listing the archive"):
        wanted = Wanted(address, in_process, on_ray)
        given = score_of(job, overrides, artifact, out)
        spec: ScoreSpec = given.spec
        if spec.engine == "serve" and not (in_process or address or os.environ.get("RAY_ADDRESS")):
            raise SpecError("engine: serve needs the cluster on which `raydetect serve` runs. Set --address.")
        from raydetect.planning.plan import plan_score

        plan = plan_score(spec, retry=retry, accept_new=accept_new)
        plan.begin()
        given.keep(plan.ledger.uri, plan.ledger.storage)
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
        is_here = not plan.todo or runs_here(wanted, spec.resources, lambda: Size.of(plan.todo))
        _summary(plan, run_score(plan, wanted.target, is_here))


def _summary(plan: "ScorePlan", manifest: dict[str, Any]) -> None:
    from raydetect.left_out import left_out_of, left_out_text
    from raydetect.progress.texts import counted
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
    click.echo(
        f"Scored {counted(manifest['rows'], 'image')} in {counted(manifest['shards'], 'shard')} ({kinds or 'none'})."
    )
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
    click.echo(f"Next: {_next_command(plan)}")


def _next_command(plan: "ScorePlan") -> str:
    options = plan.ledger.storage.options
    stated = [("--endpoint-url", options.endpoint_url), ("--profile", options.profile)]
    words = "".join(f" {name} {shlex.quote(value)}" for name, value in stated if value)
    return f"raydetect report {shown_place(plan.ledger.uri)} -o report.html{words}{' --anon' if options.anon else ''}"
