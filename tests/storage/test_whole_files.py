"""Files that people wait for are whole or not there: kills, power cuts, full disks, temporary folders."""

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
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.records import Chunk, Receipt
from raydetect.sinks.parquet import ResultsSink
from raydetect.storage import Scratch, Storage, local_files, remove_leftovers, whole_file, whole_text
from tests.builders.results import make_results, names_of
from tests.sinks.test_sinks import rows as some_rows

WRITER = """
import pathlib, sys, time
from raydetect.storage import whole_file
with whole_file(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    print("begun", flush=True)
    time.sleep(60)
"""
FORMS = {"csv": "rows.csv", "coco": "coco.json", "folder": "flagged/flagged.csv", "report": "report.html"}


def call(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def left(folder: Path) -> list[str]:
    """Unfinished files."""
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing `file`, over what was there."""
    (tmp_path / "file").write_bytes(b"the earlier one")
    words = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(
    writing: subprocess.Popen[str], tmp_path: Path
) -> None:
    for name in (".raydetect-notes.tmp", ".raydetect-00000000-0000000000000000.tmp.gz", ".file.12345678.tmp"):
        (tmp_path / name).write_text("a person's")
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


def test_a_file_that_is_replaced_keeps_its_mode_and_its_link_and_what_is_no_file_is_written_as_it_is(
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
    told: list[str] = []
    sync, rename = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        told.append(f"sync {'data' if place.suffix == '.tmp' else place.relative_to(tmp_path)}")
        sync(descriptor)

    def noted_rename(before: Path, after: Path) -> None:
        told.append(f"name {Path(after).relative_to(tmp_path)}")
        rename(before, after)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    chunk = Chunk(0, 0, True, ())
    sink = ResultsSink(f"file://{tmp_path}", Storage())
    part = sink.write(chunk, some_rows(chunk), {0: b"png"})
    sink.commit(Receipt(shard=0, uri="u", fingerprint="f", rows=6, statuses=part.statuses, parts=(part,)))
    heatmap = ["sync .", "sync data", "name heatmaps/00000-0000.zip", "sync heatmaps"]
    rows = [
        "sync .",
        "sync scores",
        "sync data",
        "name scores/shard=00000/part-0000.parquet",
        "sync scores/shard=00000",
    ]
    assert told == [*heatmap, *rows, "sync .", "sync data", "name ledger/00000.json", "sync ledger"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space is left on the disk. Free some and start the same command again."),
        (errno.EDQUOT, "the disk quota is used up."),
        (errno.EROFS, "the disk is mounted read-only. Mount it writable or name another place."),
        (errno.EACCES, "permission denied. Change who may read and write there"),
    ],
)
def test_a_disk_that_refuses_is_one_sentence_with_the_place_and_what_to_do(
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
    words = ["report"] if form == "report" else ["export", "--as", form]
    target = tmp_path / "out" / FORMS[form]
    out = str(target.parent if form == "folder" else target)
    assert call(*words, ledger.uri, "-o", out).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    part = tmp_path / "results" / "scores" / "shard=00002" / "part-0000.parquet"
    whole = part.read_bytes()
    part.write_bytes(b"PAR1 and no more")
    assert call(*words, ledger.uri, "-o", out).exit_code == 1
    assert {path: path.read_bytes() for path in before} == before and left(tmp_path) == []
    part.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "replace", _full)
        ended = call(*words, ledger.uri, "-o", out)
    message = "cannot write it: no space is left on the disk. Free some and start the same command again.\n"
    assert ended.exit_code == 1 and ended.output.startswith("Error: ") and ended.output.endswith(message), ended.output
    assert str(tmp_path / "out") in ended.output and ended.output.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before and left(tmp_path) == []


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_does_not_fit_into_the_temporary_folder_is_told_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    image_HWC = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    cache, rows = ImageCache((2, 2)), RowStore(4, torch.float32, 1)
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


def test_a_disk_that_takes_a_part_of_the_bytes_is_given_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = os.pwrite, list[int]()

    def few(descriptor: int, data: memoryview, place: int) -> int:
        asked.append(len(data))
        return plain(descriptor, data[:1000], place)

    monkeypatch.setattr(os, "pwrite", few)
    kept, data = Scratch("bytes"), bytes(range(256)) * 20
    kept.append(data)
    kept.append(b"end")
    assert b"".join(kept.parts()) == data + b"end" and len(asked) == 7


def test_a_fit_leaves_nothing_in_the_temporary_folder_when_it_is_killed(tmp_path: Path) -> None:
    made = "import sys, time; from raydetect.storage import Scratch; kept = Scratch('x'); kept.append(b'y' * 1000)"
    words = [sys.executable, "-c", f"{made}; print(kept.size_bytes, flush=True); time.sleep(60)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}) as run:
        assert run.stdout is not None and run.stdout.readline() == "1000\n"
        run.kill()
    assert list(tmp_path.iterdir()) == []
