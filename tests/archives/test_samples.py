"""Which file is what: images, sidecars, and what is left out; in containers, folders and tables."""

import bz2
import errno
import io
import json
import os
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydetect.archives.chunks import read_members
from raydetect.archives.formats.zip_names import without_false_flags
from raydetect.archives.name_limits import NameCount
from raydetect.archives.open import open_archive
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, SpecError, StorageError
from raydetect.left_out import LeftOutCount, left_out_text
from raydetect.records import Member
from raydetect.storage import Storage
from tests.builders.archives import PACKERS, Files, index_bytes, pack, tar_bytes, zip_bytes
from tests.builders.hostile import PNG

APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)


def read(uri: str, **settings: object) -> tuple[list[Member], dict[str, int]]:
    """Members of a source, and counts of what was left out by reason."""
    archive = open_archive(SourceSpec(uri=uri, **settings), Storage())  # type: ignore[arg-type]
    left_out = LeftOutCount()
    members: list[Member] = []
    for shard in archive.shards():
        left_out.add_all(shard.left_out)
        members += archive.read(shard, left_out)
    return members, {reason: entry.count for reason, entry in left_out.counts.items()}


def names(members: list[Member]) -> list[str]:
    return [member.key.partition("#")[2] for member in members]


@pytest.mark.parametrize("suffix", [suffix for suffix in (*PACKERS, "") if suffix != ".parquet"])
def test_sidecars_that_stand_apart_are_joined(suffix: str) -> None:
    label = json.dumps({"label": 1, "defect": "dent"}).encode()
    files: Files = [*((f"{i}.png", PNG) for i in range(3)), *((f"{i}.json", label) for i in range(3))]
    files = [*files, ("lone.json", b"{}"), ("0.mask.png", PNG)]
    pack("memory://apart", suffix, files, 1)
    members, left_out = read("memory://apart")
    assert [(m.label, m.defect) for m in members] == [(1, "dent")] * 3
    assert left_out == {"sidecar": 4, "sidecar_without_image": 1}
    with fsspec.open(members[0].mask_uri) as handle:
        assert handle.read() == PNG


@pytest.mark.parametrize("packer", [tar_bytes, zip_bytes])
def test_two_images_of_one_sample_share_its_sidecars(packer: object) -> None:
    files = [("000.left.png", PNG), ("000.right.png", PNG), ("000.cls", b"1"), ("000.left.json", b'{"defect": "dent"}')]
    suffix = ".tar" if packer is tar_bytes else ".zip"
    Storage().write(f"memory://two/a{suffix}", PACKERS[suffix](files))
    members, left_out = read("memory://two")
    assert [(m.label, m.defect) for m in members] == [(1, "dent"), (1, None)]
    assert left_out == {"sidecar": 2}


def test_what_systems_leave_beside_files_is_left_out_and_counted(tmp_path: Path) -> None:
    files = [("n/0.png", PNG), ("__MACOSX/n/._0.png", APPLE), ("n/.ipynb_checkpoints/0-checkpoint.png", PNG)]
    files += [("n/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", PNG), ("n/Thumbs.db", b"x"), (".DS_Store", b"x")]
    Storage().write(f"file://{tmp_path}/z/a.zip", zip_bytes(files))
    pack(f"file://{tmp_path}/loose", "", files, 1)
    for folder in ("z", "loose"):
        members, left_out = read(str(tmp_path / folder), pattern="{defect}/{name}.png", normal_names=("n",))
        assert names(members) == ["n/0.png"] and members[0].label == 0
        assert left_out == {"hidden": 5}


def test_other_suffixes_are_images_or_counted(tmp_path: Path) -> None:
    pictures = [(f"{i}{suffix}", PNG) for i, suffix in enumerate((".jfif", ".JPE", ".gif", ".ppm", ".pgm", ".avif"))]
    files = [*pictures, ("h", PNG), ("README", b"words"), ("notes.txt", b"x"), ("b.tar.bz2", b"x")]
    Storage().write(f"file://{tmp_path}/in/a.tar", tar_bytes(files))
    (tmp_path / "in/b.tar.bz2").write_bytes(bz2.compress(b"x"))
    members, left_out = read(str(tmp_path / "in"))
    assert names(members) == [*(name for name, _ in pictures), "h"]
    assert left_out == {"no_suffix": 1, "other_suffix": 1, "unknown_container": 2}


def test_a_source_without_an_image_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(PNG)
    with pytest.raises(
        SpecError, match=r"contains nothing of format auto; left out: 1 hidden \(.hidden.png\), 1 other_s"
    ):
        read(str(tmp_path))


def test_pipes_are_never_opened_and_links_that_lead_nowhere_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/nowhere/c.png")
    members, left_out = read(str(tmp_path))
    assert [m.status for m in members] == ["ok", "unreadable"]
    assert left_out == {"not_a_file": 1}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_tars_one_behind_the_other_are_read_to_the_end(suffix: str) -> None:
    pieces = [PACKERS[suffix]([(f"{i}.png", PNG + bytes([i]))]) for i in range(3)]
    Storage().write(f"memory://cat/a{suffix}", b"".join(pieces))
    members, left_out = read("memory://cat")
    assert names(members) == ["0.png", "1.png", "2.png"] and left_out == {}
    for member in members:
        with fsspec.open(member.image_uri) as handle:
            assert handle.read() == member.data


def test_bytes_behind_a_tar_are_counted() -> None:
    Storage().write("memory://cat/a.tar", tar_bytes([("0.png", PNG)]) + b"garbage" * 100)
    members, left_out = read("memory://cat")
    assert names(members) == ["0.png"] and left_out == {"bytes_after_end": 1}


def _indexed(folder: Path, files: Files, indexed: int | None = None) -> str:
    data = tar_bytes(files)
    (folder / "a.tar").write_bytes(data)
    (folder / "a.idx").write_bytes(index_bytes(data if indexed is None else tar_bytes(files[:indexed])))
    return str(folder / "a.tar")


def test_an_index_with_blanks_in_names_parts_a_tar(tmp_path: Path) -> None:
    uri = _indexed(tmp_path, [(f"image {i} 2 3.png", PNG * 400) for i in range(6)])
    archive = open_archive(SourceSpec(uri=uri, split_bytes=8000), Storage())
    assert len(archive.listing().shards) > 1 and archive.listing().notes == ()
    assert len(read(uri, split_bytes=8000)[0]) == 6


@pytest.mark.parametrize("why", ["does not cover", "is older"])
def test_a_stale_index_is_not_used(why: str, tmp_path: Path) -> None:
    uri = _indexed(tmp_path, [(f"{i}.png", PNG * 400) for i in range(6)], 3 if why == "does not cover" else None)
    if why == "is older":
        os.utime(tmp_path / "a.idx", (1, 1))
    source = SourceSpec(uri=uri, split_bytes=8000)
    listing = open_archive(source, Storage()).listing()
    assert len(listing.shards) == 1 and why in listing.notes[0]
    assert len(read(uri, split_bytes=8000)[0]) == 6


def test_sidecars_and_doubles_across_the_parts_of_an_indexed_tar(tmp_path: Path) -> None:
    files = [(f"{i:02d}.png", PNG * 300 + bytes([i])) for i in range(12)]
    files += [(f"{i:02d}.cls", b"1") for i in range(12)] + [("00.png", PNG)]
    uri = _indexed(tmp_path, files)
    whole = read(uri)
    assert [m.status for m in whole[0]].count("duplicate_key") == 1 and all(m.label == 1 for m in whole[0][1:])
    for size in (20000, 9000, 3000):
        assert read(uri, split_bytes=size) == whole


def test_backslashes_in_a_zip_of_windows_are_folders(tmp_path: Path) -> None:
    body, directory = b"", b""
    for name in (b"w\\test\\good\\0.png", b"w\\test\\bad\\1.png"):
        head = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(PNG), len(PNG), len(PNG), len(name), 0)
        directory += struct.pack("<IH", 0x02014B50, 20) + head + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name
        body += struct.pack("<I", 0x04034B50) + head + name + PNG
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 2, 2, len(directory), len(body), 0)
    (tmp_path / "w.zip").write_bytes(body + directory + end)
    members, _ = read(str(tmp_path / "w.zip"), pattern="{category}/test/{defect}/{name}.png")
    assert [(m.status, m.label, m.category) for m in members] == [("ok", 0, "w"), ("ok", 1, "w")]
    with fsspec.open(members[0].image_uri) as handle:
        assert handle.read() == PNG


def test_names_are_compared_composed() -> None:
    nfd, nfc = (lambda text: unicodedata.normalize("NFD", text)), (lambda text: unicodedata.normalize("NFC", text))
    files = [(nfd("Prüfung/unauffällig/0.png"), PNG), (nfd("Prüfung/Kratzer/1.png"), PNG)]
    files += [(nfd("Prüfung/masks/Kratzer/1.png"), PNG), (nfc("Prüfung/unauffällig/0.json"), b'{"line": 4}')]
    Storage().write("memory://nfd/a.tar", tar_bytes(files))
    members, left_out = read(
        "memory://nfd",
        pattern=nfc("Prüfung/{defect}/{name}.png"),
        mask_pattern=nfc("Prüfung/masks/{defect}/{name}.png"),
        normal_names=(nfc("unauffällig"),),
    )
    assert [m.label for m in members] == [0, 1] and members[0].meta and left_out == {"mask": 1, "sidecar": 1}
    with fsspec.open(members[1].mask_uri) as handle:
        assert handle.read() == PNG


def _table(columns: dict[str, object], features: dict[str, object] | None = None) -> str:
    table = pa.table(columns)
    if features is not None:
        metadata = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    Storage().write("memory://hf/a.parquet", buffer.getvalue())
    return "memory://hf/a.parquet"


def _images(count: int) -> pa.Array:
    return pa.array([PNG + bytes([i]) for i in range(count)], pa.binary())


def test_class_names_of_hugging_face_are_judged_by_normal_names() -> None:
    features = {"label": {"names": ["broken", "good"], "_type": "ClassLabel"}}
    members, _ = read(_table({"image": _images(4), "label": [0, 1, 1, -1]}, features))
    assert [(m.label, m.raw_label) for m in members] == [
        (1, "0 = broken"),
        (0, "1 = good"),
        (0, "1 = good"),
        (None, ""),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["good", "bad", None, "unknown"], [0, 1, None, None]),
        ([0.0, float("nan"), 1.0, -1.0], [0, None, 1, None]),
        ([False, True, None, True], [0, 1, None, 1]),
        ([[0], [1], [0], None], [None] * 4),
    ],
)
def test_label_columns_of_any_type(given: list[object], expected: list[int | None]) -> None:
    members, _ = read(_table({"image": _images(4), "label": given}))
    assert [m.label for m in members] == expected


def test_rows_that_repeat_a_name_are_named_by_number() -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["000.png", "001.png", "000.png", "C:\\img\\0.png", "/data/1.png", "https://x.org/2.png", None]
    cells = pa.array([{"bytes": PNG, "path": path} for path in paths], kind)
    for split in (1 << 30, 200):
        members, _ = read(_table({"image": cells}), split_bytes=split)
        assert names(members) == ["row-0", "001.png", "row-2", "row-3", "row-4", "row-5", "row-6"]
        assert all(m.status == "ok" for m in members)
        assert json.loads(members[3].meta) == {"row": 3, "name": "C:\\img\\0.png"}


def test_a_column_in_which_every_name_stands_once_gives_the_names() -> None:
    columns = {"image": _images(3), "name": ["bolt"] * 3, "file_name": [f"{i}.png" for i in range(3)]}
    assert names(read(_table(columns))[0]) == ["0.png", "1.png", "2.png"]


def test_a_name_that_is_no_utf8_is_kept_readable_and_its_uri_opens(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("Gr\u00f6\u00dfe.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    (tmp_path / "loose").mkdir()
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/loose/Gr\xf6.png"))).write_bytes(PNG)
    for uri, name in ((tmp_path / "a.tar", "Gr\\xf6\\xdfe.png"), (tmp_path / "loose", "Gr\\xf6.png")):
        members, _ = read(str(uri))
        assert names(members) == [name] and members[0].status == "ok"
        with fsspec.open(members[0].image_uri) as handle:
            assert handle.read() == PNG


def test_a_container_beside_a_folder_of_its_name_is_noted(tmp_path: Path) -> None:
    (tmp_path / "day.tar").write_bytes(tar_bytes([("x.png", PNG)]))
    pack(f"file://{tmp_path}/day", "", [("x.png", PNG)], 1)
    notes = open_archive(SourceSpec(uri=str(tmp_path)), Storage()).listing().notes
    assert len(notes) == 1 and "is beside a folder of the same name" in notes[0]


def test_what_was_left_out_is_told_with_the_first_names() -> None:
    count = LeftOutCount()
    for i in range(7):
        count.add("hidden", f"._{i}.png")
    count.add("other_suffix", "notes.txt")
    text = left_out_text(count.counts)
    assert text == "7 hidden (._0.png, ._1.png, ._2.png, ._3.png, ._4.png, ...), 1 other_suffix (notes.txt)"


@pytest.mark.parametrize("uris", [("in", "in/s"), ("in", "in"), ("in/*.png", "in/0.png"), ("in/s", "in/**/*.png")])
def test_no_file_is_named_twice(uris: tuple[str, ...], tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/in", "", [("0.png", PNG), ("s/1.png", PNG)], 1)
    source = SourceSpec(uri=tuple(f"{tmp_path}/{uri}" for uri in uris))
    with pytest.raises(SpecError, match="names the same file twice"):
        open_archive(source, Storage()).listing()


def test_links_to_folders_are_counted_and_noted(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/data", "", [("0.png", PNG)], 1)
    pack(f"file://{tmp_path}/in", "", [("1.png", PNG)], 1)
    for name in ("line4", "line.5", "cam.png"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "data")
    members, left_out = read(f"{tmp_path}/in")
    assert names(members) == ["1.png"] and left_out == {"linked_folder": 3}
    notes = open_archive(SourceSpec(uri=f"{tmp_path}/in"), Storage()).listing().notes
    assert len(notes) == 3 and "is a link to a folder and is not followed" in notes[0]
    assert names(read(f"{tmp_path}/in/line4")[0]) == ["0.png"]


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(f"file://{tmp_path}/in", "", [("0.png", PNG), ("cam2/1.png", PNG), (".cache/2.png", PNG)], 1)
    plain = os.scandir

    def denied(path: str) -> object:
        if str(path).rstrip("/").endswith(("cam2", ".cache")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", denied)
    for uri in (f"{tmp_path}/in", f"{tmp_path}/in/**/*.png"):
        with pytest.raises(StorageError, match="cam2") as caught:
            read(uri)
        assert caught.value.exit_code == 1
    (tmp_path / "in" / "cam2").rename(tmp_path / "cam2")
    assert names(read(f"{tmp_path}/in")[0]) == ["0.png"]


@pytest.mark.parametrize("pair", [("x.json", "x.JSON"), ("\u00e4.json", "a\u0308.json")])
def test_sidecars_whose_names_fall_together_are_all_counted(pair: tuple[str, str]) -> None:
    image = pair[0].replace(".json", ".png")
    Storage().write("memory://fold/a.tar", tar_bytes([(image, PNG), (pair[0], b"{}"), (pair[1], b"{}")]))
    members, left_out = read("memory://fold")
    assert len(members) == 1 and left_out == {"replaced": 1, "sidecar": 1}


def test_labels_of_a_path_are_read_as_those_of_a_sidecar() -> None:
    expected = {"0": 0, "1": 1, "OK": 0, "NG": 1, "unknown": None, "-1": None, "false": 0, "0.0": 0, "0.5": None}
    Storage().write("memory://path/a.tar", tar_bytes([(f"{text}/{i}.png", PNG) for i, text in enumerate(expected)]))
    members, _ = read("memory://path", pattern="{label}/{name}.png")
    assert [member.label for member in members] == list(expected.values())
    assert [bool(member.notes) for member in members] == [text == "0.5" for text in expected]
    members, _ = read("memory://path", pattern="{defect}/{name}.png")
    assert members[4].label == 1 and members[4].defect == "unknown"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_what_comes_before_the_cut_of_a_tar_can_be_opened(suffix: str, tmp_path: Path) -> None:
    whole = PACKERS[".tar.gz" if suffix == ".tgz" else suffix](
        [(f"{i}.png", PNG + os.urandom(9000)) for i in range(30)]
    )
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * 6 // 10])
    source = SourceSpec(uri=str(tmp_path))
    archive = open_archive(source, Storage())
    members = [m for shard in archive.shards() for m in read_members(archive, shard, source)]
    assert [m.status for m in members[-2:]] == ["ok", "bad_shard"] and "--retry bad_shard" in members[-1].error
    for member in members[:-1]:
        with fsspec.open(member.image_uri) as handle:
            assert handle.read() == member.data


def test_a_file_that_is_no_tar_is_told_what_it_is() -> None:
    Storage().write("memory://kind/a.tar", bz2.compress(b"x"))
    with pytest.raises(ArchiveError, match="is not a tar but bzip2"):
        read("memory://kind")


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()), pa.large_binary()])
def test_every_binary_column_may_hold_images(kind: pa.DataType) -> None:
    images = pa.array([PNG, PNG + b"2"], pa.binary())
    column = images.dictionary_encode() if pa.types.is_dictionary(kind) else images.cast(kind)
    members, _ = read(_table({"image": column}))
    assert [m.data for m in members] == [PNG, PNG + b"2"]


def test_class_names_may_stand_under_their_numbers() -> None:
    features = {"label": {"names": {"0": "broken", "1": "good"}, "_type": "ClassLabel"}}
    members, _ = read(_table({"image": _images(2), "label": [0, 1]}, features))
    assert [m.label for m in members] == [1, 0]


def test_one_name_that_is_falsely_flagged_as_utf8_does_not_hide_the_others(tmp_path: Path) -> None:
    data = zip_bytes([("0.png", PNG), ("Grüße.png", PNG + b"1"), ("2.png", PNG + b"2"), ("Grüße.cls", b"1")])
    broken = data.replace("Grüße".encode(), b"Gr\xfc\xffsse")  # as many bytes, and no UTF-8
    assert broken != data and len(broken) == len(data)
    (tmp_path / "a.zip").write_bytes(broken)
    members, left_out = read(str(tmp_path))
    assert [(m.status, m.data, m.label) for m in members] == [
        ("ok", PNG, None), ("ok", PNG + b"1", 1), ("ok", PNG + b"2", None),
    ]  # fmt: skip
    assert left_out == {"sidecar": 1} and len({m.key for m in members}) == 3
    for member in members:
        with fsspec.open(member.image_uri) as handle:
            assert handle.read() == member.data


@given(st.binary(max_size=200))
def test_no_directory_of_a_zip_raises(data: bytes) -> None:
    for start in (b"", b"PK\x01\x02", b"PK\x01\x02" + bytes(4) + b"\x00\x08"):
        assert len(without_false_flags(start + data, NameCount("z"))) == len(start + data)
