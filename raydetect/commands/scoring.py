"""Running a scoring plan with a display, on Ray or in this process."""

from typing import TYPE_CHECKING, Any

from raydetect.errors import MissingError, StorageError

if TYPE_CHECKING:
    from raydetect.plan import ScorePlan


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


def retried_text(plan: "ScorePlan", retry: tuple[str, ...]) -> str:
    """What becomes of committed shards that hold rows to be tried again."""
    words = " or ".join(retry)
    if not plan.retried:
        return f"No committed shard holds a row with the status {words}."
    rows, shards = sum(plan.retried.values()), len(plan.retried)
    return f"Trying {rows:,} rows with the status {words} again: {shards:,} shards are scored anew."


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
