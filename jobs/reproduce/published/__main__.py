"""Runs a detector at its published settings on MVTec AD and prints the gap to its paper:

`python -m jobs.reproduce.published NAME --data DIR [--output DIR]`
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs.reproduce.published.gap import gap, gap_text
from jobs.reproduce.published.job_files import known, write_jobs
from raydetect.config import EvaluateSpec, parse_job
from raydetect.config.validation import parse_yaml
from raydetect.errors import RaydetectError
from raydetect.evaluation.cells import plan_evaluation


def finished_cells(job: Path) -> list[dict[str, Any]]:
    """The contents of all cells of a job that has run."""
    spec = parse_job(parse_yaml(job.read_text(), str(job)), str(job))
    assert isinstance(spec, EvaluateSpec)
    evaluation = plan_evaluation(spec)
    return [body for cell in evaluation.cells if (body := evaluation.finished(cell)) is not None]


def main() -> None:
    """Writes the job files, runs them, and prints and stores the gap."""
    parser = argparse.ArgumentParser(prog="python -m jobs.reproduce.published", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(known())}")
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the categories of MVTec AD")
    parser.add_argument("--output", type=Path, help="for job files, artifacts and figures; default: reproduced/NAME")
    parser.add_argument("--textures", type=Path, help="folder of DTD's images, for draem and memseg")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the job file")
    parser.add_argument("--local", action="store_true", help="run in this process, one category after another")
    arguments = parser.parse_args()
    output = arguments.output or Path("reproduced") / arguments.name
    try:
        jobs = write_jobs(arguments.name, arguments.data, output, arguments.textures, arguments.set)
        for job in jobs:
            command = [sys.executable, "-m", "raydetect", "evaluate", str(job), *["--local"] * arguments.local]
            if code := subprocess.run(command, check=False).returncode:
                sys.exit(code)
        result = gap(arguments.name, [cell for job in jobs for cell in finished_cells(job)])
    except RaydetectError as error:
        sys.exit(f"Error: {error}")
    (output / "gap.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{gap_text(result)}\nWritten: {output / 'gap.json'}")


if __name__ == "__main__":
    main()
