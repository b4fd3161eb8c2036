"""`raydetect plan`: forecasts a fit, or the remaining work of a scoring job."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from raydetect.cli.options import BAD_JOB, errors, expect, job_file, load, overrides
from raydetect.errors import SpecError
from raydetect.progress.activity import doing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydetect.check.fit_forecast import FitForecast
    from raydetect.planning.forecast import Forecast, WorkerEstimate

NAMED_CATEGORIES = 8


@click.command()
@job_file
@overrides
@click.option("--workers", default="1,2,4,8,16", help="Worker counts to forecast.", show_default=True)
@click.option("--price", type=float, help="Price of one worker for one hour, for the cost column.")
def plan(job: Path, overrides: tuple[str, ...], workers: str, price: float | None) -> None:
    """Forecast the time and cost of a fit, or of what is left of a scoring job, with its shards, bytes and PUTs."""
    with errors(BAD_JOB):
        spec, counts = load(job, overrides), _counts(workers)
        if spec.kind == "fit":
            from raydetect.check.fit_forecast import forecast_fit

            with doing("fitting on a few images"):
                _print_fit(forecast_fit(spec), counts, price)
            return
        from raydetect.planning.forecast import forecast
        from raydetect.planning.plan import plan_score

        result = forecast(plan_score(expect(spec, "score", job)), counts, price)
    _print_forecast(result)


def _counts(workers: str) -> list[int]:
    try:
        counts = [int(count) for count in workers.split(",")]
    except ValueError:
        raise SpecError(f"--workers {workers}: expected numbers such as 1,2,4.") from None
    if min(counts) < 1:
        raise SpecError(f"--workers {workers}: every count must be at least 1.")
    return counts


def _print_fit(result: "FitForecast", counts: list[int], price: float | None) -> None:
    from raydetect.planning.forecast import WorkerEstimate
    from raydetect.progress.texts import seconds_text

    click.echo(f"Images     {result.images:,} ({result.images_from})")
    if result.inputs != result.images:
        click.echo(f"Inputs     {result.inputs:,} of the network, from the tiles of the measured images")
    click.echo(f"Measured   on {result.measured:,} images in this process; times are estimates for workers like it:")
    for phase, seconds in result.seconds.items():
        click.echo(f"  {phase:<30} {seconds_text(seconds)}")
    click.echo(f"Calibrated by {result.method}. Starting Ray and workers takes some seconds more.")
    hours = [result.total(count) / 3600 for count in counts]
    _print_workers(
        [WorkerEstimate(n, h, None if price is None else h * n * price) for n, h in zip(counts, hours, strict=True)]
    )


def _print_forecast(result: "Forecast") -> None:
    from raydetect.progress.texts import bytes_text

    if result.categories:
        more = ", ..." if len(result.categories) > NAMED_CATEGORIES else ""
        names = ", ".join(result.categories[:NAMED_CATEGORIES]) + more
        click.echo(f"Fleet      {len(result.categories):,} categories: {names}")
    if not result.shards_left:
        click.echo(f"Nothing is left to score: all {result.shards:,} shards are committed.")
        return
    click.echo(f"Shards     {result.shards_left:,} left of {result.shards:,}")
    click.echo(f"Bytes      {bytes_text(result.bytes_left)} to read")
    click.echo(f"Images     {result.images:,} ({result.images_from})")
    if result.tiles:
        click.echo(f"Tiles      {result.tiles:,} ({result.tiles_from})")
    click.echo(f"Chunks     {result.chunks:,}")
    click.echo(f"PUTs       {result.puts:,} at most")
    if not result.images_per_second:
        click.echo("Time       unknown: the artifact has no measured rate.")
        return
    how = " (equally many images of each category)" if result.categories else ""
    click.echo(
        f"Rate       {result.images_per_second:.1f} images/s and worker, measured when the artifact was fitted{how}"
    )
    _print_workers(result.estimates)


def _print_workers(estimates: "Sequence[WorkerEstimate]") -> None:
    from raydetect.progress.texts import seconds_text

    click.echo("Workers    time" + ("         cost" if estimates[0].cost is not None else ""))
    for row in estimates:
        cost = "" if row.cost is None else f"{row.cost:>10.2f}"
        click.echo(f"{row.num_workers:>7}    {seconds_text(row.hours * 3600):<8}{cost}")
