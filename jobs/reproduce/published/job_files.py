"""Fills the job files of this folder with where things are, and writes those that `raydetect evaluate` runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.reproduce.published.defects import label_defects
from raydetect.config.validation import apply_overrides, parse_yaml
from raydetect.detectors._registry import detector_class, list_models
from raydetect.errors import SpecError

HERE = Path(__file__).parent
LABELLED, TEXTURES, CATEGORY = "LABELLED", "TEXTURES", "CATEGORY"  # what the job files leave open, besides DATA, OUTPUT
SEED = 0


def known() -> list[str]:
    """The names of all jobs: a detector, or one with another variant of its paper."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def write_jobs(name: str, data: Path, output: Path, textures: Path | None, overrides: Sequence[str]) -> list[Path]:
    """Writes the job files of a name of `known` to the output folder: one, or one for each category.

    Args:
        name: of the job.
        data: folder with the layout of MVTec AD.
        output: folder for job files and results.
        textures: folder of DTD, for the detectors that take defects from it.
        overrides: `key=value`, as for `--set`.

    Raises:
        SpecError: no such job, a folder is missing or contains nothing of use, or an override is wrong.
    """
    text = _text(name)
    if not data.is_dir():
        raise SpecError(f"--data {data}: is not a folder. Name the one that contains the categories of MVTec AD.")
    if TEXTURES in text and (textures is None or not textures.is_dir()):
        raise SpecError(f"{name}: makes defects of the textures of DTD. Name its folder with --textures.")
    places = {
        "DATA": str(data.resolve()),
        "OUTPUT": str(output.resolve()),
        TEXTURES: str(textures and textures.resolve()),
    }
    if LABELLED in text:
        places[LABELLED] = str(label_defects(data, output / "labelled", SEED))
    values = apply_overrides(_filled(parse_yaml(text, f"{name}.yaml"), places), overrides)
    return [_written(path, job) for path, job in _each(values, data, output)]


def _text(name: str) -> str:
    if name in known():
        return (HERE / f"{name}.yaml").read_text()
    if name in list_models() and detector_class(name).info.auxiliary != "none":
        raise SpecError(
            f"{name}: trains on {detector_class(name).info.auxiliary}, and kind: evaluate fits on the images of data "
            "alone, so there is no job for it here. Fit it with auxiliary in a job of kind: fit."
        )
    raise SpecError(f"{name!r}: there is no such job here. There are {', '.join(known())}.")


def _each(values: dict[str, Any], data: Path, output: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The job, or, if its detector is told the name of the category, one for each."""
    if CATEGORY not in json.dumps(values["detectors"]):
        yield output / "job.yaml", values
        return
    for category in values["data"].get("categories") or categories_of(data):
        words = {CATEGORY: category.replace("_", " "), values["output"]: str((output / category).resolve())}
        job = _filled(values, words)
        yield output / category / "job.yaml", {**job, "data": {**job["data"], "categories": [category]}}


def categories_of(data: Path) -> list[str]:
    """The categories in a folder with the layout of MVTec AD.

    Raises:
        SpecError: there are none.
    """
    found = sorted(
        folder.name for folder in data.iterdir() if (folder / "test").is_dir() and (folder / "train").is_dir()
    )
    if not found:
        raise SpecError(f"--data {data}: has no folder with train and test in it, as every category of MVTec AD.")
    return found


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    """Replaces every text that is a key of `places`."""
    if isinstance(value, dict):
        return {key: _filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, places) for item in value]
    return places.get(value, value) if isinstance(value, str) else value


def _written(path: Path, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return path
