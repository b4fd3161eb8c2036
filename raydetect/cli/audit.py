"""`raydetect audit`: compares new images with earlier nights; exit code 4 if a rule raises an alarm."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect.cli.options import BAD_JOB, cluster, errors, expect, in_process, job_file, load, overrides
from raydetect.cli.running.run import run_score

if TYPE_CHECKING:
    from raydetect.audit.nights import Claim
    from raydetect.audit.run import Audit
    from raydetect.audit.webhook import Webhook
    from raydetect.planning.plan import ScorePlan


@click.command()
@job_file
@overrides
@cluster
@in_process
def audit(job: Path, overrides: tuple[str, ...], address: str | None, in_process: bool) -> None:
    """Score the new shards of an archive, compare them with earlier nights and apply the job's rules.

    Running the same job again resumes it, or repeats its result. Exit code 4: a rule raised an alarm.
    """
    with errors(BAD_JOB):
        spec = expect(load(job, overrides), "audit", job)
        from raydetect.audit.run import Audit
        from raydetect.audit.webhook import webhook_of

        webhook = webhook_of(spec.webhook, os.environ)
        audit_job = Audit.of(spec)
        audit_job.nights.storage.remove_leftovers(audit_job.nights.uri)

    def score(plan: "ScorePlan") -> dict[str, Any]:
        return run_score(plan, address, in_process)

    with errors():
        results = []
        for claim in audit_job.pending(lambda note: click.echo(f"Note: {note}", err=True)):
            results.append((claim, audit_job.run(claim, score)))
            _print(audit_job, *results[-1])
        _finish(audit_job, webhook, results)


def _finish(audit_job: "Audit", webhook: "Webhook | None", results: list[tuple["Claim", dict[str, Any]]]) -> None:
    """Notifies the webhook and reports alarms.

    Raises:
        WebhookError: the webhook could not be notified, and no rule raised an alarm.
        AlarmRaised: a rule raised an alarm.
    """
    from raydetect.audit.webhook import WebhookError
    from raydetect.errors import AlarmRaised

    problem: WebhookError | None = None
    for claim, summary in results:
        try:
            if audit_job.notify(claim, summary, webhook):
                click.echo(f"Notified the webhook of {claim.night}.")
        except WebhookError as error:
            problem = error
    alarms = [f"{claim.night}: {name}" for claim, summary in results for name in summary["alarms"]]
    if alarms:
        if problem is not None:
            click.echo(f"Error: {problem}", err=True)
        raise AlarmRaised(f"alarm: {'; '.join(alarms)}. See the report.")
    if problem is not None:
        raise problem


def _print(audit_job: "Audit", claim: "Claim", summary: Mapping[str, Any]) -> None:
    from raydetect.audit.report_section import values_text, verdict_text

    count = len(summary["baseline"]["nights"])
    nights = "night" if count == 1 else "nights"
    before = f"compared with {count} earlier {nights}" if count else "without earlier nights to compare with"
    click.echo(
        f"Audit {summary['night']}: {summary['images']:,} images in {summary['shards']:,} new shards, "
        f"{summary['flagged']:,} flagged, {summary['bad']:,} without a score; {before}."
    )
    click.echo(verdict_text(summary))
    for rule in summary["rules"]:
        if rule["outcome"] != "calm":
            click.echo(f"  {rule['outcome']}: {rule['rule']} ({values_text(rule['values'])})")
    click.echo(f"Report: {summary['report']}")
    click.echo(f"Summary: {audit_job.nights.record_uri('summaries', claim.number)}")
