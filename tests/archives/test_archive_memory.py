"""Memory of reading: it is bounded whatever an archive claims of itself, and what is too large costs no other image."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydetect.archives import name_limits as names
from raydetect.archives.chunks import read_members
from raydetect.archives.formats import parquet, parquet_cells, tar_headers, tar_index, zip_names
from raydetect.archives.open import open_archive
from raydetect.archives.samples import Entry, arrange
from raydetect.config import SourceSpec
from raydetect.records import Member
from raydetect.storage import Storage
from tests.builders.archives import index_bytes, tar_bytes, zip_bytes

MiB = 1 << 20
IMAGE = b"\x89PNG\r\n\x1a\n" + b"x" * 1000
ODD = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"

MEASURE = """
import json, sys
from pathlib import Path
import pyarrow.parquet
from raydetect.archives.open import open_archive
from raydetect.archives.samples import Entry, arrange
from raydetect.config import SourceSpec
from raydetect.storage import Storage
from raydetect.archives.chunks import read_members

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def statuses(uri):
    source = SourceSpec(uri=uri)
    archive = open_archive(source, Storage())
    return [member.status for shard in archive.shards() for member in read_members(archive, shard, source)]

statuses(sys.argv[1])
for uri in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    found = statuses(uri)
    print(json.dumps([found[:200], status("VmHWM") - before]))
"""


def members_of(uri: str | Path, **settings: object) -> list[Member]:
    source = SourceSpec(uri=str(uri), **settings)
    archive = open_archive(source, Storage())
    return [member for shard in archive.shards() for member in read_members(archive, shard, source)]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def with_header(kind: bytes, size: int) -> bytes:
    """A tar whose second member comes after a header of that many bytes."""
    long = header("long", size, kind) + b"a" * size + bytes(-size % 512)
    return member("a.png", IMAGE) + long + member("b.png", IMAGE) + member("c.png", IMAGE) + bytes(1024)


def sparse_tar() -> bytes:
    """A tar with an old GNU sparse member whose map is longer than all else."""
    first = bytearray(header("s.png", 0, tarfile.GNUTYPE_SPARSE))
    entry = b"00000000001\x0000000000001\0"
    first[257:265] = b"ustar  \0"
    first[386 : 386 + 24], first[482], first[483:495] = entry, 1, b"00000000000\0"
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    more = entry * 21 + b"\1" + bytes(7)
    packed = bytes(first) + more * 20_000 + more[:504] + bytes(8)
    return member("a.png", IMAGE) + packed + member("c.png", IMAGE) + bytes(1024)


def new_sparse_tar() -> bytes:
    """Likewise of a sparse member of the newer kind, whose map stands before its data."""
    facts = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    listed = b"9999999\n" + b"1\n" * (4 * MiB)
    headers = header("x", len(facts), tarfile.XHDTYPE) + facts + bytes(-len(facts) % 512)
    return member("a.png", IMAGE) + headers + member("s.png", listed) + member("c.png", IMAGE) + bytes(1024)


def table(folder: Path, name: str, columns: dict[str, pa.Array], **options: object) -> Path:
    pq.write_table(pa.table(columns), folder / name, compression="zstd", **options)
    return folder / name


def bzip2_that_lies() -> bytes:
    """A zip with a member of 100 MB in a few bytes, which its directory calls 1 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", bytes(100 * MiB))
        archive.writestr("b.png", IMAGE)
    data = bytearray(buffer.getvalue())
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, MiB)
    return bytes(data)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="measures peak memory by /proc/self/clear_refs, which only Linux has",
)
def test_what_an_archive_claims_takes_no_memory(tmp_path: Path) -> None:
    cell, text = pa.array([bytes(8 * MiB)] * 12, pa.binary()), pa.array(["x" * (8 * MiB)] * 12)
    long = {
        "pax": tarfile.XHDTYPE,
        "solaris": tarfile.SOLARIS_XHDTYPE,
        "name": tarfile.GNUTYPE_LONGNAME,
        "link": tarfile.GNUTYPE_LONGLINK,
    }
    tiny = pa.array([b"x"] * 12, pa.binary())
    cases: dict[Path, tuple[list[str], int]] = {
        **{
            written(tmp_path / f"{name}.tar.gz", with_header(kind, 16 * MiB)): (["ok", "unsafe_name", "ok"], 8 * MiB)
            for name, kind in long.items()
        },
        written(tmp_path / "global.tar.gz", with_header(tarfile.XGLTYPE, 16 * MiB)): (["ok", "bad_shard"], 8 * MiB),
        written(tmp_path / "sparse.tar.gz", sparse_tar()): (["ok", "corrupt", "ok"], 8 * MiB),
        written(tmp_path / "sparse10.tar.gz", new_sparse_tar()): (["ok", "corrupt", "ok"], 8 * MiB),
        written(tmp_path / "doubles.tar.gz", member("a.png", IMAGE + bytes(2 * MiB)) * 20 + bytes(1024)): (
            ["duplicate_key"] * 19 + ["ok"],
            8 * MiB,
        ),
        written(tmp_path / "lies.zip", bzip2_that_lies()): (["corrupt", "ok"], 8 * MiB),
        # a dictionary holds the value once: as a page, unpacked, and as the row
        table(tmp_path, "cells.parquet", {"image": cell}): (["ok"] * 12, 8 * 8 * MiB),
        table(tmp_path, "words.parquet", {"image": tiny, "label": text}): (["ok"] * 12, 6 * 8 * MiB),
        table(tmp_path, "masks.parquet", {"image": tiny, "mask": cell}): (["ok"] * 12, 6 * 8 * MiB),
    }
    warm_up = written(tmp_path / "begun.tar.gz", tar_bytes([("a.png", IMAGE)]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, warm_up, *cases],
        capture_output=True,
        text=True,
        env={**env, "ARROW_DEFAULT_MEMORY_POOL": "system"},
    )
    assert done.returncode == 0, done.stderr
    for (path, (expected, most)), line in zip(cases.items(), done.stdout.splitlines(), strict=True):
        statuses, peak = json.loads(line)
        assert statuses == expected, path.name
        assert peak <= most, f"{path.name}: {peak >> 20} MiB"


def test_a_member_whose_header_is_too_long_is_a_row_that_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", with_header(tarfile.GNUTYPE_LONGNAME, names.MAX_NAME_BYTES + 1))
    found = members_of(path)
    assert [row.key.partition("#")[2] for row in found] == ["a.png", "b.png...@1536", "c.png"]
    assert found[1].status == "unsafe_name" and "its header has 65,537 bytes, more than 65,536" in found[1].error
    path = written(tmp_path / "b.tar", with_header(tarfile.GNUTYPE_LONGNAME, 300))
    assert [row.key.partition("#")[2] for row in members_of(path)] == ["a.png", "a" * 300, "c.png"]


@pytest.mark.parametrize("name", ["notes.txt", "a.json", "nothing", ".hidden"])
def test_a_file_without_a_known_name_is_a_row_whatever_its_short_name(name: str, tmp_path: Path) -> None:
    long = header("long", 70_000, tarfile.XHDTYPE) + b"a" * 70_000 + bytes(-70_000 % 512)
    data = member(name, IMAGE) + long + member(name, IMAGE) + member("c.png", IMAGE) + bytes(1024)
    found = members_of(written(tmp_path / "a.tar", data))
    assert [row.status for row in found if "@" in row.key] == ["unsafe_name"]
    assert found[-1].key.endswith("#c.png") and found[-1].status == "ok"


def test_a_file_takes_as_much_memory_as_is_counted() -> None:
    tracemalloc.start()
    try:
        entries = [
            Entry(name, 1024 * i + 512, 1000 + i, name) for i, name in enumerate(f"{i:05d}.png" for i in range(20_000))
        ]
        found = arrange(entries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.samples) == 20_000 and peak / 20_000 <= names.FILE_BYTES


def test_a_tar_that_names_too_much_gives_what_comes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NAMES_BYTES", 10 * (names.FILE_BYTES + 7))
    path = written(tmp_path / "a.tar", tar_bytes([(f"{i:03d}.png", IMAGE) for i in range(15)]))
    found = members_of(path)
    assert [row.status for row in found] == ["ok"] * 10 + ["bad_shard"]
    assert "Pack fewer files into one container" in found[-1].error


@pytest.mark.parametrize(
    ("packed", "place", "limit"),
    [
        (zip_bytes([(f"{i}.png", IMAGE) for i in range(15)]), names, "MAX_NAMES_BYTES"),
        (zip_bytes([(f"{i}.png", IMAGE) for i in range(15)]), zip_names, "MAX_DIRECTORY_BYTES"),
        (ODD * 15 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(ODD) * 15, 0, 0), names, "MAX_NAMES_BYTES"),
    ],
    ids=["names", "bytes", "more entries than it says"],
)
def test_a_zip_that_names_too_much_is_a_bad_shard(
    packed: bytes, place: object, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, limit, 600)
    (found,) = members_of(written(tmp_path / "a.zip", packed))
    assert found.status == "bad_shard" and ".zip: " in found.error and "Pack fewer files into one" in found.error


def test_an_index_that_is_too_large_is_not_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "MAX_INDEX_BYTES", 50)
    packed = tar_bytes([(f"{i:03d}.png", IMAGE) for i in range(9)])
    (tmp_path / "a.tar").write_bytes(packed)
    (tmp_path / "a.idx").write_bytes(index_bytes(packed))
    archive = open_archive(SourceSpec(uri=str(tmp_path), split_bytes=4000), Storage())
    listing = archive.listing()
    assert len(listing.shards) == 1 and "has more than 50 bytes" in listing.notes[0]
    assert [row.status for row in archive.read(listing.shards[0])] == ["ok"] * 9


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("size", [0, 1, 5000, 300_000])
def test_every_method_of_a_zip_gives_the_bytes_that_were_packed(method: int, size: int, tmp_path: Path) -> None:
    data = IMAGE + os.urandom(size) + bytes(size)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.png", data)
        archive.writestr("b.png", data[::-1])
    assert [row.data for row in members_of(tmp_path / "a.zip")] == [data, data[::-1]]
    packed = bytearray((tmp_path / "a.zip").read_bytes())
    packed[48] ^= 1
    found = members_of(written(tmp_path / "b.zip", bytes(packed)))
    assert [row.status for row in found] == ["corrupt", "ok"]


def test_global_headers_of_many_tars_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_headers, "MAX_GLOBAL_BYTES", 100)
    facts = b"30 comment=abcdefghijklmnopqr\n"
    one = header("g", len(facts), tarfile.XGLTYPE) + facts + bytes(-len(facts) % 512)
    tar = b"".join(one + member(f"{i}.png", IMAGE) for i in range(5))
    found = members_of(written(tmp_path / "a.tar", tar + bytes(1024)))
    assert [row.status for row in found] == ["ok"] * 3 + ["bad_shard"] and "global headers" in found[-1].error


def test_a_row_group_that_unpacks_too_far_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_cells, "MAX_UNPACKED_BYTES", MiB)
    cells = [IMAGE] * 3 + [bytes(MiB)] * 3 + [IMAGE] * 3
    path = table(tmp_path, "a.parquet", {"image": pa.array(cells)}, row_group_size=3, use_dictionary=False)
    found = members_of(path)
    assert [row.status for row in found] == ["ok"] * 6 + ["bad_shard"]
    assert [row.key.partition("#")[2] for row in found[:6]] == [f"row-{i}" for i in (0, 1, 2, 6, 7, 8)]
    assert "column image of row group 1 unpacks from" in found[-1].error
    fs = fsspec.filesystem("parquetrow", fo=str(path))
    assert fs.cat_file("image/7") == IMAGE
    with pytest.raises(OSError, match="unpacks from"):
        fs.cat_file("image/4")


def test_a_name_that_is_too_long_is_none(tmp_path: Path) -> None:
    long, image = "x" * (names.MAX_NAME_BYTES + 1), pa.array([IMAGE] * 4)
    for texts in (
        pa.array(["a.png", long, None, "b.png"]),
        pa.array(["a.png", long, None, "b.png"]).dictionary_encode(),
    ):
        found = members_of(table(tmp_path, "a.parquet", {"image": image, "name": texts}))
        assert [row.key.partition("#")[2] for row in found] == ["a.png", "row-1", "row-2", "b.png"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_a_label_that_is_too_long_is_noted(kind: pa.DataType, tmp_path: Path) -> None:
    labels = pa.array(["1", "x" * (2 * MiB), None], kind)
    found = members_of(table(tmp_path, "a.parquet", {"image": pa.array([IMAGE] * 3), "label": labels}))
    assert [row.status for row in found] == ["ok"] * 3
    assert found[1].label is None and found[1].notes == ("label_not_read: of type TooManyBytes",)
    assert found[2].notes == ()


def test_lists_without_an_end_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"image": pa.array([IMAGE] * 2), "label": pa.array([[1] * 1000, None])}
    path = table(tmp_path, "a.parquet", lists)
    assert [row.notes for row in members_of(path)] == [("label_not_read: of type list",), ()]
    monkeypatch.setattr(parquet_cells, "MAX_NESTED_VALUES", 1000)
    assert [row.notes for row in members_of(path)] == [("label_not_read: of type TooManyBytes",)] * 2


def test_a_footer_and_class_names_that_are_too_long_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path, "a.parquet", {"image": pa.array([IMAGE])})
    data = path.read_bytes()
    (found,) = members_of(written(tmp_path / "b.parquet", data[:-8] + struct.pack("<I", 65 * MiB) + b"PAR1"))
    assert found.status == "bad_shard" and "its footer has 68,157,440 bytes" in found.error
    monkeypatch.setattr(parquet, "MAX_CLASSES_BYTES", 1)
    (found,) = members_of(path)
    assert found.status == "bad_shard" and "class names in its schema are too long" in found.error
