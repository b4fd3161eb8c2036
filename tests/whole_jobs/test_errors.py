"""What goes wrong on a cluster ends in the sentence and the exit code of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydetect.config import FitSpec, ScoreSpec, parse_job
from raydetect.distributed.fitting.fit import fit as fit_on_ray
from raydetect.distributed.scoring.score import score as score_on_ray
from raydetect.errors import RaydetectError
from raydetect.local import jobs
from raydetect.planning.plan import plan_score
from raydetect.storage import relative_to
from tests.builders.archives import normal_files, tar_bytes
from tests.whole_jobs.conftest import Line
from tests.whole_jobs.test_fit import fit_job


def nothing(*_: object) -> None:
    """Takes what a run tells."""


def ending(run: Callable[..., object], *arguments: Any) -> tuple[type, str, int]:
    """Class, message and exit code."""
    with pytest.raises(RaydetectError) as caught:
        run(*arguments, nothing)
    return type(caught.value), str(caught.value), caught.value.exit_code


def job_of(path: str) -> Any:
    """The job of a file."""
    return parse_job(yaml.safe_load(Path(path).read_text()), path)


def test_a_replaced_artifact_ends_a_run_as_in_one_process(line: Line, cluster: str, tmp_path: Path) -> None:
    store, source, copy = line.store.storage, line.store.uri("artifact"), tmp_path / "artifact"
    for file in store.list(source):
        place = copy / relative_to(file.uri, source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(store.read(file.uri))
    spec: ScoreSpec = job_of(line.job("replaced", artifact=str(copy)))
    plan = plan_score(spec)
    (copy / "artifact.json").write_bytes(
        (copy / "artifact.json").read_bytes().replace(b'"seed": 0', b'"seed": 1') + b" "
    )
    expected = ending(jobs.score, plan)
    assert expected[0].__name__ == "ArtifactError" and expected[2] == 2
    assert ending(score_on_ray, plan, cluster) == expected


def test_a_member_whose_name_climbs_ends_runs_as_in_one_process(line: Line, cluster: str) -> None:
    files = normal_files(12)
    line.store.storage.write(line.store.uri("climbs/a.tar"), tar_bytes([*files, ("../x.png", files[0][1])]))
    source = {"uri": line.store.uri("climbs"), "on_bad_member": "fail"}
    plan = plan_score(job_of(line.job("climbed", source=source)))
    expected = ending(jobs.score, plan)
    assert "../x.png" in expected[1] and expected[2] == 1
    assert ending(score_on_ray, plan, cluster) == expected
    fit: FitSpec = job_of(fit_job(line, "climbed", 2, source=source))
    assert ending(fit_on_ray, fit, cluster) == ending(jobs.fit, fit) == expected


def test_a_place_that_takes_no_file_ends_a_fit_as_in_one_process(line: Line, cluster: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    fit: FitSpec = job_of(fit_job(line, "nowhere", 1, artifact=f"{tmp_path}/file/artifact"))
    kind, text, code = ending(fit_on_ray, fit, cluster)
    assert (kind.__name__, code) == ("StorageError", 1) and f"{tmp_path}/file/artifact/" in text
    assert text.partition(": ")[2].startswith("cannot write it (") and "Ray" not in text
