"""`raydetect audit`: what is new, compared with the nights before; exit code 4 when a rule raises an alarm."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect.commands.door import BAD_JOB, cluster, errors, expect, in_process, job_file, load, overrides
from raydetect.commands.scoring import run_score

if TYPE_CHECKING:
    from raydetect.audit.nights import Claim
    from raydetect.audit.run import Audit
    from raydetect.audit.webhook import Webhook
    from raydetect.plan import ScorePlan


@click.command()
@job_file
@overrides
@cluster
@in_process
def audit(job: Path, overrides: tuple[str, ...], address: str | None, in_process: bool) -> None:
    """Score what is new in an archive, compare it with earlier nights, and judge it by the job's rules.

    Started again it goes on, or gives the same answer. Exit code 4: a rule raised an alarm.
    """
    with errors(BAD_JOB):
        spec = expect(load(job, overrides), "audit", job)
        from raydetect.audit.run import Audit
        from raydetect.audit.webhook import webhook_of

        webhook = webhook_of(spec.webhook, os.environ)
        made = Audit.of(spec)
        made.nights.storage.remove_leftovers(made.nights.uri)

    def score(plan: "ScorePlan") -> dict[str, Any]:
        return run_score(plan, address, in_process)

    with errors():
        judged = []
        for claim in made.pending(lambda note: click.echo(f"Note: {note}", err=True)):
            judged.append((claim, made.run(claim, score)))
            _print(made, *judged[-1])
        _end(made, webhook, judged)


def _end(made: "Audit", webhook: "Webhook | None", judged: list[tuple["Claim", dict[str, Any]]]) -> None:
    """Tells the webhook, then ends as the rules say.

    Raises:
        WebhookError: it was not told, and no rule raised an alarm.
        AlarmRaised: one did.
    """
    from raydetect.audit.webhook import WebhookError
    from raydetect.errors import AlarmRaised

    problem: WebhookError | None = None
    for claim, summary in judged:
        try:
            if made.tell(claim, summary, webhook):
                click.echo(f"Told the webhook of {claim.night}.")
        except WebhookError as error:
            problem = error
    alarms = [f"{claim.night}: {name}" for claim, summary in judged for name in summary["alarms"]]
    if alarms:
        if problem is not None:
            click.echo(f"Error: {problem}", err=True)
        raise AlarmRaised(f"alarm: {'; '.join(alarms)}. Look at the report.")
    if problem is not None:
        raise problem


def _print(made: "Audit", claim: "Claim", summary: Mapping[str, Any]) -> None:
    from raydetect.audit.telling import values_text, verdict_text

    count = len(summary["baseline"]["nights"])
    nights = "night" if count == 1 else "nights"
    before = f"compared with {count} earlier {nights}" if count else "with nothing to compare"
    click.echo(
        f"Audit {summary['night']}: {summary['images']:,} images in {summary['shards']:,} new shards, "
        f"{summary['flagged']:,} flagged, {summary['bad']:,} without a score; {before}."
    )
    click.echo(verdict_text(summary))
    for rule in summary["rules"]:
        if rule["outcome"] != "calm":
            click.echo(f"  {rule['outcome']}: {rule['rule']} ({values_text(rule['values'])})")
    click.echo(f"Report: {summary['report']}")
    click.echo(f"Summary: {made.nights.record_uri('summaries', claim.number)}")
