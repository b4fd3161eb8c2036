"""`raydetect init`: writes the first job files for a folder of good parts, with a reason for each setting."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raydetect.cli.options import BAD_JOB, errors, prepare_output, stated_storage, storage_options
from raydetect.cli.running.folder_job import absolute
from raydetect.errors import SpecError

if TYPE_CHECKING:
    from raydetect.config import StorageOptions
    from raydetect.first_jobs.choices import Looked
    from raydetect.first_jobs.job_text import JobText

FIT, SCORE = "fit.yaml", "score.yaml"


@dataclass(frozen=True, slots=True)
class _Files:
    """The job files and what they name, below one folder."""

    folder: Path

    def refuse_existing(self) -> None:
        """Refuses to overwrite.

        Raises:
            SpecError: a job file is there.
        """
        there = [str(self.folder / name) for name in (FIT, SCORE) if (self.folder / name).exists()]
        if there:
            verb = "exist" if len(there) > 1 else "exists"
            raise SpecError(
                f"{' and '.join(there)} {verb} already. Choose another folder with --into, or overwrite with --replace."
            )

    def path(self, name: str) -> str:
        """An absolute path below the folder."""
        return str(self.folder.absolute() / name)

    def word(self, name: str) -> str:
        """The path of a file as an argument of a command to type."""
        return shlex.quote(str(self.folder / name))


@click.command()
@click.argument("images")
@click.option("--new", metavar="IMAGES", help="Images to score; default: those beside the good ones.")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    help="Folder for the job files, the artifact and the results; default: this one.",
)
@click.option("--replace", is_flag=True, help="Overwrite job files.")
@storage_options
def init(
    images: str,
    new: str | None,
    into: Path,
    replace: bool,
    endpoint_url: str | None,
    profile: str | None,
    anon: bool,
) -> None:
    """Look at images of good parts, and write fit.yaml and score.yaml with a reason for each setting.

    IMAGES is a folder, archive, glob or URI. Folders named good and bad, train and test, and those of published data
    sets are understood.
    """
    with errors(BAD_JOB):
        from raydetect.first_jobs.choices import fit_job, score_job, workers_for

        files = _Files(into)
        if not replace:
            files.refuse_existing()
        options = stated_storage(endpoint_url, profile, anon)
        good = _look("Good parts", images, options)
        scored = good if new is None else _look("New images", new, options)
        jobs = {
            FIT: fit_job(good, files.path("artifact"), options),
            SCORE: score_job(scored, files.path("artifact"), files.path("results"), options, good, workers_for(scored)),
        }
        for name, job in jobs.items():
            _write(files.folder / name, job)
    click.echo("\nNext:")
    for command, words in (
        (f"raydetect check {files.word(FIT)}", "finds mistakes in seconds"),
        (f"raydetect fit {files.word(FIT)}", ""),
        (f"raydetect score {files.word(SCORE)}", ""),
        (f"raydetect report {files.word('results')} -o {files.word('report.html')}", ""),
    ):
        click.echo(f"  {command}{f'    # {words}' if words else ''}")


def _look(title: str, given: str, options: "StorageOptions") -> "Looked":
    from raydetect.config import SourceSpec
    from raydetect.first_jobs.choices import Looked
    from raydetect.first_jobs.survey import survey
    from raydetect.redaction import redacted

    looked = Looked.at(survey(SourceSpec(uri=absolute(given)), options))
    click.echo(redacted(f"{title}: {absolute(given)}"))
    for line in looked.survey.lines():
        click.echo(f"  {line}")
    return looked


def _write(path: Path, job: "JobText") -> None:
    from raydetect.redaction import redacted
    from raydetect.storage import Storage, normalise_uri

    prepare_output(path)
    replaced = path.exists()
    Storage().write(normalise_uri(str(path)), job.text().encode())
    click.echo(redacted(f"\n{path}{' (replaced)' if replaced else ''}"))
    for line in job.lines():
        click.echo(line)
