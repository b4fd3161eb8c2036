"""Evaluation cells as Ray tasks, each in its own process so that its peak memory can be measured."""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from raydetect.distributed.ray_errors import translated
from raydetect.distributed.scoring.score import refuse_memory_uris
from raydetect.distributed.session import session
from raydetect.errors import RaydetectError, error_of, error_text
from raydetect.evaluation.cells import Cell, Evaluation


def evaluate(
    evaluation: Evaluation,
    todo: Sequence[Cell],
    address: str | None,
    on_cell: Callable[[Cell, dict[str, Any]], None],
) -> None:
    """Evaluates cells in parallel, as many at a time as the cluster has resources for.

    Args:
        evaluation: the evaluation job.
        todo: unfinished cells.
        address: cluster address, or None (see `session`).
        on_cell: called with each finished cell and its results.

    Raises:
        ClusterError: the cluster failed; finished cells are kept.
        RaydetectError: a cell failed; cells finished before it are kept.
    """
    refuse_memory_uris([evaluation.output])
    resources = evaluation.spec.resources
    with session(address, resources):
        cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(_cell)
        with translated(address):
            job = ray.put(evaluation)
            pending = {task.remote(job, cell): cell for cell in todo}
            while pending:
                done, _ = ray.wait(list(pending), num_returns=1)
                body, error = ray.get(done[0])
                if error:
                    raise error_of(error)
                on_cell(pending.pop(done[0]), body)


def _cell(evaluation: Evaluation, cell: Cell) -> tuple[dict[str, Any], str]:
    """Returns the cell's results or its error; the driver would only receive a raised exception as text."""
    from raydetect.evaluation.run import run_cell

    try:
        body = run_cell(evaluation, cell, lambda *_: None)
        evaluation.commit(cell, body)
    except RaydetectError as error:
        return {}, error_text(error)
    return body, ""
