"""Fixtures of all tests: the object store, and where real data is."""

import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.objectstore import ObjectStore
from tests.objectstore.moto_server import running_moto
from tests.objectstore.swift import is_installed, running_swift

TOGETHER, LAWS = "tests/whole_jobs/", "tests/contracts/"
LONG = tuple(f"{TOGETHER}test_{name}.py" for name in ("fit", "same_rows", "all_detectors", "bottle"))
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets the other test process starve a job's workers
for name in ("RAY_USAGE_STATS_ENABLED", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
    os.environ.setdefault(name, "0")  # processes with nothing to do in a cluster of the tests
for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_ADDRESS"):
    os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs first, the longest before the others: what is short fills the gaps at the end."""
    items.sort(key=lambda item: (_turn(item.nodeid), _room(item.nodeid) if item.nodeid.startswith(LAWS) else ""))


def _room(nodeid: str) -> str:
    """What one test process does on its own: a file, but of the laws those of one case."""
    path, _, words = nodeid.partition("::")
    case = words.partition("[")[2].rstrip("]")
    return f"{path} {re.sub(r'^size[0-9]-', '', case)}" if path.startswith(LAWS) else path


def _turn(nodeid: str) -> int:
    """When a test has its turn."""
    path = nodeid.partition("::")[0]
    return LONG.index(path) if path in LONG else len(LONG) + (not path.startswith(TOGETHER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: file by file, but the laws case by case."""
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _room(nodeid)

    return Rooms(config, log)


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one thread, so that sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_memory_filesystem() -> Iterator[None]:
    """`memory://` is one per process; every test begins with an empty one."""
    yield
    fsspec.filesystem("memory").store.clear()
