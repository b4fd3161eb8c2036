"""An archive that changes after it was scored: refused in words, or continued with only what is new."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.cli.main import main
from raydetect.errors import ResumeError
from raydetect.local import jobs
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.sinks.rows import read_rows
from raydetect.sinks.run_progress import progress
from raydetect.sinks.verify import verify
from tests.builders.archives import mixed_files, tar_bytes
from tests.builders.commands import killed_after
from tests.builders.images import encode, normal_image
from tests.local.test_local import SCORE, fit, spec_of

pytestmark = pytest.mark.usefixtures("mixed_shards")


def add(folder: Path, *numbers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.png").write_bytes(encode(normal_image(number, 64)))


def spec_in(folder: Path, results: str = "out", **source: Any) -> Any:
    settings = {"uri": f"{folder}/in", "shard_images": 4, **source}
    return spec_of({**SCORE, "source": settings, "sink": {"uri": f"{folder}/{results}"}})


def planned(folder: Path, accept_new: bool = False, **source: Any) -> ScorePlan:
    return plan_score(spec_in(folder, **source), accept_new=accept_new)


def score(folder: Path, accept_new: bool = False, **source: Any) -> tuple[ScorePlan, dict[str, Any]]:
    plan = planned(folder, accept_new, **source)
    return plan, jobs.score(plan, lambda *_: None)


def rows_of(plan: ScorePlan) -> dict[str, dict[str, Any]]:
    found = [row for _, _, table in read_rows(plan.ledger) for row in table.to_pylist()]
    rows = {row["key"]: row for row in found}
    assert len(rows) == len(found)
    return rows


def parts(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((folder / "out").rglob("part-*"))}


def test_late_images_are_named_and_the_way_is(tmp_path: Path) -> None:
    add(tmp_path / "in", *range(0, 12, 2))
    score(tmp_path)
    add(tmp_path / "in", 1, 3, 5, 7, 9)
    (tmp_path / "in/004.png").unlink()
    with pytest.raises(ResumeError) as error:
        planned(tmp_path)
    text = str(error.value)
    assert "the archive has changed, and committed shard 00000" in text
    assert f"In all: 5 new (file://{tmp_path}/in#001.png," in text and "005.png and 2 more), 1 gone (" in text
    assert "004.png). Use another sink.uri, or score only what is new with `raydetect score --accept-new`." in text


def test_only_what_is_new_is_scored_and_the_rows_are_those_of_one_run(tmp_path: Path) -> None:
    add(tmp_path / "in", *range(0, 12, 2))
    score(tmp_path)
    before = parts(tmp_path)
    add(tmp_path / "in", 1, 3, 5, 7, 9)
    plan, manifest = score(tmp_path, accept_new=True)
    assert [shard.index for shard in plan.todo] == [2, 3] and (manifest["shards"], manifest["rows"]) == (4, 11)
    assert manifest["accepted"] == {"new": 5, "gone": {"count": 0, "names": []}}
    assert {name: data for name, data in parts(tmp_path).items() if name in before} == before
    whole = plan_score(spec_in(tmp_path, "whole"))
    jobs.score(whole, lambda *_: None)
    placed = ("chunk", "heatmap_uri", "close_up_uris")
    strip = [{k: v for k, v in row.items() if k not in placed} for _, row in sorted(rows_of(plan).items())]
    assert strip == [{k: v for k, v in row.items() if k not in placed} for _, row in sorted(rows_of(whole).items())]
    again, repeated = score(tmp_path)
    assert again.todo == () and repeated == manifest
    assert verify(plan.ledger, lambda *_: None).whole and progress(plan.ledger).finished
    assert planned(tmp_path, accept_new=True).todo == ()


def test_an_archive_may_grow_again_and_again(tmp_path: Path) -> None:
    add(tmp_path / "in", 4)
    score(tmp_path)
    for count, number in enumerate((2, 0, 3), start=1):
        add(tmp_path / "in", number)
        plan, manifest = score(tmp_path, accept_new=True)
        assert manifest["accepted"]["new"] == count and len(plan.todo) == 1
    assert len(rows_of(plan)) == 4


def test_what_is_gone_keeps_its_rows_and_is_counted(tmp_path: Path) -> None:
    add(tmp_path / "in", 0, 1, 2, 3, 4)
    score(tmp_path)
    (tmp_path / "in/002.png").unlink()
    add(tmp_path / "in", 9)
    plan, manifest = score(tmp_path, accept_new=True)
    name = f"file://{tmp_path}/in#002.png"
    assert manifest["accepted"] == {"new": 1, "gone": {"count": 1, "names": [name]}}
    assert name in rows_of(plan) and manifest["rows"] == 6
    assert score(tmp_path)[0].todo == ()


def test_an_image_that_was_overwritten_is_refused(tmp_path: Path) -> None:
    add(tmp_path / "in", 0, 1, 2, 3, 4)
    score(tmp_path)
    (tmp_path / "in/002.png").write_bytes(encode(normal_image(77, 64)))
    with pytest.raises(ResumeError, match=r"1 of it have other content now \(file.*in#002\.png\)"):
        planned(tmp_path, accept_new=True)


def test_an_unfinished_run_takes_free_numbers(tmp_path: Path) -> None:
    add(tmp_path / "in", *range(12))
    plan, _ = score(tmp_path)
    plan.ledger.withdraw([1])
    add(tmp_path / "in", 40)
    again, manifest = score(tmp_path, accept_new=True)
    assert [shard.index for shard in again.todo] == [1, 3] and manifest["rows"] == 13
    assert len(rows_of(again)) == 13


def test_containers_are_told_apart_by_their_names(tmp_path: Path) -> None:
    files = mixed_files(4, 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.tar").write_bytes(tar_bytes(files))
    score(tmp_path)
    (tmp_path / "in/a.tar").write_bytes(tar_bytes(files))
    with pytest.raises(ResumeError, match=r"In all: 1 new \(file:.*/in/a\.tar\)\. .*--accept-new"):
        planned(tmp_path)
    plan, manifest = score(tmp_path, accept_new=True)
    assert [(s.index, s.uri.rpartition("/")[2]) for s in plan.shards] == [(0, "b.tar"), (1, "a.tar")]
    shutil.copy(tmp_path / "in/a.tar", tmp_path / "in/c.tar")
    (tmp_path / "in/b.tar").write_bytes(tar_bytes(files[1:]))
    with pytest.raises(ResumeError, match=r"other content now \(file:.*/in/b\.tar\)"):
        planned(tmp_path, accept_new=True)
    assert manifest["accepted"]["new"] == 1


KILLED = """
    from raydetect.local import jobs
    from raydetect.planning.plan import plan_score
    from tests.local.test_local import SCORE
    from tests.planning.test_late_images import spec_in
    from pathlib import Path

    folder = Path(sys.argv[2])
    SCORE["artifact"] = str(folder / "artifact")
    jobs.score(plan_score(spec_in(folder), accept_new=True), lambda *_: None)
"""


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact where another process finds it."""
    monkeypatch.setitem(SCORE, "artifact", f"{tmp_path}/artifact")
    fit(f"artifact={tmp_path}/artifact")


@pytest.mark.parametrize("writes", [1, 2, 3, 5])
def test_a_killed_run_goes_on_without_the_flag(writes: int, tmp_path: Path, on_disk: None) -> None:
    add(tmp_path / "in", *range(0, 12, 2))
    score(tmp_path)
    add(tmp_path / "in", 1, 3, 5, 7, 9)
    assert killed_after(writes, KILLED, str(tmp_path)) == -9
    plan, manifest = score(tmp_path)
    assert (manifest["rows"], manifest["accepted"]["new"]) == (11, 5)
    assert len(rows_of(plan)) == 11 and verify(plan.ledger, lambda *_: None).whole


def command(folder: Path, *words: str) -> Result:
    job = folder / "score.yaml"
    settings = {"uri": f"{folder}/in", "shard_images": 4}
    job.write_text(yaml.safe_dump({**SCORE, "source": settings, "sink": {"uri": f"{folder}/out"}}))
    return CliRunner().invoke(main, ["score", str(job), "--local", *words])


def test_the_command_says_what_it_accepts(tmp_path: Path) -> None:
    add(tmp_path / "in", 0, 2)
    assert "nothing to accept" in command(tmp_path, "--accept-new").output
    add(tmp_path / "in", 1)
    (tmp_path / "in/002.png").unlink()
    assert command(tmp_path).exit_code == 2
    done = command(tmp_path, "--accept-new")
    assert done.exit_code == 0, done.output
    assert "Accepted a changed archive: 1 new (" in done.output
    assert "1 rows of images that are gone stay." in done.output
