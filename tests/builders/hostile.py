"""Hostile archives: odd names, duplicates, sidecars and files left by operating systems."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

from tests.builders.archives import Files

PNG = b"\x89PNG\r\n\x1a\n"
FOLDERS = (
    "",
    "good/",
    "./",
    "a b/",
    "[x]/",
    "M\u00fcll/",
    "Mu\u0308ll/",
    "__MACOSX/",
    ".git/",
    "50%/",
    "#1/",
    "a?b*/",
    "../",
    "/abs/",
)
STEMS = (
    "0",
    "1",
    "0.left",
    "0.right",
    "image 1",
    "caf\u00e9",
    "cafe\u0301",
    "a#b",
    "a%20b",
    "a[1]",
    "q?",
    "s*",
    "a::b",
    "b\\c",
    "._0",
)
SUFFIXES = (".png", ".PNG", ".jpg", ".jfif", ".json", ".cls", ".mask.png", ".txt", ".tar.bz2", "")
SIDECARS = (
    b"1",
    b"{}",
    b"[" * 3000,
    b'{"label": null, "category": "\\ud83d"}',
    b'{"label": 1e400}',
    b"\xff\xfe",
    b'{"label": "good"}',
)
BYTES_ONLY = "Gr\udcf6\udcdfe"  # Latin-1 bytes in a name that should be UTF-8


def names(with_bytes: bool = False) -> st.SearchStrategy[str]:
    """Member names; with `with_bytes`, also names that are not valid UTF-8, for containers that support them."""
    stems = st.sampled_from((*STEMS, BYTES_ONLY) if with_bytes else STEMS)
    return st.builds(lambda f, s, e: f + s + e, st.sampled_from(FOLDERS), stems, st.sampled_from(SUFFIXES))


def contents(name: str, number: int) -> bytes:
    """Bytes that identify their file: images start like a PNG, sidecars are hostile."""
    lower = name.lower()
    if lower.endswith((".json", ".cls")):
        return SIDECARS[number % len(SIDECARS)]
    return PNG + number.to_bytes(4, "big") + b"x" * (number % 700)


def files(with_bytes: bool = False, unique: bool = False, most: int = 12) -> st.SearchStrategy[Files]:
    """Named bytes, with duplicate names unless `unique`."""
    found = st.lists(names(with_bytes), min_size=1, max_size=most, unique=unique)
    return found.map(lambda given: [(name, contents(name, i)) for i, name in enumerate(given)])


def tar_of(packed: Files) -> bytes:
    """A GNU tar, whose names may be arbitrary bytes."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, data in packed:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(packed: Files) -> bytes:
    """A zip, possibly with duplicate names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in packed:
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def lay_out(folder: Path, packed: Files) -> int:
    """Writes the files to a local folder where the file system allows their names; returns the number of files."""
    for name, data in packed:
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            continue
        path = folder / name
        if path.is_dir() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return sum(path.is_file() for path in folder.rglob("*"))


def parts(data: bytes, count: int) -> Sequence[int]:
    """Values of `split_bytes` that split a container with these bytes into 1 to `count` parts."""
    return sorted({-(-len(data) // i) for i in range(1, count + 1)})
