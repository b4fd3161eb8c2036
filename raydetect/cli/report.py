"""`raydetect report`: writes one HTML file for a results directory."""

from pathlib import Path

import click

from raydetect.cli.options import BAD_JOB, errors, ledger_of, prepare_output, storage_options
from raydetect.progress.activity import doing


@click.command()
@click.argument("results")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default="report.html", show_default=True
)
@click.option("--pictures", type=click.IntRange(0, 500), default=48, show_default=True, help="Images in the gallery.")
@storage_options
def report(
    results: str, output: Path, pictures: int, endpoint_url: str | None, profile: str | None, anon: bool
) -> None:
    """Write one HTML file for a results directory: totals, charts, the most anomalous images, bad images and reasons.

    The file needs no network. Images of the gallery are read from the run's archive, with the endpoint of its job and
    credentials from the environment.
    """
    with errors(BAD_JOB):
        from raydetect.progress.texts import counted
        from raydetect.report.build import page_of
        from raydetect.report.tally import tally
        from raydetect.sinks.run_progress import flags_nothing
        from raydetect.storage import whole_text

        ledger = ledger_of(results, endpoint_url, profile, anon)
        run = ledger.require_run()
        prepare_output(output)
    with errors(), doing("reading the rows and the most anomalous images"), whole_text(output) as out:
        row_tally = tally(ledger, run, pictures)
        text = page_of(ledger, run, row_tally)
        out.write(text)
    totals = row_tally.totals
    flagged = "none flagged, by flag: none" if flags_nothing(run) else f"{totals.flagged:,} flagged"
    click.echo(
        f"Reported {counted(totals.rows, 'image')} in {counted(totals.shards, 'shard')}: {flagged}, "
        f"{totals.bad_rows:,} without a score."
    )
    click.echo(f"Report: {output} ({len(text.encode()) / 1e6:.1f} MB)")
