"""Refusals and broken responses of a store are never reported as damaged data, for every format."""

import contextlib
import io
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from raydetect.archives.chunks import read_members
from raydetect.archives.open import open_archive
from raydetect.config import SourceSpec
from raydetect.errors import ChangedError, SpecError, StorageError
from raydetect.records import Member
from raydetect.storage import Storage, normalise_uri
from tests.builders.archives import PACKERS, index_bytes, pack, tar_bytes, zip_bytes
from tests.builders.hostile import PNG
from tests.objectstore import ObjectStore
from tests.objectstore.fault_proxy import REFUSALS, SHORT_BODIES, FaultPlan, faulty

ANSWERS = ("internal_error", "slow_down", "forbidden", "expired", "drop", *SHORT_BODIES)
FILES = [(f"{i:02d}.png", PNG + random.Random(i).randbytes(5000)) for i in range(6)]
LARGE = [(f"{i:02d}.png", PNG + random.Random(i).randbytes(40_000)) for i in range(8)]
SUFFIXES = [*PACKERS, ""]


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first response counts; test_storage covers the retries of the libraries."""
    monkeypatch.setattr("raydetect.storage.files.S3_ATTEMPTS", 1)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)


def read(store: ObjectStore, uri: str) -> list[Member]:
    source = SourceSpec(uri=uri)
    archive = open_archive(source, store.storage)
    return [member for shard in archive.shards() for member in read_members(archive, shard, source)]


def gets(name: str) -> Callable[[str, str], bool]:
    return lambda method, path: method == "GET" and name in path and "list-type" not in path and "prefix" not in path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_response_ends_the_job_and_is_not_damage(object_store: ObjectStore, suffix: str) -> None:
    pack(object_store.uri("day"), suffix, FILES, 2, object_store.storage)
    whole = read(object_store, object_store.uri("day"))
    assert len(whole) == len(FILES) and all(member.status == "ok" for member in whole)
    plan = FaultPlan(matches=gets("day"))
    with faulty(object_store, plan) as store:
        for answer in ANSWERS:
            plan.always = answer
            with pytest.raises(StorageError) as caught:
                read(store, store.uri("day"))
            assert "day" in str(caught.value) and "\n" not in str(caught.value)
            assert caught.value.exit_code == 1 and plan.injected[answer]
        plan.always = "without_length"
        assert read(store, store.uri("day")) == whole
        plan.always = None
        assert read(store, store.uri("day")) == whole


@pytest.mark.parametrize("answer", ["expired", "slow_down", "forbidden", "drop", "shorter"])
@pytest.mark.parametrize("suffix", [".zip", ".parquet", ".tar", ""])
def test_a_failure_in_the_middle_of_a_container_is_not_damage(
    object_store: ObjectStore, suffix: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("raydetect.storage.files.READ_BLOCK_BYTES", "raydetect.archives.formats.tar.COPY_BYTES"):
        monkeypatch.setattr(name, 4096)  # so that one container takes many requests
    pack(object_store.uri("mid"), suffix, LARGE, 1, object_store.storage)
    whole = read(object_store, object_store.uri("mid"))
    requests = 0

    def later(method: str, path: str) -> bool:
        nonlocal requests
        requests += gets("mid")(method, path)
        return gets("mid")(method, path) and requests > 1

    with faulty(object_store, FaultPlan(always=answer, matches=later)) as store:
        if answer == "shorter":  # fewer bytes than requested may still be enough; then nothing is lost
            with contextlib.suppress(StorageError):
                assert read(store, store.uri("mid")) == whole
        else:
            with pytest.raises(StorageError):
                read(store, store.uri("mid"))
    assert requests > 1


def test_a_short_response_for_an_index_is_not_damage_of_its_tar(object_store: ObjectStore) -> None:
    tar, storage = tar_bytes(LARGE), object_store.storage
    storage.write(object_store.uri("parted", "a.tar"), tar)
    storage.write(object_store.uri("parted", "a.idx"), index_bytes(tar))
    source = SourceSpec(uri=object_store.uri("parted"), split_bytes=100_000)
    with faulty(object_store, FaultPlan(matches=gets("a.idx"))) as store:
        archive = open_archive(source, store.storage)
        shards = list(archive.shards())
        assert len(shards) == 4 and all(shard.index_uri for shard in shards)
    for answer in SHORT_BODIES:
        with faulty(object_store, FaultPlan(always=answer, matches=gets("a.idx"))) as store:
            archive = open_archive(source, store.storage)
            for work in (archive.listing, lambda archive=archive: list(read_members(archive, shards[1], source))):
                with pytest.raises(StorageError, match=r"a\.idx"):
                    work()


@pytest.mark.parametrize("answer", ["archived", "forbidden"])
@pytest.mark.parametrize("suffix", [".zip", ".parquet", ".tar", ""])
def test_one_unreadable_object_is_a_row_if_others_can_be_read(
    object_store: ObjectStore, suffix: str, answer: str
) -> None:
    for name in ("a", "b", "c"):
        pack(
            object_store.uri("day", name) if suffix else object_store.uri("day"),
            suffix,
            [(f"{name}.png", PNG)],
            1,
            object_store.storage,
        )
    plan = FaultPlan(always=answer, matches=gets("b/part" if suffix else "b.png"))
    with faulty(object_store, plan) as store:
        found = read(store, store.uri("day"))
        assert [member.status for member in found] == ["ok", "unreadable", "ok"]
        assert found[1].error and "\n" not in found[1].error
        plan.matches = gets("day")
        if answer == "forbidden":
            with pytest.raises(StorageError, match="refused"):
                read(store, store.uri("day"))
    assert REFUSALS[answer][0].startswith("403")
    assert [member.status for member in read(object_store, object_store.uri("day"))] == ["ok"] * 3


@pytest.mark.parametrize("kind", ["file", "memory", "s3"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip", ".parquet", ""])
def test_a_shard_that_changed_since_it_was_listed_is_not_read(
    kind: str, suffix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage, root = Storage(), f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path / "day")
    if kind == "s3":
        store: ObjectStore = request.getfixturevalue("object_store")
        storage, root = store.storage, store.uri("day")
    root = normalise_uri(root)
    pack(root, suffix, FILES, 1, storage)
    archive = open_archive(SourceSpec(uri=root), storage)
    shard = next(archive.shards())
    assert len(list(archive.read(shard))) == len(FILES)
    pack(root, suffix, [(name, data[:-1] + b"!") for name, data in FILES], 1, storage)
    with pytest.raises(ChangedError, match="has changed since it was listed"):
        list(archive.read(shard))
    assert len(list(archive.read(next(archive.shards())))) == len(FILES)


@pytest.mark.parametrize("packer", [tar_bytes, zip_bytes])
def test_a_shard_that_grows_while_it_is_read_is_not_kept(packer: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / ("a.tar" if packer is tar_bytes else "a.zip")
    path.write_bytes(packer(FILES))
    archive = open_archive(SourceSpec(uri=str(path)), Storage())
    reading: Iterator[Member] = archive.read(next(archive.shards()))
    next(reading)
    _append(path)
    with pytest.raises(ChangedError):
        list(reading)


def _append(path: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "a") as grown:
            grown.writestr("new.png", PNG)
        return
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("new.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))


def test_a_presigned_url_is_refused_without_its_signature() -> None:
    for uri in (
        "https://b.s3.amazonaws.com/day.tar?X-Amz-Algorithm=AWS4&X-Amz-Signature=c0ffee",
        "https://x.blob.core.windows.net/c/day.tar?sv=2020&sig=c0ffee",
        "s3://b/day.tar?AWSAccessKeyId=c0ffee&Signature=c0ffee",
    ):
        with pytest.raises(SpecError, match="presigned") as caught:
            open_archive(SourceSpec(uri=uri), Storage())
        assert "c0ffee" not in str(caught.value)


def test_keys_with_doubled_and_leading_slashes_are_read(object_store: ObjectStore) -> None:
    fs, _ = object_store.storage.filesystem(object_store.uri())
    names = ["x//b.png", "/c.png", "a[1] *?.png", "50% #1.png", "x/./d.png", "x/../e.png", "f::g.png"]
    for name in names:
        fs.call_s3("put_object", Bucket=object_store.bucket, Key=f"in/{name}", Body=PNG)
    found = read(object_store, object_store.uri("in"))
    statuses = {member.key.partition("#")[2]: member.status for member in found}
    assert statuses == {name: "unsafe_name" if name in names[4:] else "ok" for name in names}
    for member in found:
        if member.status == "ok":
            assert object_store.storage.read(member.image_uri) == PNG
    wrong_bucket = replace(object_store, bucket="no-such-bucket-anywhere")
    with pytest.raises(StorageError) as caught:
        read(wrong_bucket, wrong_bucket.uri("in"))
    assert caught.value.exit_code == 2
