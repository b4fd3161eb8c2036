"""`raydetect evaluate`: a leaderboard of detectors on labelled images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect.cli.options import BAD_JOB, cluster, errors, expect, in_process, job_file, load, overrides
from raydetect.cli.running.placement import Wanted, ray, runs_cells_here
from raydetect.progress.activity import doing

if TYPE_CHECKING:
    from raydetect.config import EvaluateSpec
    from raydetect.evaluation.cells import Cell, Evaluation


@click.command()
@job_file
@overrides
@cluster
@in_process
@ray
def evaluate(job: Path, overrides: tuple[str, ...], address: str | None, in_process: bool, on_ray: bool) -> None:
    """Fit detectors on labelled data, or use existing results, and measure their accuracy.

    Running the same job again continues with the unfinished cells.
    """
    with errors(BAD_JOB):
        wanted = Wanted(address, in_process, on_ray)
        spec = expect(load(job, overrides), "evaluate", job)
        cells = None if spec.results else _plan(spec)
    with errors(), doing("fitting and evaluating"):
        finished_cells = _judge(spec) if cells is None else _run(*cells, wanted)
        _report(spec, finished_cells)


def _plan(spec: "EvaluateSpec") -> tuple["Evaluation", list["Cell"]]:
    from raydetect.evaluation.cells import plan_evaluation
    from raydetect.storage import Storage, normalise_uri

    evaluation = plan_evaluation(spec)
    Storage(spec.storage).remove_leftovers(normalise_uri(spec.output))
    todo = [cell for cell in evaluation.cells if evaluation.finished(cell) is None]
    done = len(evaluation.cells) - len(todo)
    if done:
        click.echo(f"{done} of {len(evaluation.cells)} cells are finished already; continuing with the rest.", err=True)
    return evaluation, todo


def _run(evaluation: "Evaluation", todo: list["Cell"], wanted: Wanted) -> list[dict[str, Any]]:
    numbers = {cell.digest: number for number, cell in enumerate(evaluation.cells, start=1)}

    def on_cell(cell: "Cell", body: dict[str, Any]) -> None:
        of = f" on {cell.category}" if cell.category else ""
        position = f"cell {numbers[cell.digest]} of {len(evaluation.cells)}"
        click.echo(f"{position}: {cell.line}{of}, seed {cell.seed}: fitted in {body['fit_seconds']:.0f} s", err=True)

    if runs_cells_here(wanted, len(todo)):
        from raydetect.evaluation.run import run_cell
        from raydetect.progress.displays import FitDisplay

        for cell in todo:
            with FitDisplay() as display:
                body = run_cell(evaluation, cell, display.on_progress)
            evaluation.commit(cell, body)
            on_cell(cell, body)
    elif todo:
        from raydetect.distributed.evaluate import evaluate as evaluate_on_ray

        evaluate_on_ray(evaluation, todo, wanted.target, on_cell)
    return [done for cell in evaluation.cells if (done := evaluation.finished(cell)) is not None]


def _judge(spec: "EvaluateSpec") -> list[dict[str, Any]]:
    from raydetect.evaluation.stored_scores import evaluate_results

    return [dict(evaluate_results(spec, uri)) for uri in spec.results]


def _report(spec: "EvaluateSpec", finished_cells: list[dict[str, Any]]) -> None:
    from raydetect.evaluation.leaderboard import leaderboard, markdown, write_leaderboard
    from raydetect.storage import Storage, normalise_uri

    uris = write_leaderboard(normalise_uri(spec.output), Storage(spec.storage), finished_cells)
    for hint in dict.fromkeys(hint for cell in finished_cells for hint in cell.get("hints", ())):
        click.echo(f"Hint: {hint}", err=True)
    sys.stdout.write(markdown(leaderboard(finished_cells)))
    images = sum(cell["test_images"] for cell in finished_cells)
    click.echo(f"Judged {images:,} images in {len(finished_cells):,} cells.")
    for uri in uris:
        click.echo(f"{'Figures' if 'figures' in uri else 'Leaderboard'}: {uri}")
