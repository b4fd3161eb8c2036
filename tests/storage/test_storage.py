"""Storage: URIs, reading and writing on every kind of storage, and transient faults of an object store."""

import os
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydetect.config import StorageOptions
from raydetect.errors import SpecError, StorageError
from raydetect.storage import Storage, join_uri, normalise_uri, relative_to
from tests.objectstore import ObjectStore, free_port
from tests.objectstore.fault_proxy import FAULTS, FaultPlan, faulty

DATA = bytes(range(256)) * 4096


@pytest.mark.parametrize(
    ("given_uri", "expected"),
    [
        ("s3://bucket//a/./b/", "s3://bucket/a/b"),
        ("/tmp/x/../y", "file:///tmp/y"),
        ("file:///tmp//a/", "file:///tmp/a"),
        ("memory://a/b", "memory:///a/b"),
        ("file:/tmp/a", "file:///tmp/a"),
        ("file://localhost/tmp/a", "file:///tmp/a"),
        ("file:name", f"file://{os.getcwd()}/file:name"),  # a file name in the current folder
    ],
)
def test_uris_are_normalised(given_uri: str, expected: str) -> None:
    assert normalise_uri(given_uri) == expected


@pytest.mark.parametrize(
    "given_uri",
    ["", "s3://", "s3://b/../c", "zip://a::file:///x", "simplecache::s3://b/c", "ftp://host/x", "python://a"],
)
def test_a_dangerous_uri_is_refused(given_uri: str) -> None:
    with pytest.raises(SpecError):
        normalise_uri(given_uri)


@given(st.text(alphabet="ab./:%~ ", max_size=30))
def test_no_normalised_uri_climbs_or_chains(text: str) -> None:
    try:
        uri = normalise_uri("s3://bucket/" + text)
    except SpecError:
        return
    assert ".." not in uri.split("/") and "::" not in uri and uri.startswith("s3://bucket")
    assert normalise_uri(uri) == uri


def test_relative_to_refuses_a_sibling() -> None:
    assert relative_to("s3://b/a/x/y", "s3://b/a") == "x/y"
    with pytest.raises(StorageError, match="not below"):
        relative_to("s3://b/ab/x", "s3://b/a")


@pytest.mark.parametrize("kind", ["file", "memory", "s3"])
def test_what_is_written_is_read_and_listed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage, root = Storage(), f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path)
    if kind == "s3":
        store: ObjectStore = request.getfixturevalue("object_store")
        storage, root = store.storage, store.uri("folder")
    root = normalise_uri(root)
    for name in ("b/2.bin", "a/1.bin", "a/x.txt"):
        storage.write(join_uri(root, name), DATA + name.encode())
    assert storage.read(join_uri(root, "b/2.bin")) == DATA + b"b/2.bin"
    assert [relative_to(f.uri, root) for f in storage.list(root)] == ["a/1.bin", "a/x.txt", "b/2.bin"]
    assert [relative_to(f.uri, root) for f in storage.glob(join_uri(root, "*/*.bin"))] == ["a/1.bin", "b/2.bin"]
    with storage.open(join_uri(root, "a/1.bin")) as handle:
        handle.seek(1000)
        assert handle.read(10) == DATA[1000:1010]
    before = storage.info(join_uri(root, "a/1.bin"))
    time.sleep(0.01)
    storage.write(join_uri(root, "a/1.bin"), b"other")
    after = storage.info(join_uri(root, "a/1.bin"))
    assert before is not None and after is not None and before.fingerprint != after.fingerprint
    storage.delete(join_uri(root, "a/1.bin"))
    storage.delete(join_uri(root, "a/1.bin"))
    assert not storage.exists(join_uri(root, "a/1.bin"))
    with pytest.raises(StorageError, match="not found"):
        storage.read(join_uri(root, "a/1.bin"))
    where = "the path" if kind == "file" else "the bucket and the path"
    with pytest.raises(StorageError, match=f"nothing is there. Check {where}."):
        list(storage.list(join_uri(root, "nowhere")))


def test_a_local_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        Storage().write(f"file://{tmp_path}/taken", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_survive_bounded_faults(object_store: ObjectStore, fault: str) -> None:
    uri = object_store.uri("data.bin")
    object_store.storage.write(uri, DATA)
    plan = FaultPlan(matches=lambda method, path: "data.bin" in path and method == "GET")
    with faulty(object_store, plan) as store:
        storage = store.storage
        plan.waiting = deque([fault] * (1 if fault == "slow" else 2))
        assert storage.read(uri) == DATA
        plan.waiting = deque([fault, fault])
        with storage.open(uri) as handle:
            assert b"".join(iter(lambda: handle.read(300_000), b"")) == DATA
    plan.waiting.clear()
    assert plan.injected[fault] == (2 if fault == "slow" else 4)  # a slow response succeeds at the first attempt


@pytest.mark.parametrize("fault", ["slow_down", "drop"])
def test_writes_survive_bounded_faults(object_store: ObjectStore, fault: str) -> None:
    uri = object_store.uri("written.bin")
    plan = FaultPlan(deque([fault, fault]), matches=lambda method, path: method == "PUT")
    with faulty(object_store, plan) as store:
        store.storage.write(uri, DATA)
    assert plan.injected[fault] == 2
    assert object_store.storage.read(uri) == DATA


def test_a_storage_that_never_recovers_raises_an_error_of_one_sentence(object_store: ObjectStore) -> None:
    uri = object_store.uri("data.bin")
    object_store.storage.write(uri, DATA)
    with faulty(object_store, FaultPlan(deque(["truncate"] * 1000))) as store, pytest.raises(StorageError) as caught:
        store.storage.read(uri)
    assert uri in str(caught.value) and "\n" not in str(caught.value)


def test_permanent_failures_say_what_to_do_and_no_secret(object_store: ObjectStore) -> None:
    wrong_key = replace(object_store, key="nobody:nobody", secret="top-secret-value")
    unreachable = replace(object_store, endpoint_url=f"http://127.0.0.1:{free_port()}")
    cases = [(unreachable, object_store.uri("x"), "cannot be reached")]
    if object_store.kind == "swift":  # moto accepts any key
        cases.append((wrong_key, object_store.uri("x"), "refused"))
    for store, uri, expected in cases:
        started = time.monotonic()
        with pytest.raises(StorageError, match=expected) as caught:
            store.storage.read(uri)
        assert time.monotonic() - started < 20
        assert "top-secret-value" not in str(caught.value)
    with pytest.raises(StorageError, match=r"nothing is there|does not exist"):
        list(object_store.storage.list("s3://no-such-bucket-anywhere/x"))


def test_credentials_may_come_from_a_profile(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.storage.write(object_store.uri("x"), b"1")
    file = tmp_path / "credentials"
    file.write_text(f"[line4]\naws_access_key_id={object_store.key}\naws_secret_access_key={object_store.secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    options = StorageOptions(endpoint_url=object_store.endpoint_url, profile="line4", region="us-east-1")
    assert Storage(options).read(object_store.uri("x")) == b"1"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret)
    options = StorageOptions(endpoint_url=object_store.endpoint_url, region="us-east-1")
    assert Storage(options).read(object_store.uri("x")) == b"1"


def test_a_large_object_is_uploaded_in_parts(object_store: ObjectStore) -> None:
    data = os.urandom(1 << 20) * 70
    object_store.storage.write(object_store.uri("large"), data)
    assert object_store.storage.read(object_store.uri("large")) == data
