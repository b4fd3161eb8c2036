"""`raydetect verify`: checks a results directory against its ledger and lists shards to rescore."""

import json
import sys

import click

from raydetect.cli.options import BAD_JOB, errors, ledger_of, storage_options

DAMAGED = 1
SHOWN_AFTER_SECONDS = 2.0


@click.command()
@click.argument("results")
@storage_options
@click.option("--repair", is_flag=True, help="Take away what is damaged, so that the same job makes it again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    results: str, endpoint_url: str | None, profile: str | None, anon: bool, repair: bool, as_json: bool
) -> None:
    """Read every part and heatmap of a results directory and compare them with its ledger.

    Exit code 0: intact; 1: damaged, even if --repair removed the records of damaged shards, so that running the same
    job again rescores them.
    """
    with errors(BAD_JOB):
        from raydetect.progress.displays import shown
        from raydetect.sinks.verify import repair as repair_results
        from raydetect.sinks.verify import verify as verify_results

        ledger = ledger_of(results, endpoint_url, profile, anon)
        with shown(True, SHOWN_AFTER_SECONDS) as on_progress:
            verification = verify_results(ledger, on_progress)
        repaired = repair and not verification.whole
        if repaired:
            repair_results(ledger, verification)
    if as_json:
        click.echo(json.dumps({**verification.plain(), "repaired": repaired}, indent=1, sort_keys=True))
    else:
        for line in verification.lines(repaired):
            click.echo(line)
    if not verification.whole:
        sys.exit(DAMAGED)
