"""Jobs without a file: a folder, archive, glob or URI on the command line, and the job file that it stands for."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect.cli.options import expect, load, parse
from raydetect.errors import SpecError

if TYPE_CHECKING:
    from raydetect.config import FitSpec, JobSpec, ScoreSpec
    from raydetect.first_jobs.choices import Looked
    from raydetect.first_jobs.job_text import JobText
    from raydetect.storage import Storage

JOB_SUFFIXES = (".yaml", ".yml")
job_or_images = click.argument("job", metavar="JOB_OR_IMAGES")


@dataclass(frozen=True, slots=True)
class Given:
    """A job, and its text if it was given without a file; else ""."""

    spec: Any
    text: str = ""

    def keep(self, folder: str, storage: "Storage") -> None:
        """Writes the text beside the results or the artifact."""
        from raydetect.records import JOB_FILE
        from raydetect.storage import join_uri

        if self.text:
            storage.write(join_uri(folder, JOB_FILE), self.text.encode())


def names_images(argument: str, stated: Sequence[str]) -> bool:
    """Whether an argument is a source of images instead of a job file.

    Args:
        argument: path or URI.
        stated: options that only go with images, as they were given.
    """
    from raydetect.archives.base import is_image_name
    from raydetect.archives.open import CONTAINERS

    if argument.lower().endswith(JOB_SUFFIXES):
        return False
    if "://" in argument or stated or os.path.isdir(argument):
        return True
    suffixes = tuple(suffix for known in CONTAINERS.values() for suffix in known)
    has_wildcard = any(character in argument for character in "*?[") and not os.path.exists(argument)
    return has_wildcard or is_image_name(argument) or argument.lower().endswith(suffixes)


def score_of(argument: str, overrides: tuple[str, ...], artifact: str | None, out: str | None) -> Given:
    """The scoring job of a job file, or of images with `--artifact` and `--out`.

    Raises:
        SpecError: it is none, or options are missing or too many.
    """
    stated = {"--artifact": artifact, "--out": out}
    if not _is_of_images("score", argument, stated):
        return Given(expect(load(Path(argument), overrides), "score", Path(argument)))
    source = {"uri": absolute(argument)}
    bare = {"kind": "score", "source": source, "artifact": absolute(str(artifact)), "sink": {"uri": absolute(str(out))}}
    spec: ScoreSpec = expect(_parsed(bare, overrides, argument), "score", Path(argument))
    from raydetect.first_jobs.choices import score_job

    job = score_job(_looked(spec), spec.artifact, spec.sink.uri, spec.storage)
    return _given(job, overrides, argument)


def fit_of(argument: str, overrides: tuple[str, ...], out: str | None, detector: str | None) -> Given:
    """The fit of a job file, or of images with `--out`.

    Raises:
        SpecError: it is none, or options are missing or too many.
    """
    if not _is_of_images("fit", argument, {"--out": out}, {"--detector": detector}):
        return Given(expect(load(Path(argument), overrides), "fit", Path(argument)))
    name = detector or "patchcore"
    bare = {
        "kind": "fit",
        "source": {"uri": absolute(argument)},
        "detector": {"name": name},
        "artifact": absolute(str(out)),
    }
    spec: FitSpec = expect(_parsed(bare, overrides, argument), "fit", Path(argument))
    from raydetect.first_jobs.choices import fit_job

    return _given(fit_job(_looked(spec), spec.artifact, spec.storage, detector), overrides, argument)


def absolute(place: str) -> str:
    """A path that means the same in every folder; URIs are unchanged."""
    return place if "://" in place else os.path.abspath(place)


def _is_of_images(
    command: str, argument: str, needed: dict[str, str | None], more: dict[str, str | None] | None = None
) -> bool:
    options = needed | (more or {})
    stated = [name for name, value in options.items() if value is not None]
    if not names_images(argument, stated):
        if stated:
            raise SpecError(
                f"{argument}: is a job file, which states what {' and '.join(stated)} would. Remove them, or change "
                "the job with --set."
            )
        return False
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        usage = " ".join(f"{name} {MEANING[command, name][0]}" for name in needed)
        lacking = " and ".join(f"{name} ({MEANING[command, name][1]})" for name in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise SpecError(
            f"{argument}: is a source of images, and {lacking} {verb} missing. Run `raydetect {command} {argument} "
            f"{usage}`, or give a job file (.yaml)."
        )
    return True


MEANING = {
    ("score", "--artifact"): ("ARTIFACT", "the fitted detector"),
    ("score", "--out"): ("RESULTS", "where the results go"),
    ("fit", "--out"): ("ARTIFACT", "where the fitted detector goes"),
}


def _parsed(values: dict[str, Any], overrides: tuple[str, ...], argument: str) -> "JobSpec":
    from raydetect.config.validation import apply_overrides

    return parse(apply_overrides(values, overrides), Path(argument))


def _looked(spec: "ScoreSpec | FitSpec") -> "Looked":
    from raydetect.config import source_storage
    from raydetect.first_jobs.choices import Looked
    from raydetect.first_jobs.survey import survey

    bare = replace(spec.source, pattern=None, mask_pattern=None)
    return Looked.at(survey(bare, source_storage(spec, spec.source)))


def _given(job: "JobText", overrides: tuple[str, ...], argument: str) -> Given:
    from raydetect.config import without_credentials
    from raydetect.config.validation import apply_overrides
    from raydetect.first_jobs.job_text import yaml_text
    from raydetect.redaction import redacted

    values = apply_overrides(job.values(), overrides)
    spec = parse(values, Path(argument))
    text = redacted(yaml_text(without_credentials(values)))
    click.echo("The job file that this stands for:", err=True)
    click.echo("".join(f"  {line}\n" for line in text.splitlines()), nl=False, err=True)
    return Given(spec, text)
