"""`raydetect calibrate`: new thresholds for an artifact, without fitting it again."""

from pathlib import Path

import click

from raydetect.commands.door import BAD_JOB, errors, expect, job_file, load, overrides


@click.command()
@job_file
@overrides
def calibrate(job: Path, overrides: tuple[str, ...]) -> None:
    """Score normal images that a fitted detector has not seen, and write it with thresholds from these.

    Runs in this process. For a fleet every category gets its own.
    """
    with errors(BAD_JOB):
        spec = expect(load(job, overrides), "calibrate", job)
        from raydetect.check import find_problems
        from raydetect.errors import SpecError

        problems = find_problems(spec)
        if problems:
            raise SpecError(" ".join(problems))
        from raydetect import local
        from raydetect.console import FitDisplay
    with errors(), FitDisplay() as display:
        made = local.calibrate(spec, display.tick)
    for category, count in made.held_out.items():
        of = "" if category is None else f"{category}: "
        click.echo(
            f"{of}calibrated on {count:,} held-out normal images instead of {made.before[category]:,}; "
            f"alpha and fdr from {1 / (count + 1):.2g} on."
        )
    if made.bad:
        click.echo(f"{made.bad:,} bad images left out.")
    click.echo(f"Artifact: {made.uri} (sha256 {made.digest[:16]})")
