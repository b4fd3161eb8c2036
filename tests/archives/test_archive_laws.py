"""Laws of every reader, over archives with hostile names, duplicates, sidecars and garbage: nothing is lost, nothing is
doubled, and a row's URI opens the bytes that it is of."""

import gzip
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydetect.archives.base import (
    begins_as_image,
    escaped_text,
    has_suffix,
    is_hidden,
    is_image_name,
    key_of,
    safe_name,
)
from raydetect.archives.directory import escaped
from raydetect.archives.open import open_archive
from raydetect.archives.path_patterns import Naming
from raydetect.archives.samples import left_out_reason, stems, tidy
from raydetect.config import SourceSpec
from raydetect.errors import MemberError, SpecError
from raydetect.left_out import LeftOutCount
from raydetect.records import BAD_STATUSES, OK, Member
from raydetect.storage import Storage, normalise_uri
from tests.builders.archives import Files, parquet_bytes
from tests.builders.hostile import files, lay_out, parts, tar_of, zip_of

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
PACKERS: dict[str, Callable[[Files], bytes]] = {
    ".tar": tar_of,
    ".tar.gz": lambda packed: gzip.compress(tar_of(packed), mtime=0),
    ".TGZ": lambda packed: gzip.compress(tar_of(packed), mtime=0),
    ".tar.zst": lambda packed: zstandard.ZstdCompressor(write_checksum=True).compress(tar_of(packed)),
    ".zip": zip_of,
}


def read_all(source: SourceSpec) -> tuple[list[Member], int]:
    """All members of a source, and how many files were left out."""
    left_out = LeftOutCount()
    archive = open_archive(source, Storage())
    members: list[Member] = []
    for shard in archive.shards():
        left_out.add_all(shard.left_out)
        members += archive.read(shard, left_out)
    return members, sum(entry.count for entry in left_out.counts.values())


def check_laws(source: SourceSpec, count: int) -> list[Member]:
    """Conservation, unique keys, and URIs that open; returns the members."""
    members, left_out = read_all(source)
    assert len(members) + left_out == count
    assert len({member.key for member in members}) == len(members)
    for member in members:
        assert member.status == OK or member.status in BAD_STATUSES
        for text in (member.key, member.image_uri, member.error, member.category or "", member.meta, *member.notes):
            text.encode()
        if member.status == OK:
            with fsspec.open(member.image_uri) as handle:
                assert handle.read() == member.data
    return members


@pytest.mark.parametrize("suffix", list(PACKERS))
@QUICK
@given(packed=files(with_bytes=True))
def test_no_member_of_a_container_is_lost_or_doubled(suffix: str, packed: Files) -> None:
    if suffix == ".zip":
        packed = [
            (name.encode("ascii", "ignore").decode() if "\udcf6" in name else name, data) for name, data in packed
        ]
    with tempfile.TemporaryDirectory(prefix="rd [x] 100% #") as folder:
        path = Path(folder) / f"day #1 [a]{suffix}"
        path.write_bytes(PACKERS[suffix](packed))
        check_laws(SourceSpec(uri=str(path)), len(packed))


@QUICK
@given(packed=files(with_bytes=True, unique=True))
def test_no_loose_file_is_lost_or_doubled(packed: Files) -> None:
    folder = tempfile.mkdtemp(prefix="rd [x] 100% #")
    try:
        count = lay_out(Path(folder), packed)
        try:
            check_laws(SourceSpec(uri=folder, shard_images=3), count)
        except SpecError as error:
            assert "left out" in str(error) or count == 0
    finally:
        shutil.rmtree(folder)


@QUICK
@given(packed=files())
def test_no_row_of_a_table_is_lost_or_doubled(packed: Files) -> None:
    Storage().write("memory://laws/a.parquet", parquet_bytes(packed, 3))
    members = check_laws(SourceSpec(uri="memory://laws/a.parquet"), len(packed))
    assert [member.data for member in members] == [data for _, data in packed]


@pytest.mark.parametrize("suffix", [".zip", ".parquet"])
@QUICK
@given(packed=files(), count=st.integers(2, 9))
def test_split_equals_unsplit(suffix: str, packed: Files, count: int) -> None:
    data = zip_of(packed) if suffix == ".zip" else parquet_bytes(packed, 2)
    uri = normalise_uri(f"memory://laws/a{suffix}")
    Storage().write(uri, data)
    found = [read_all(SourceSpec(uri=uri, split_bytes=size)) for size in parts(data, count)]
    assert all(entry == found[0] for entry in found)


@pytest.mark.parametrize("suffix", list(PACKERS))
def test_the_last_of_one_name_is_the_file(suffix: str, tmp_path: Path) -> None:
    packed = [
        ("a.png", b"1"),
        ("a.json", b'{"label": 0}'),
        ("b.png", b"2"),
        ("./a.png", b"3"),
        ("a.json", b'{"label": 1}'),
    ]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(PACKERS[suffix](packed))
    members = check_laws(SourceSpec(uri=str(path)), len(packed))
    assert [(m.key.partition("#")[2], m.status, m.data, m.label) for m in members] == [
        ("a.png@1", "duplicate_key", b"", None),
        ("b.png", "ok", b"2", None),
        ("a.png", "ok", b"3", 1),
    ]


@QUICK
@given(name=st.text(max_size=30) | st.text("./\\:#%\udcfc\ud83da\n\0", max_size=30))
def test_no_name_raises_anything_but_what_is_said(name: str) -> None:
    """Every function that meets a name of a stranger."""
    escaped_text(name).encode()
    key_of("memory:///a.tar", name).encode()
    is_hidden(name), has_suffix(name), is_image_name(name), list(stems(name)), left_out_reason(name), tidy(name)
    quoted = escaped(escaped_text(name))
    assert quoted.isascii() and "::" not in quoted
    Naming.of(SourceSpec(uri="", pattern="{category}/{defect}/{name}.png")).read(name)
    try:
        assert ".." not in safe_name(name).split("/")
    except MemberError as error:
        assert error.status == "unsafe_name"


@QUICK
@given(st.binary(max_size=40))
def test_no_first_bytes_raise(start: bytes) -> None:
    begins_as_image(start)


@QUICK
@given(cells=st.lists(st.none() | st.binary(max_size=20), min_size=1, max_size=6), label=st.integers(-300, 300))
def test_no_cell_of_a_table_raises(cells: list[bytes | None], label: int) -> None:
    columns = {"image": pa.array(cells, pa.binary()), "label": [label] * len(cells), "category": [[label]] * len(cells)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    Storage().write("memory://laws/a.parquet", buffer.getvalue())
    members, left_out = read_all(SourceSpec(uri="memory://laws/a.parquet"))
    assert len(members) == len(cells) and left_out == 0
    assert all(member.notes[-1].startswith("category_not_read") for member in members)
