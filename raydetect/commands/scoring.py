"""Running a scoring plan with a display, on Ray or in this process."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from raydetect.errors import MissingError, StorageError

if TYPE_CHECKING:
    from raydetect.plan import ScorePlan

UNREADABLE = "unreadable"


def run_score(plan: "ScorePlan", address: str | None, in_process: bool) -> dict[str, Any]:
    """Scores what is left of a plan, shown as it goes on; returns the manifest.

    Args:
        plan: the job.
        address: of a cluster, or None.
        in_process: without Ray.

    Raises:
        RaydetectError: the run failed, or is complete and too much of it is bad.
    """
    try:
        return _run_score(plan, address, in_process)
    except MissingError as error:  # it was there when the job was planned, so the job file is not wrong
        raise StorageError(f"{error} It was there when the run began; start the same job again.") from error


def with_unreadable(plan: "ScorePlan") -> "ScorePlan":
    """Takes the records of shards away that hold images which could not be read, and says how many.

    Args:
        plan: begun.

    Returns:
        The plan with these shards to do as well.
    """
    left = {shard.index for shard in plan.todo}
    committed = [shard.index for shard in plan.shards if shard.index not in left]
    found = {
        receipt.shard: receipt.statuses[UNREADABLE]
        for receipt in plan.ledger.receipts(committed)
        if receipt.statuses.get(UNREADABLE)
    }
    if not found:
        click.echo("No committed shard holds an image that could not be read.", err=True)
        return plan
    plan.ledger.withdraw(sorted(found))
    images, shards = sum(found.values()), len(found)
    click.echo(f"Trying {images:,} unreadable images again: {shards:,} shards are scored anew.", err=True)
    todo = tuple(shard for shard in plan.shards if shard.index in left or shard.index in found)
    return replace(plan, todo=todo)


def _run_score(plan: "ScorePlan", address: str | None, in_process: bool) -> dict[str, Any]:
    from raydetect.console import ScoreDisplay
    from raydetect.records import Part, Receipt

    left = sum(shard.size_bytes for shard in plan.todo)
    with ScoreDisplay(len(plan.shards) - len(plan.todo), len(plan.shards), left) as display:

        def on_part(part: Part, receipt: Receipt | None) -> None:
            display.part(part, receipt, plan.shards[part.shard].size_bytes)

        if in_process:
            from raydetect import local

            return local.score(plan, on_part)
        if plan.spec.engine == "serve":
            from raydetect.distributed.serve_run import score_through

            return score_through(plan, address, on_part)
        from raydetect.distributed.score import score as score_on_ray

        return score_on_ray(plan, address, on_part)
