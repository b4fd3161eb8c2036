"""`raydetect calibrate`: new thresholds for an artifact, without refitting."""

from pathlib import Path

import click

from raydetect.cli.options import BAD_JOB, errors, expect, job_file, load, overrides, replace, with_replace


@click.command()
@job_file
@overrides
@replace
def calibrate(job: Path, overrides: tuple[str, ...], replace: bool) -> None:
    """Write an artifact with new thresholds from normal images that its detector was not fitted on.

    Runs in this process. In a fleet, every category gets its own thresholds.
    """
    with errors(BAD_JOB):
        spec = expect(load(job, with_replace(overrides, replace)), "calibrate", job)
        from raydetect.check import find_problems
        from raydetect.errors import SpecError

        problems = find_problems(spec)
        if problems:
            raise SpecError(" ".join(problems))
        from raydetect.artifacts.replacement import existing_artifact
        from raydetect.storage import Storage

        replaced = existing_artifact(spec.output, Storage(spec.storage))
        from raydetect.local import jobs
        from raydetect.progress.displays import FitDisplay
    with errors(), FitDisplay() as display:
        result = jobs.calibrate(spec, display.on_progress)
    for category, count in result.held_out.items():
        prefix = "" if category is None else f"{category}: "
        click.echo(
            f"{prefix}calibrated on {count:,} held-out normal images instead of {result.before[category]:,}; "
            f"alpha and fdr from {1 / (count + 1):.2g} on."
        )
    if result.bad:
        click.echo(f"{result.bad:,} bad images left out.")
    if replaced is not None:
        click.echo(f"Replaced {replaced.text}.")
    click.echo(f"Artifact: {result.uri} (sha256 {result.digest[:16]})")
