"""`raydetect reflag`: another rule for flags on results that exist, without scoring."""

from typing import TYPE_CHECKING

import click

from raydetect.cli.options import BAD_JOB, errors, ledger_of, storage_options

if TYPE_CHECKING:
    from raydetect.planning.reflag import Reflagged

SHOWN_AFTER_SECONDS = 2.0


@click.command()
@click.argument("results")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FLAG=C",
    help="The new rule, as in job files: flag.alpha=0.05, flag.fdr=0.1, flag.threshold=2.5 or flag=none.",
)
@storage_options
def reflag(results: str, overrides: tuple[str, ...], endpoint_url: str | None, profile: str | None, anon: bool) -> None:
    """Decide anew which images of a finished run are flagged, from their stored scores, without scoring them again.

    Scores, p-values, regions and heatmaps stay as they were stored; only images that were flagged then have regions
    and heatmaps. A killed reflag is continued by the same command.
    """
    with errors(BAD_JOB):
        from raydetect.planning.reflag import plan_reflag
        from raydetect.progress.displays import shown
        from raydetect.report.pictures import reach_of

        ledger = ledger_of(results, endpoint_url, profile, anon)
        work = plan_reflag(ledger, reach_of(ledger.require_run()).models, overrides)
        if work.is_done:
            click.echo(f"{ledger.uri}: has {work.flag.text} already; nothing to do.")
            return
    with errors():
        with shown(True, SHOWN_AFTER_SECONDS) as on_progress:
            done = work.execute(on_progress)
        _print(ledger.uri, done)


def _print(uri: str, done: "Reflagged") -> None:
    from raydetect.progress.texts import counted
    from raydetect.sinks.consistency import names_text
    from raydetect.sinks.run_progress import NOTHING_FLAGGED, fdr_text
    from raydetect.storage import join_uri

    click.echo(
        f"Reflagged {counted(done.manifest['rows'], 'image')} of {uri}: {done.after.text}, before {done.before.text}."
    )
    flagged = f": {NOTHING_FLAGGED}" if done.after.nothing else f" {done.manifest['flagged']:,}"
    earlier = "nothing, by flag: none" if done.flagged_before is None else f"{done.flagged_before:,}"
    click.echo(f"Flagged{flagged}; before {earlier}.")
    if "fdr" in done.manifest:
        click.echo(f"False discoveries: {fdr_text(done.manifest['fdr'])}")
    for kind, lacking in done.lacking.items():
        names = names_text(lacking.names, lacking.count)
        click.echo(
            f"Without {kind}, since the scoring did not flag them: {counted(lacking.count, 'flagged image')} "
            f"({names}). Score into another sink.uri to have them."
        )
    click.echo(f"Manifest: {join_uri(uri, 'manifest.json')}")
