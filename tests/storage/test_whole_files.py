"""Output files are complete or absent after kills, power failures and full disks; scratch files."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from raydetect.blocks.coresets.keyed_rows import BLOCK_ROWS, RowStore
from raydetect.cli.main import main
from raydetect.errors import StorageError
from raydetect.fitting.fit_run import FitRun
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.images.preprocess import Preprocess
from raydetect.records import Chunk, Receipt
from raydetect.sinks.parquet import ResultsSink
from raydetect.storage import Scratch, Storage, local_files, remove_leftovers, whole_file, whole_text
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.ledgers import write_part
from tests.builders.results import make_results, names_of
from tests.local.test_local import fit, rows, run
from tests.sinks.test_sinks import rows as some_rows

WRITER = """
import pathlib, sys, time
from raydetect.storage import whole_file
with whole_file(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    print("started", flush=True)
    time.sleep(60)
"""
FORMS = {"csv": "rows.csv", "coco": "coco.json", "folder": "flagged/flagged.csv", "report": "report.html"}


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def left(folder: Path) -> list[str]:
    """Unfinished files."""
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of overwriting `file`."""
    (tmp_path / "file").write_bytes(b"the earlier one")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        yield process
        process.kill()


def test_leftovers_of_a_killed_writer_are_removed_and_files_being_written_are_not(
    writing: subprocess.Popen[str], tmp_path: Path
) -> None:
    for name in (".raydetect-notes.tmp", ".raydetect-00000000-0000000000000000.tmp.gz", ".file.12345678.tmp"):
        (tmp_path / name).write_text("a user's file")
    assert len(left(tmp_path)) == 3 and remove_leftovers(tmp_path) == 0 and len(left(tmp_path)) == 3
    os.kill(writing.pid, signal.SIGKILL)
    writing.wait()
    assert (tmp_path / "file").read_bytes() == b"the earlier one"
    assert remove_leftovers(tmp_path) == 1 and sorted(left(tmp_path)) == [".file.12345678.tmp", ".raydetect-notes.tmp"]


def test_an_unfinished_file_of_another_machine_stays_for_a_day(tmp_path: Path) -> None:
    foreign = tmp_path / "below" / ".raydetect-00000000-0123456789abcdef.tmp"
    foreign.parent.mkdir()
    foreign.write_bytes(b"x")
    assert remove_leftovers(tmp_path) == 0
    os.utime(foreign, times=(0, time.time() - 86_500))
    assert remove_leftovers(tmp_path, below=False) == 0 and remove_leftovers(tmp_path) == 1


def test_a_replaced_file_keeps_its_mode_and_link_and_a_special_file_is_written_directly(
    tmp_path: Path,
) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    with whole_text(tmp_path / "link") as out:
        out.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    with whole_file(Path("/dev/null")) as file:
        file.write(b"gone")
    assert not Path("/dev/null").is_file() and left(tmp_path) == []


def test_parts_are_on_the_disk_before_the_record_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(f"sync {'data' if path.suffix == '.tmp' else path.relative_to(tmp_path)}")
        sync(descriptor)

    def noted_rename(before: Path, after: Path) -> None:
        calls.append(f"rename {Path(after).relative_to(tmp_path)}")
        rename(before, after)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    chunk = Chunk(0, 0, True, ())
    sink = ResultsSink(f"file://{tmp_path}", Storage())
    part = write_part(sink, chunk, some_rows(chunk), {0: b"png"})
    sink.commit(Receipt(shard=0, uri="u", fingerprint="f", rows=6, statuses=part.statuses, parts=(part,)))
    heatmap = [
        "sync .",
        "sync heatmaps",
        "sync data",
        "rename heatmaps/shard=00000/part-0000.zip",
        "sync heatmaps/shard=00000",
    ]
    rows = [
        "sync .",
        "sync scores",
        "sync data",
        "rename scores/shard=00000/part-0000.parquet",
        "sync scores/shard=00000",
    ]
    assert calls == [*heatmap, *rows, "sync .", "sync data", "rename ledger/00000.json", "sync ledger"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space is left on the disk. Free some and start the same command again."),
        (errno.EDQUOT, "the disk quota is used up."),
        (errno.EROFS, "the disk is mounted read-only. Mount it writable or use another location."),
        (errno.EACCES, "permission denied. Change the permissions"),
    ],
)
def test_a_disk_error_is_one_sentence_with_the_path_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    uri = f"file://{tmp_path}/a/file"
    Storage().write(uri, b"the earlier one")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local_files.os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        Storage().write(uri, b"the new one")
    assert str(caught.value).startswith(f"{uri}: cannot write it: {message}") and caught.value.exit_code == 1
    assert Storage().read(uri) == b"the earlier one" and left(tmp_path) == []


@pytest.mark.parametrize("form", FORMS)
def test_an_export_or_report_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    ledger = make_results(f"file://{tmp_path}", names_of(12), "map")
    command = ["report"] if form == "report" else ["export", "--as", form]
    target = tmp_path / "out" / FORMS[form]
    out = str(target.parent if form == "folder" else target)
    assert call(*command, ledger.uri, "-o", out).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    part = tmp_path / "results" / "scores" / "shard=00002" / "part-0000.parquet"
    whole = part.read_bytes()
    part.write_bytes(b"PAR1 and no more")
    assert call(*command, ledger.uri, "-o", out).exit_code == 1
    assert {path: path.read_bytes() for path in before} == before and left(tmp_path) == []
    part.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "replace", _full)
        ended = call(*command, ledger.uri, "-o", out)
    message = "cannot write it: no space is left on the disk. Free some and start the same command again.\n"
    assert ended.exit_code == 1 and ended.output.startswith("Error: ") and ended.output.endswith(message), ended.output
    assert str(tmp_path / "out") in ended.output and ended.output.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before and left(tmp_path) == []


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_temporary_folder_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    image_HWC = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    cache, rows = ImageCache(Preprocess((2, 2))), RowStore(4, torch.float32, 1)
    cache.add(CachedImage("a", None, None), image_HWC)
    rows.append(torch.zeros(2 * BLOCK_ROWS, 4))
    monkeypatch.setattr(os, "pwrite", _full)
    for act, what in (
        (lambda: cache.add(CachedImage("b", None, None), image_HWC), "decoded images"),
        (lambda: rows.append(torch.zeros(BLOCK_ROWS, 4)), "patch embeddings"),
    ):
        with pytest.raises(StorageError, match=rf"{tmp_path}: cannot hold {what} \(no space left.*set TMPDIR"):
            act()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match=r"nowhere: cannot hold outlines \(no such file or directory\)"):
        Scratch("outlines")


def test_a_partial_write_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, requested = os.pwrite, list[int]()

    def partial(descriptor: int, data: memoryview, offset: int) -> int:
        requested.append(len(data))
        return plain(descriptor, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", partial)
    kept, data = Scratch("bytes"), bytes(range(256)) * 20
    kept.append(data)
    kept.append(b"end")
    assert b"".join(kept.parts()) == data + b"end" and len(requested) == 7


def test_a_fit_leaves_nothing_in_the_temporary_folder_when_it_is_killed(tmp_path: Path) -> None:
    script = "import sys, time; from raydetect.storage import Scratch; kept = Scratch('x'); kept.append(b'y' * 1000)"
    command = [sys.executable, "-c", f"{script}; print(kept.size_bytes, flush=True); time.sleep(60)"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "1000\n"
        run.kill()
    assert list(tmp_path.iterdir()) == []


def leave(folder: Path) -> Path:
    """A temporary file of this machine whose writer has ended."""
    path = folder / f".raydetect-{local_files._machine()}-0123456789abcdef.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 100)
    return path


def test_fit_and_score_delete_what_a_killed_run_of_the_same_job_left(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/normal", ".tar", normal_files(12), 1)
    pack(f"file://{tmp_path}/mixed", ".tar", mixed_files(3, 1), 1)
    artifact = f"artifact={tmp_path}/artifact"
    old = [leave(tmp_path / "artifact"), leave(tmp_path / "artifact" / "training-1")]
    fit(f"source.uri={tmp_path}/normal", artifact, "calibration.holdout_ratio=0.6")
    assert not any(path.exists() for path in old)
    old = [leave(tmp_path / "results" / name) for name in ("", "ledger", "heatmaps", "scores/shard=00000")]
    changes = (f"source.uri={tmp_path}/mixed", artifact, f"sink.uri={tmp_path}/results", "flag.alpha=0.2")
    plan, manifest = run(*changes)
    assert not any(path.exists() for path in old) and len(rows(plan)) == manifest["rows"] == 6


def test_an_export_deletes_leftovers_beside_it_and_nothing_below(tmp_path: Path) -> None:
    ledger = make_results(f"file://{tmp_path}", names_of(12), "map")
    beside, below, inside = leave(tmp_path), leave(tmp_path / "other"), leave(tmp_path / "flagged" / "images")
    for form, name in FORMS.items():
        command = ["report"] if form == "report" else ["export", "--as", form]
        output = tmp_path / ("flagged" if form == "folder" else name)
        assert call(*command, ledger.uri, "-o", str(output)).exit_code == 0
    assert (beside.exists(), below.exists(), inside.exists()) == (False, True, False)


@pytest.mark.parametrize("place", ["out.csv", "new/out.csv"])
def test_an_output_on_a_disk_that_is_read_only_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    ledger = make_results(f"file://{tmp_path}", names_of(6))

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    if "/" in place:
        monkeypatch.setattr(Path, "mkdir", refuse)
    ended = call("export", ledger.uri, "--as", "csv", "-o", f"{tmp_path}/{place}")
    said = (
        "cannot write it" + (f" ({tmp_path}/new)" if "/" in place else "") + ": the disk is mounted read-only. Mount it"
    )
    assert ended.exit_code == 1 and f"Error: {tmp_path}/{place}: {said}" in ended.output, ended.output


def test_an_artifact_that_could_not_be_written_is_refused_before_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(f"file://{tmp_path}/normal", ".tar", normal_files(12), 1)
    changes = (f"source.uri={tmp_path}/normal", f"artifact={tmp_path}/new/artifact")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        patch.setattr(FitRun, "fit", None)  # is not reached
        expected = rf"new/artifact: cannot write it \({tmp_path}\): permission denied. Change the permissions or use"
        with pytest.raises(StorageError, match=expected):
            fit(*changes)
    (tmp_path / "new").write_text("a file")
    with pytest.raises(StorageError, match="new/artifact: cannot write it"):
        fit(*changes)
