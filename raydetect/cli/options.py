"""What commands share: words of the command line, reading a job file, errors as one line and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from raydetect.errors import DamagedError, RaydetectError, SpecError, is_outage

if TYPE_CHECKING:
    from raydetect.config import JobSpec
    from raydetect.sinks.ledger import Ledger

BAD_JOB, INTERRUPTED = 2, 130

job_file = click.argument("job", type=click.Path(dir_okay=False, path_type=Path))
overrides = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one key of the job file.")
cluster = click.option("--address", help="Ray cluster (default: RAY_ADDRESS, else a local Ray).")
in_process = click.option("--local", "in_process", is_flag=True, help="Run in this process, without Ray.")


def storage_options(command: Any) -> Any:
    """How to reach a results directory that is named on the command line."""
    for option in (
        click.option("--anon", is_flag=True, help="Anonymous requests."),
        click.option("--profile", help="Profile of the AWS configuration files."),
        click.option("--endpoint-url", help="S3 endpoint; keys come from the AWS environment or --profile."),
    ):
        command = option(command)
    return command


def ledger_of(results: str, endpoint_url: str | None, profile: str | None, anon: bool) -> "Ledger":
    """The ledger of a results directory.

    Raises:
        SpecError: it is no URI.
    """
    from raydetect.config import StorageOptions
    from raydetect.sinks.ledger import Ledger
    from raydetect.storage import Storage, normalise_uri

    options = StorageOptions(endpoint_url=endpoint_url, profile=profile, anon=anon)
    return Ledger(normalise_uri(results), Storage(options))


def prepare_output(place: Path, folder: bool = False) -> None:
    """Makes the folder that a command writes into, and removes what killed ones left there.

    Raises:
        SpecError: it cannot be made, or a file of the other kind is there.
        StorageError: the disk refuses.
    """
    from raydetect.storage import remove_leftovers, translate
    from raydetect.storage.error_translation import DISK

    wrong = place.is_file() if folder else place.is_dir()
    if wrong:
        kind = "a file is there, and a folder is to be made" if folder else "is a folder, and a file is to be made"
        raise SpecError(f"{place}: {kind}. Name another place with -o.")
    target = place if folder else place.parent
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK:
            raise translate(str(place), "write", error) from None
        raise SpecError(f"{place}: cannot be written ({error.strerror}). Name another place with -o.") from None
    remove_leftovers(target, below=folder)


def job_values(job: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of a job file, overrides applied.

    Raises:
        SpecError: it cannot be read or is no YAML mapping.
    """
    from raydetect.config.validation import apply_overrides, parse_yaml
    from raydetect.config.yaml_text import read_text

    return apply_overrides(parse_yaml(read_text(job, "job file"), str(job)), overrides)


def parse(values: dict[str, Any], job: Path) -> "JobSpec":
    """The checked job of plain values.

    Raises:
        SpecError: every mistake, one line each.
    """
    from raydetect.config import parse_job

    return parse_job(values, str(job))


def load(job: Path, overrides: tuple[str, ...]) -> "JobSpec":
    """The checked job of a file.

    Raises:
        SpecError: every mistake, one line each.
    """
    return parse(job_values(job, overrides), job)


def expect(spec: "JobSpec", kind: str, job: Path) -> Any:
    """The job, which must be of a kind.

    Raises:
        SpecError: it is of another; names the command for it.
    """
    if spec.kind != kind:
        raise SpecError(f"{job}: is a {spec.kind} job. Run `raydetect {spec.kind} {job}`.")
    return spec


@contextmanager
def errors(code: int | None = None) -> Iterator[None]:
    """Deliberate errors become one line and an exit code: `code`, or the error's own.

    A storage that fails is no mistake of a job, wherever it is met, nor are damaged results: these keep their code.
    """
    try:
        yield
    except RaydetectError as error:
        is_own = is_outage(error) or isinstance(error, DamagedError)
        fail(str(error), error.exit_code if code is None or is_own else code)
    except KeyboardInterrupt:
        fail("Stopped. What is committed stays; the same command goes on from there.", INTERRUPTED)


def fail(text: str, code: int) -> NoReturn:
    """Ends the command with one line."""
    click.echo(f"Error: {text}", err=True)
    sys.exit(code)
