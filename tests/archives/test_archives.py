"""Archives: every format on every storage, splits, labels, and input that is broken on purpose."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raydetect.archives.base import archive_fingerprint, chunk_members, safe_name
from raydetect.archives.chunks import BadMemberError, read_members
from raydetect.archives.formats import tar_index
from raydetect.archives.open import open_archive
from raydetect.config import SourceSpec
from raydetect.errors import ArchiveError, MemberError, SpecError, StorageError
from raydetect.records import Member, Shard
from raydetect.storage import Storage, join_uri, normalise_uri
from tests.builders.archives import PACKERS, index_bytes, pack, parquet_bytes, tar_bytes, zip_bytes
from tests.objectstore import ObjectStore

FILES = [(f"cam/{i:03d}.png", bytes([i]) * (1000 + 37 * i)) for i in range(23)]
SUFFIXES = [*PACKERS, ""]


def members_of(source: SourceSpec, storage: Storage | None = None) -> list[Member]:
    archive = open_archive(source, storage or Storage())
    return [member for shard in archive.shards() for member in archive.read(shard)]


def names(members: list[Member]) -> list[str]:
    return [member.key.partition("#")[2] for member in members]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["file", "memory", "s3"])
def test_every_format_on_every_storage(suffix: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage, root = Storage(), f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path)
    if kind == "s3":
        store: ObjectStore = request.getfixturevalue("object_store")
        storage, root = store.storage, store.uri("day")
    root = normalise_uri(root)
    pack(root, suffix, FILES, 3, storage)
    found = members_of(SourceSpec(uri=root), storage)
    assert sorted((m.key.rpartition("#")[2], m.data) for m in found) == FILES
    assert all(m.status == "ok" and m.label is None for m in found)
    assert len({m.key for m in found}) == len(FILES)
    target = storage.fsspec_options(root)
    for member in found[:: len(found) // 4]:
        options = {"s3": target} if "::" in member.image_uri else target
        with fsspec.open(member.image_uri, **(options if kind == "s3" else {})) as handle:
            assert handle.read() == member.data


@pytest.mark.parametrize("suffix", [".zip", ".parquet", ".tar"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(split=st.integers(600, 60_000), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_split_container_is_read_once_and_whole(suffix: str, split: int, count: int, seed: int) -> None:
    files = [(f"{i:03d}.jpg", bytes([(i * 7 + seed) % 251]) * (1 + (i * 977 + seed * 31) % 5000)) for i in range(count)]
    root = f"memory://split{suffix}"
    data = PACKERS[suffix](files)
    Storage().write(f"{root}/a{suffix}", data)
    if suffix == ".tar":
        Storage().write(f"{root}/a.idx", index_bytes(data))
    archive = open_archive(SourceSpec(uri=root, split_bytes=split), Storage())
    shards = list(archive.shards())
    assert len(shards) == max(1, -(-len(data) // split))
    assert sum(shard.size_bytes for shard in shards) == len(data)
    found = [member for shard in shards for member in archive.read(shard)]
    assert [(name, m.data) for name, m in zip(names(found), found, strict=True)] == files


def test_a_tar_without_an_index_is_one_shard() -> None:
    Storage().write("memory://b/a.tar", tar_bytes(FILES))
    assert len(list(open_archive(SourceSpec(uri="memory://b/a.tar", split_bytes=2000), Storage()).shards())) == 1


def test_an_index_of_another_tar_is_refused() -> None:
    Storage().write("memory://b/a.tar", tar_bytes(FILES))
    Storage().write("memory://b/a.idx", index_bytes(tar_bytes([("x.png", b"1" * 700), *FILES])))
    with pytest.raises(ArchiveError, match="does not match this tar"):
        members_of(SourceSpec(uri="memory://b", split_bytes=2000))


def test_loose_images_are_dealt_by_number_and_bytes(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}", "", [*FILES, ("notes.txt", b"no image")], 1)
    by_number = list(open_archive(SourceSpec(uri=str(tmp_path), shard_images=10), Storage()).shards())
    assert [shard.index for shard in by_number] == [0, 1, 2]
    by_bytes = list(open_archive(SourceSpec(uri=str(tmp_path), split_bytes=5000), Storage()).shards())
    assert max(shard.size_bytes for shard in by_bytes) <= 5000
    assert sum(shard.size_bytes for shard in by_bytes) == sum(len(data) for _, data in FILES)


def test_globs_lists_and_single_files(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    for day in ("01", "02", "03"):
        pack(f"{root}/{day}", ".tar", [(f"{day}.png", b"x")], 1)
    assert len(members_of(SourceSpec(uri=f"{root}/0[12]/*.tar"))) == 2
    listed = members_of(SourceSpec(uri=(f"{root}/03/part-0.tar", f"{root}/01")))
    assert names(listed) == ["03.png", "01.png"]
    with pytest.raises(SpecError, match="the same file twice"):
        members_of(SourceSpec(uri=(f"{root}/01", f"{root}/01/part-0.tar")))
    with pytest.raises(SpecError, match="contains nothing of format zip"):
        members_of(SourceSpec(uri=root, format="zip"))
    with pytest.raises(StorageError, match="nothing is there"):
        members_of(SourceSpec(uri=f"{root}/04"))
    (tmp_path / "a.xyz").write_bytes(b"x")
    with pytest.raises(SpecError, match="the suffix of an archive or image"):
        members_of(SourceSpec(uri=f"{root}/a.xyz"))


def test_path_patterns_fill_columns() -> None:
    files = [(f"bottle/test/{d}/{i}.png", b"i") for d in ("good", "crack") for i in range(2)]
    files += [("bottle/ground_truth/crack/0_mask.png", b"m"), ("bottle/readme/x.png", b"r")]
    Storage().write("memory://p/a.tar", tar_bytes([(f"./data/{name}", data) for name, data in files]))
    source = SourceSpec(
        uri="memory://p/a.tar",
        pattern="{category}/test/{defect}/{name}.png",
        mask_pattern="{category}/ground_truth/{defect}/{name}_mask.png",
    )
    found = members_of(source)
    assert [(m.category, m.defect, m.label) for m in found] == [
        ("bottle", "good", 0),
        ("bottle", "good", 0),
        ("bottle", "crack", 1),
        ("bottle", "crack", 1),
    ]
    assert found[0].mask_uri is None
    with fsspec.open(found[2].mask_uri) as handle:
        assert handle.read() == b"m"


def test_sidecars_fill_columns() -> None:
    files = [
        ("a.b.jpg", b"1"),
        ("a.b.json", json.dumps({"label": 1, "category": "nut", "line": 4}).encode()),
        ("a.b.mask.png", b"m"),
        ("c.png", b"2"),
        ("c.cls", b"0"),
        ("d.png", b"3"),
        ("d.json", b"not json"),
        ("e.JPEG", b"4"),
    ]
    Storage().write("memory://s/a.tar", tar_bytes(files))
    found = members_of(SourceSpec(uri="memory://s/a.tar"))
    assert names(found) == ["a.b.jpg", "c.png", "d.png", "e.JPEG"]
    assert [m.label for m in found] == [1, 0, None, None]
    assert found[0].category == "nut" and json.loads(found[0].meta)["line"] == 4
    assert found[0].mask_uri == "tar://a.b.mask.png::memory:///s/a.tar"
    assert found[2].meta == "" and found[2].notes[0].startswith("sidecar_not_read: d.json")


def test_rows_whose_names_differ_by_a_dot_and_a_slash_have_keys_of_their_own() -> None:
    Storage().write("memory://q/a.parquet", parquet_bytes([(name, b"1") for name in ("a", "./a", "./b", "./row-0")]))
    assert names(members_of(SourceSpec(uri="memory://q"))) == ["row-0", "row-1", "b", "row-3"]


def test_parquet_columns_and_the_layout_of_hugging_face() -> None:
    table = pa.table(
        {
            "image": [{"bytes": b"1", "path": "x.png"}, {"bytes": b"2", "path": None}],
            "label": [0, 3],
            "category": ["nut", None],
            "mask": [None, b"m"],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    Storage().write("memory://q/a.parquet", buffer.getvalue())
    found = members_of(SourceSpec(uri="memory://q"))
    assert names(found) == ["x.png", "row-1"]
    assert [(m.data, m.label, m.category) for m in found] == [(b"1", 0, "nut"), (b"2", 1, None)]
    for uri, expected in ((found[1].image_uri, b"2"), (found[1].mask_uri, b"m")):
        with fsspec.open(uri) as handle:
            assert handle.read() == expected
    with pytest.raises(FileNotFoundError):
        fsspec.open("parquetrow://image/7::memory:///q/a.parquet").open()
    with pytest.raises(SpecError, match="not a column of encoded images"):
        members_of(SourceSpec(uri="memory://q", image_column="label"))


@pytest.mark.parametrize(
    ("pattern", "mask", "message"),
    [
        ("{kind}/{name}.png", None, "not a field"),
        ("{name}/{name}.png", None, "twice"),
        ("{name.png", None, "unpaired brace"),
        ("{name}.png", "{category}/{name}.png", "no field {category}"),
        (None, "{name}.png", "needs source.pattern"),
    ],
)
def test_bad_patterns_are_refused(pattern: str | None, mask: str | None, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        open_archive(SourceSpec(uri="memory://p", pattern=pattern, mask_pattern=mask), Storage())


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "a//b.png", "a::b.png", "a\n.png"]
)
@pytest.mark.parametrize("packer", [tar_bytes, zip_bytes])
def test_names_that_climb_out_are_rows_with_a_status(name: str, packer: Callable[..., bytes]) -> None:
    suffix = ".tar" if packer is tar_bytes else ".zip"
    Storage().write(f"memory://u/a{suffix}", packer([("fine.png", b"1"), (name, b"2")]))
    found = members_of(SourceSpec(uri=f"memory://u/a{suffix}"))
    assert [m.status for m in found] == ["ok", "unsafe_name"]
    assert found[1].data == b"" and found[1].error


def test_links_and_devices_in_a_tar_are_never_followed() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "dev.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    Storage().write("memory://u/a.tar", buffer.getvalue())
    assert [m.status for m in members_of(SourceSpec(uri="memory://u/a.tar"))] == ["unsafe_name"] * 3


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_a_name_the_last_is_the_file(suffix: str) -> None:
    Storage().write(f"memory://d/a{suffix}", PACKERS[suffix]([("a.png", b"1"), ("b.png", b"2"), ("./a.png", b"3")]))
    found = members_of(SourceSpec(uri=f"memory://d/a{suffix}"))
    assert [(m.status, m.data) for m in found] == [("duplicate_key", b""), ("ok", b"2"), ("ok", b"3")]
    assert names(found) == ["a.png@1", "b.png", "a.png"]


@settings(max_examples=60, deadline=None)
@example(suffix=".tar.zst", cut=0.99609375)  # all images are there, the end of the frame is not
@example(suffix=".tar", cut=0.125)  # between two members
@given(suffix=st.sampled_from([".tar", ".tar.gz", ".tar.zst", ".zip", ".parquet"]), cut=st.floats(0.0, 0.999))
def test_a_truncated_container_never_invents_and_never_hides(suffix: str, cut: float) -> None:
    data = PACKERS[suffix](FILES)
    Storage().write(f"memory://t/a{suffix}", data[: int(len(data) * cut)])
    source = SourceSpec(uri=f"memory://t/a{suffix}")
    archive = open_archive(source, Storage())
    found = [m for shard in archive.shards() for m in read_members(archive, shard, source)]
    good = [m for m in found if m.status == "ok"]
    assert [(m.key.rpartition("#")[2], m.data) for m in good] == FILES[: len(good)]
    last_block = -(-len(data.rstrip(b"\0")) // 512)
    if suffix == ".tar" and int(len(data) * cut) >= (last_block + 1) * 512:
        assert len(good) == len(FILES)
        return  # one block of zeros is enough of an end
    assert found[-1].status == "bad_shard" and f"a{suffix}" in found[-1].error


def test_a_damaged_byte_in_a_compressed_tar_is_found() -> None:
    for suffix in (".tar.gz", ".tar.zst"):
        data = bytearray(PACKERS[suffix]([("a.png", bytes(range(256)) * 400)]))
        data[len(data) // 2] ^= 0x55
        Storage().write(f"memory://t/a{suffix}", bytes(data))
        source = SourceSpec(uri=f"memory://t/a{suffix}")
        archive = open_archive(source, Storage())
        found = [m for shard in archive.shards() for m in read_members(archive, shard, source)]
        assert found[-1].status == "bad_shard"


def test_on_bad_shard_fail_and_on_bad_member_fail() -> None:
    Storage().write("memory://f/a.tar", tar_bytes(FILES)[:5000])
    source = SourceSpec(uri="memory://f/a.tar", on_bad_shard="fail")
    archive = open_archive(source, Storage())
    with pytest.raises(ArchiveError, match="record"):
        list(read_members(archive, next(iter(archive.shards())), source))
    Storage().write("memory://f/b.tar", tar_bytes([("../x.png", b"1")]))
    source = SourceSpec(uri="memory://f/b.tar", on_bad_member="fail")
    archive = open_archive(source, Storage())
    with pytest.raises(BadMemberError, match="unsafe_name"):
        list(read_members(archive, next(iter(archive.shards())), source))


def test_an_encrypted_or_damaged_zip_member_is_a_row() -> None:
    data = bytearray(zip_bytes([("a.png", bytes(range(256)) * 9), ("b.png", b"fine" * 100)]))
    data[60] ^= 0xFF
    Storage().write("memory://z/a.zip", bytes(data))
    assert [m.status for m in members_of(SourceSpec(uri="memory://z/a.zip"))] == ["corrupt", "ok"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", b"1")
    locked = bytearray(buffer.getvalue())
    locked[6] |= 1
    locked[buffer.getvalue().rindex(b"PK\x01\x02") + 8] |= 1
    Storage().write("memory://z/b.zip", bytes(locked))
    found = members_of(SourceSpec(uri="memory://z/b.zip"))
    assert found[0].status == "corrupt" and "password" in found[0].error


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_of_too_many_bytes_is_not_read(suffix: str) -> None:
    pack("memory://big", suffix, [("a.png", b"1" * 100), ("b.png", b"2" * 5000)], 1)
    found = members_of(SourceSpec(uri="memory://big", max_image_bytes=1000))
    assert [(m.status, len(m.data)) for m in found] == [("ok", 100), ("too_many_bytes", 0)]


def test_a_zip_bomb_is_cut_off() -> None:
    Storage().write("memory://z/bomb.zip", zip_bytes([("a.png", bytes(50 << 20))]))
    found = members_of(SourceSpec(uri="memory://z/bomb.zip", max_image_bytes=1 << 20))
    assert [m.status for m in found] == ["too_many_bytes"]


@given(st.text(max_size=20))
def test_no_safe_name_climbs(name: str) -> None:
    try:
        safe = safe_name(name)
    except MemberError:
        return
    assert ".." not in safe.split("/") and not safe.startswith("/") and "::" not in safe


@given(st.lists(st.integers(0, 400), max_size=60), st.integers(1, 9), st.integers(1, 900))
def test_chunks_are_consecutive_bounded_and_marked(sizes: list[int], images: int, limit: int) -> None:
    shard = Shard(3, "memory:///x.tar", "tar", 1, "f")
    members = [Member(str(i), "", data=bytes(size)) for i, size in enumerate(sizes)]
    chunks = list(chunk_members(shard, iter(members), images, limit))
    assert [m for chunk in chunks for m in chunk.members] == members
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for chunk in chunks:
        assert len(chunk.members) <= images
        assert sum(len(m.data) for m in chunk.members[:-1]) < limit
        assert chunk.id.startswith("00003-")


def test_the_fingerprint_changes_when_a_byte_or_a_shard_does(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    pack(root, ".tar", FILES, 2)

    def mark() -> str:
        return archive_fingerprint(open_archive(SourceSpec(uri=root), Storage()).shards())

    first = mark()
    assert first == mark()
    Storage().write(join_uri(root, "part-1.tar"), tar_bytes([("a.png", b"1")]))
    second = mark()
    Storage().write(join_uri(root, "part-9.tar"), tar_bytes([("a.png", b"1")]))
    assert len({first, second, mark()}) == 3


def test_a_large_listing_is_the_same_listed_in_parallel(object_store: ObjectStore) -> None:
    files = [(f"{folder}/{i}.png", b"x") for folder in ("a", "b/deep", "c") for i in range(4)]
    pack(object_store.uri("many"), "", [*files, ("top.png", b"x")], 1, object_store.storage)
    found = [file.uri for file in object_store.storage.list(object_store.uri("many"))]
    assert found == sorted(object_store.uri("many", name) for name in [*(n for n, _ in files), "top.png"])


def test_a_shard_says_where_it_is() -> None:
    Storage().write("memory://w/a.tar", tar_bytes(FILES))
    shard = next(iter(open_archive(SourceSpec(uri="memory://w/a.tar"), Storage()).shards()))
    assert shard.uri == "memory:///w/a.tar" and shard.name == "00000"
    assert replace(shard, index=123).name == "00123"


def test_tars_find_their_indexes_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, count, looked = Storage(), 300, []
    for i in range(count):
        storage.write(f"memory://many/{i:04d}.tar", b"")
    storage.write("memory://many/0007.idx", b"v1.2 0\n")
    plain = tar_index.index_uri

    def counted(uri: str) -> str:
        looked.append(uri)
        return plain(uri)

    monkeypatch.setattr(tar_index, "index_uri", counted)
    shards = list(open_archive(SourceSpec(uri="memory://many"), storage).shards())
    assert len(shards) == count and len(looked) <= 2 * count
