"""Shared parts of commands: options, reading of job files, and errors as one line and an exit code."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from raydetect.errors import DamagedError, RaydetectError, SpecError, is_outage

if TYPE_CHECKING:
    from raydetect.config import JobSpec, StorageOptions
    from raydetect.sinks.ledger import Ledger

BAD_JOB, INTERRUPTED = 2, 130

job_file = click.argument("job", type=click.Path(dir_okay=False, path_type=Path))
overrides = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one key of the job file.")
cluster = click.option("--address", help="Ray cluster (default: RAY_ADDRESS, else a local Ray).")
in_process = click.option("--local", "in_process", is_flag=True, help="Run in this process, without Ray.")


def storage_options(command: Any) -> Any:
    """Adds options for the storage of a results directory on the command line."""
    for option in (
        click.option("--anon", is_flag=True, help="Anonymous requests."),
        click.option("--profile", help="Profile of the AWS configuration files."),
        click.option("--endpoint-url", help="S3 endpoint; keys come from the AWS environment or --profile."),
    ):
        command = option(command)
    return command


def stated_storage(endpoint_url: str | None, profile: str | None, anon: bool) -> "StorageOptions":
    """The storage of the options that `storage_options` adds.

    Raises:
        SpecError: the endpoint contains a user or query.
    """
    from raydetect.config import StorageOptions

    try:
        return StorageOptions(endpoint_url=endpoint_url, profile=profile, anon=anon)
    except ValueError:
        raise SpecError("--endpoint-url: contains a user or query. Write http://HOST:PORT alone.") from None


def ledger_of(results: str, endpoint_url: str | None, profile: str | None, anon: bool) -> "Ledger":
    """Returns the ledger of a results directory.

    Raises:
        SpecError: `results` is not a URI, or the endpoint contains a user or query.
    """
    from raydetect.sinks.ledger import Ledger
    from raydetect.storage import Storage, normalise_uri

    return Ledger(normalise_uri(results), Storage(stated_storage(endpoint_url, profile, anon)))


def prepare_output(path: Path, folder: bool = False) -> None:
    """Creates the folder that a command writes to, and removes leftovers of killed commands.

    Raises:
        SpecError: it cannot be created, or the path is a file instead of a folder, or the reverse.
        StorageError: the disk refuses.
    """
    from raydetect.storage import remove_leftovers, translate
    from raydetect.storage.error_translation import DISK

    wrong = path.is_file() if folder else path.is_dir()
    if wrong:
        reason = "is a file, not a folder" if folder else "is a folder, not a file"
        raise SpecError(f"{path}: {reason}. Choose another path with -o.")
    target = path if folder else path.parent
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK:
            raise translate(str(path), "write", error) from None
        raise SpecError(f"{path}: cannot be written ({error.strerror}). Name another path with -o.") from None
    remove_leftovers(target, below=folder)


def job_values(job: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Reads the values of a job file and applies overrides.

    Raises:
        SpecError: it cannot be read or is not a YAML mapping.
    """
    from raydetect.config.validation import apply_overrides, parse_yaml
    from raydetect.config.yaml_text import read_text

    return apply_overrides(parse_yaml(read_text(job, "job file"), str(job)), overrides)


def parse(values: dict[str, Any], job: Path) -> "JobSpec":
    """Validates the values of a job.

    Raises:
        SpecError: lists every mistake, one per line.
    """
    from raydetect.config import parse_job

    return parse_job(values, str(job))


def load(job: Path, overrides: tuple[str, ...]) -> "JobSpec":
    """Reads and validates a job file.

    Raises:
        SpecError: lists every mistake, one per line.
    """
    return parse(job_values(job, overrides), job)


def expect(spec: "JobSpec", kind: str, job: Path) -> Any:
    """Returns the job if it is of a kind.

    Raises:
        SpecError: it is of another kind; names the command for that.
    """
    if spec.kind != kind:
        raise SpecError(f"{job}: is a {spec.kind} job. Run `raydetect {spec.kind} {job}`.")
    return spec


def shown_place(uri: str) -> str:
    """A URI as an argument of a command to type: quoted for a shell, and a path if it is on a disk."""
    return shlex.quote(uri.removeprefix("file://"))


@contextmanager
def errors(code: int | None = None) -> Iterator[None]:
    """Reports raydetect errors as one line and an exit code: `code`, or the error's own.

    Storage outages and damaged results are not mistakes of the job, and always keep their own code.
    """
    try:
        yield
    except RaydetectError as error:
        is_own = is_outage(error) or isinstance(error, DamagedError)
        fail(str(error), error.exit_code if code is None or is_own else code)
    except KeyboardInterrupt:
        fail("Stopped. Committed shards are kept; run the same command to resume.", INTERRUPTED)


def fail(text: str, code: int) -> NoReturn:
    """Prints an error and exits."""
    click.echo(f"Error: {text}", err=True)
    sys.exit(code)
