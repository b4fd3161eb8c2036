"""Runs a scoring plan with a progress display, on Ray or in this process."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raydetect.errors import MissingError, StorageError

if TYPE_CHECKING:
    from raydetect.planning.plan import ScorePlan
    from raydetect.sinks.scored_chunk import ScoredChunk


def run_score(plan: "ScorePlan", address: str | None, in_process: bool) -> dict[str, Any]:
    """Scores the remaining shards of a plan, showing progress, and returns the manifest.

    Args:
        plan: the scoring plan.
        address: cluster address, or None.
        in_process: run in this process, without Ray.

    Raises:
        RaydetectError: the run failed, or is complete but too many rows are bad.
    """
    try:
        return _run_score(plan, address, in_process)
    except MissingError as error:  # it existed when the job was planned, so the job file is valid
        raise StorageError(f"{error} It existed when the run started; run the same job again.") from error


def retried_text(plan: "ScorePlan", retry: tuple[str, ...]) -> str:
    """Describes which committed shards are rescored, because they contain rows to retry."""
    statuses = " or ".join(retry)
    if not plan.retried:
        return f"No committed shard contains a row with status {statuses}."
    rows, shards = sum(plan.retried.values()), len(plan.retried)
    return f"Retrying {rows:,} rows with status {statuses}: rescoring {shards:,} shards."


def accepted_text(plan: "ScorePlan") -> str:
    """Says what `--accept-new` has changed in the plan."""
    if plan.late is None:
        return "--accept-new: the archive is as the run has it, or no run was started; nothing to accept."
    gone = f" {len(plan.late.gone):,} rows of images that are gone stay." if plan.late.gone else ""
    return f"Accepted a changed archive: {plan.late.text() or 'no image more or less'}.{gone}"


def changed_text(before: Mapping[str, Any], plan: "ScorePlan") -> str:
    """Describes how the listing has grown since the run was started."""
    then, now, left = int(before["num_shards"]), len(plan.shards), len(plan.todo)
    added = f", {now - then:,} more" if now > then else ""
    return (
        f"The archive has changed since the run was started: it had {then:,} shards and has {now:,} now{added}. "
        f"The {now - left:,} committed ones are unchanged; the other {left:,} are scored in their current state."
    )


def _run_score(plan: "ScorePlan", address: str | None, in_process: bool) -> dict[str, Any]:
    from raydetect.progress.displays import ScoreDisplay
    from raydetect.records import Receipt

    left = sum(shard.size_bytes for shard in plan.todo)
    with ScoreDisplay(len(plan.shards) - len(plan.todo), len(plan.shards), left) as display:

        def on_progress(done: "ScoredChunk | Receipt") -> None:
            if isinstance(done, Receipt):
                display.committed(plan.shards[done.shard].size_bytes)
            else:
                display.scored(done)

        if in_process:
            from raydetect.local import jobs

            return jobs.score(plan, on_progress)
        if plan.spec.engine == "serve":
            from raydetect.distributed.serving.run import score_through

            return score_through(plan, address, on_progress)
        from raydetect.distributed.scoring.score import score as score_on_ray

        return score_on_ray(plan, address, on_progress)
