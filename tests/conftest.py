"""Fixtures of all tests: the object store, and where real data is."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tests.objectstore import ObjectStore
from tests.objectstore.moto_server import running_moto
from tests.objectstore.swift import is_installed, running_swift

TOGETHER = "together"
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_ADDRESS"):
    os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs first and one after another, as they wait more than they compute; beside them file by file."""
    items.sort(key=lambda item: TOGETHER not in item.path.parts)
    for item in items:
        case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
        name = TOGETHER if TOGETHER in item.path.parts else f"{item.path.stem} {getattr(case, 'name', '')}"
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def running_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Swift where it is installed, else moto's server; RAYDETECT_STORE=swift or moto demands one of them."""
    wanted = os.environ.get("RAYDETECT_STORE") or ("swift" if is_installed() else "moto")
    if wanted == "swift":
        with running_swift(tmp_path_factory.mktemp("swift")) as store:
            yield store
    elif wanted == "moto":
        with running_moto() as store:
            yield store
    else:
        raise ValueError(f"RAYDETECT_STORE={wanted}: is neither swift nor moto")


@pytest.fixture
def object_store(running_store: ObjectStore) -> ObjectStore:
    """The store with a fresh bucket."""
    store = replace(running_store, bucket=f"test-{uuid.uuid4().hex[:12]}")
    fs, _ = store.storage.filesystem(store.uri())
    fs.call_s3("create_bucket", Bucket=store.bucket)
    return store


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real image sets."""
    return _folder("RAYDETECT_DATA", "real images")


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """ImageNet ResNet-18 weights up to layer3."""
    return _folder("RAYDETECT_WEIGHTS", "real weights") / "resnet18_imagenet_layer1-3.safetensors"


def _folder(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{what} are not part of the project; set {variable} to the folder that holds them")
    return Path(value)


@pytest.fixture(autouse=True)
def _fresh_memory_filesystem() -> Iterator[None]:
    """`memory://` is one per process; every test begins with an empty one."""
    yield
    fsspec.filesystem("memory").store.clear()
