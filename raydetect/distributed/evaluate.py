"""Cells of an evaluation as Ray tasks: each in a process of its own, so that its peak memory is its own."""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from raydetect.distributed.ray_errors import translated
from raydetect.distributed.score import refuse_memory_uris
from raydetect.distributed.session import session
from raydetect.errors import RaydetectError, error_of, error_text
from raydetect.evaluation.cells import Cell, Evaluation


def evaluate(
    evaluation: Evaluation,
    todo: Sequence[Cell],
    address: str | None,
    on_cell: Callable[[Cell, dict[str, Any]], None],
) -> None:
    """Evaluates cells side by side, as many at a time as the cluster has room for.

    Args:
        evaluation: the job.
        todo: cells that are left.
        address: of a cluster, or None (see `session`).
        on_cell: told of every finished cell.

    Raises:
        ClusterError: the cluster broke down; finished cells stay.
        RaydetectError: a cell failed; those that were finished before stay.
    """
    refuse_memory_uris([evaluation.output])
    resources = evaluation.spec.resources
    with session(address, resources):
        cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(_cell)
        with translated(address):
            job = ray.put(evaluation)
            waiting = {task.remote(job, cell): cell for cell in todo}
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                body, error = ray.get(done[0])
                if error:
                    raise error_of(error)
                on_cell(waiting.pop(done[0]), body)


def _cell(evaluation: Evaluation, cell: Cell) -> tuple[dict[str, Any], str]:
    """What the cell's file holds, or the error that ends the evaluation; an exception would arrive as text."""
    from raydetect.evaluation.run import run_cell

    try:
        body = run_cell(evaluation, cell, lambda *_: None)
        evaluation.commit(cell, body)
    except RaydetectError as error:
        return {}, error_text(error)
    return body, ""
