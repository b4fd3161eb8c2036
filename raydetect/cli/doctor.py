"""`raydetect doctor`: what is installed, free and reachable, and what to do about it."""

import os
import sys
import textwrap

import click

from raydetect.cli.options import BAD_JOB, errors, stated_storage, storage_options
from raydetect.doctor.finding import Finding

WIDTH, TOPIC, STATE = 80, 12, 8  # columns


@click.command()
@click.argument("uris", metavar="[URI]...", nargs=-1)
@storage_options
def doctor(uris: tuple[str, ...], endpoint_url: str | None, profile: str | None, anon: bool) -> None:
    """Say what is installed, free and reachable, and what to do about it.

    At every URI a small object is written, read and deleted. Exit code 1: something that jobs need is missing.
    """
    with errors(BAD_JOB):
        from raydetect.doctor.packages import package_findings

        options = stated_storage(endpoint_url, profile, anon)
        found = list(package_findings())
        is_whole = not any(finding.state == "missing" for finding in found)
        _print(found)
        if is_whole:  # the rest needs the packages
            from raydetect.doctor.backbones import weight_findings
            from raydetect.doctor.machine import machine_findings
            from raydetect.doctor.places import place_findings

            for findings in (weight_findings(), machine_findings(os.environ), place_findings(uris, options)):
                for finding in findings:
                    found.append(finding)
                    _print([finding])
    missing, notes = (sum(finding.state == state for finding in found) for state in ("missing", "note"))
    if missing:
        rest = "" if is_whole else " Run `raydetect doctor` again then; the rest was not looked at."
        click.echo(f"\n{missing} of {len(found)} findings must be mended before jobs can run.{rest}")
        sys.exit(1)
    click.echo(f"\nReady to run jobs{f'; worth a look: {notes}' if notes else ''}.")


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        indent = " " * (TOPIC + STATE)
        head = f"{finding.topic:<{TOPIC}}{finding.state:<{STATE}}"
        lines = textwrap.wrap(finding.found, WIDTH, initial_indent=head, subsequent_indent=indent)
        lines += textwrap.wrap(finding.advice, WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ")
        click.echo("\n".join(lines))
