"""`raydetect fit`: fits a detector on normal images."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect.cli.options import (
    BAD_JOB,
    cluster,
    errors,
    in_process,
    load,
    overrides,
    replace,
    shown_place,
    with_replace,
)
from raydetect.cli.running.folder_job import JOB_SUFFIXES, fit_of, job_or_images
from raydetect.cli.running.placement import Size, Wanted, ray, runs_here
from raydetect.errors import SpecError
from raydetect.progress.activity import doing

if TYPE_CHECKING:
    from raydetect.config import FitSpec
    from raydetect.records import FitReport


@click.command()
@job_or_images
@overrides
@cluster
@in_process
@ray
@replace
@click.option("--out", metavar="ARTIFACT", help="With images instead of a job file: where the artifact goes.")
@click.option("--detector", metavar="NAME", help="With images: a name of `raydetect detectors`; default patchcore.")
@click.option(
    "--extend", metavar="ARTIFACT", help="Add the images to this artifact's memory bank instead of fitting a new one."
)
def fit(
    job: str,
    overrides: tuple[str, ...],
    address: str | None,
    in_process: bool,
    on_ray: bool,
    out: str | None,
    detector: str | None,
    extend: str | None,
    replace: bool,
) -> None:
    """Fit a detector on normal images and write the artifact.

    JOB_OR_IMAGES is a job file, or with --out a folder, archive, glob or URI of images.
    """
    with errors(BAD_JOB), doing("checking the job"):
        wanted = Wanted(address, in_process, on_ray)
        given = fit_of(job, _with_extend(with_replace(overrides, replace), extend), out, detector)
        spec: FitSpec = given.spec
        from raydetect.artifacts.replacement import existing_artifact
        from raydetect.check import find_problems
        from raydetect.storage import Storage

        problems = find_problems(spec)
        if problems:
            raise SpecError(" ".join(problems))
        replaced = existing_artifact(spec.artifact, Storage(spec.storage))
        is_here = runs_here(wanted, spec.resources, lambda: _size(spec))
        from raydetect.progress.displays import FitDisplay
    with errors(), FitDisplay() as display:
        if is_here:
            from raydetect.local import jobs as local

            report = local.fit(spec, display.on_progress)
        else:
            from raydetect.distributed.fitting.fit import fit as fit_on_ray

            report = fit_on_ray(spec, wanted.target, display.on_progress)
    with errors():
        given.keep(report.uri, Storage(spec.storage))
    _print_fit(spec, report)
    if replaced is not None:
        click.echo(f"Replaced {replaced.text}.")
    click.echo(f"Next: {_next_command(spec, report.uri, job)}")


def _size(spec: "FitSpec") -> Size:
    from raydetect.archives.open import open_archive
    from raydetect.config import source_storage
    from raydetect.storage import Storage

    return Size.of(open_archive(spec.source, Storage(source_storage(spec, spec.source))).shards())


def _next_command(spec: "FitSpec", uri: str, job: str) -> str:
    """`raydetect score` with the job file beside that of the fit if that is of this artifact, else with images."""
    from raydetect.config import ScoreSpec
    from raydetect.storage import normalise_uri

    beside = Path(job).with_name("score.yaml")
    if job.endswith(JOB_SUFFIXES) and beside.is_file():
        try:
            scoring = load(beside, ())
        except SpecError:
            scoring = None
        if isinstance(scoring, ScoreSpec) and normalise_uri(scoring.artifact) == uri:
            return f"raydetect score {shlex.quote(str(beside))}"
    endpoint = spec.storage.endpoint_url
    options = f" --set storage.endpoint_url={shlex.quote(endpoint)}" if endpoint else ""
    return f"raydetect score NEW_IMAGES --artifact {shown_place(uri)} --out RESULTS{options}"


def _with_extend(overrides: tuple[str, ...], extend: str | None) -> tuple[str, ...]:
    return overrides if extend is None else (*overrides, f"extend={extend}")


def _print_fit(spec: "FitSpec", report: "FitReport") -> None:
    from raydetect.metrics.conformal import usual_level_text
    from raydetect.progress.texts import bytes_text

    facts = report.facts
    images, seconds = facts["images"], facts["seconds"]
    by_workers = f" by {facts['workers']} workers" if facts["workers"] > 1 else ""
    is_shared = spec.per_category == "calibration"
    per_category = "" if is_shared or "categories" not in facts else f" for each of {facts['categories']} categories"
    of_categories = f" of {facts['categories']} categories" if is_shared else ""
    total = sum(seconds.values())
    on = f"on {images['fitted']} images{of_categories}"
    click.echo(f"Fitted {spec.detector.title}{per_category} {on}{by_workers} in {total:.0f} s.")
    for phase, elapsed in seconds.items():
        peak = bytes_text(facts["peak_memory_bytes"][phase])
        click.echo(f"  {phase:<10} {elapsed:8.1f} s   peak memory of a worker so far {peak}")
    for member in facts.get("members", [facts]):
        for line in _member_lines(member):
            click.echo(line)
    _print_labels(facts)
    click.echo(f"Weights: {facts['weights']}")
    if "random seed:" in str(facts["weights"]):
        click.echo("Note: random weights find only coarse defects; set `weights:` to a file for real use.")
    for hint in facts.get("hints", ()):
        click.echo(f"Hint: {hint}")
    for reason in facts["bad_reasons"]:
        click.echo(f"Bad: {reason}")
    left_out = f"{images['bad']} bad and {images['labelled_anomalous_left_out']} labelled anomalous left out"
    each = "each category " if is_shared else ""
    click.echo(f"Calibrated {each}on {_calibrated_text(facts)}; {left_out}.")
    note = "" if "categories" in facts else usual_level_text(images["held_out"])
    if note:
        click.echo(f"Note: {note}.")
    click.echo(f"Artifact: {report.uri} (sha256 {report.digest[:16]})")


def _member_lines(member: Mapping[str, Any]) -> Iterator[str]:
    """What the fit of one detector found."""
    if "auxiliary" in member:
        yield _auxiliary_text(member["auxiliary"])
    if "foreground_share" in member:
        yield f"Simulated defects lie on the foreground, {member['foreground_share']:.0%} of a picture on average."
    if "coreset" in member:
        yield _coreset_text(member["coreset"])


def _auxiliary_text(auxiliary: dict[str, Any]) -> str:
    categories = len(auxiliary["categories"])
    of = f" of {categories:,} categor{'y' if categories == 1 else 'ies'}" if categories else ""
    return f"Trained on {auxiliary['images']:,} auxiliary images{of}; {auxiliary['bad']:,} bad left out."


def _calibrated_text(facts: Mapping[str, Any]) -> str:
    images = facts["images"]["held_out"]
    if "categories" in facts:
        return f"{images:,} normal images in all that the scoring fits had not seen"
    if "folds" not in facts:
        return f"{images:,} held-out normal images"
    return f"{images:,} normal images, each scored by one of {facts['folds']} fits that had not seen it"


def _print_labels(facts: Mapping[str, Any]) -> None:
    """Prints how labels were read, and a note if they may be inverted."""
    from raydetect.archives.labels import labels_text
    from raydetect.left_out import left_out_of, left_out_text

    counts = [(label, text, count) for label, text, count in facts["labels"]]
    normal, anomalous = (sum(count for label, _, count in counts if label == wanted) for wanted in (0, 1))
    if normal or anomalous:
        click.echo(f"label: {labels_text(counts)}")
    if normal < anomalous:
        click.echo(
            f"Note: only {normal:,} of {normal + anomalous:,} labelled images are normal. If labels are inverted, set "
            "source.normal_names."
        )
    left_out = left_out_text(left_out_of(facts["left_out"]))
    if left_out:
        click.echo(f"Left out: {left_out}.")


def _coreset_text(coreset: dict[str, Any]) -> str:
    proven = coreset["proven_ratio"]
    ratio = "without a proven bound" if proven is None else f"at most {proven:.2f} times the best possible"
    return (
        f"Memory bank: {coreset['rows']:,} of {coreset['of']:,} patch embeddings ({coreset['mode']}), covering radius "
        f"{coreset['covering_radius']:.3g}, {ratio}."
    )
