"""An archive with every format and hostile content: whole jobs must account for all of its files."""

import gzip
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import zstandard

from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.builders.archives import Files, index_bytes, parquet_bytes
from tests.builders.hostile import BYTES_ONLY, FOLDERS, STEMS, SUFFIXES, contents, lay_out, tar_of, zip_of
from tests.builders.images import encode, normal_image
from tests.objectstore import ObjectStore
from tests.whole_jobs.runs import rows_of

SIZE_PX = 32
BLOCK = 512  # of a tar
TAIL = b"bytes that are no tar " * 40
HOSTILE_NAMES = 18  # per container, so that every folder, stem and suffix occurs at least once
PACKERS: dict[str, Callable[[Files], bytes]] = {
    "line #1 [a].tar": lambda packed: tar_of(packed) + TAIL,
    "night/50% b.tar.gz": lambda packed: gzip.compress(tar_of(packed), mtime=0),
    "c?*.TGZ": lambda packed: gzip.compress(tar_of(packed) + TAIL, mtime=0),
    "d.tar.zst": lambda packed: zstandard.ZstdCompressor(write_checksum=True).compress(tar_of(packed)),
    "M\u00fcll/e.zip": zip_of,
    "f.parquet": lambda packed: parquet_bytes(packed, 7),
}
TAILS = 2
# Duplicate names; sidecars before, next to and far behind their image, or without one; damaged and system files.
FIXED_NAMES = (
    "far.cls", "twice/p.png", "twice/p.json", "./twice/p.png", "twice/p.json", "r.left.png", "r.json",
    "r.left.mask.png", "far.jpg", "good/picture", "good/README", "empty.png", "cut.png", "cut.jpg", "text.jpg",
    "lonely.json", "Thumbs.db", "__MACOSX/._far.jpg", "notes.txt", "inner.tar.bz2", "r.cls",
)  # fmt: skip
REASONS = {
    "sidecar", "sidecar_without_image", "hidden", "other_suffix", "no_suffix", "unknown_container", "index",
    "replaced", "bytes_after_end",
}  # fmt: skip
STATUSES = {"ok", "unsafe_name", "duplicate_key", "empty", "not_an_image", "corrupt", "bad_shard"}


@dataclass(frozen=True)
class AllFormats:
    """The content of an archive, not yet written.

    Attributes:
        containers: bytes by name, relative to the root.
        loose: other files; depending on their names, a disk or bucket can hold only some of them.
        held: number of entries in containers: their files, bytes after their ends, and breaks.
        pictures: number of files in containers by sha256.
    """

    containers: dict[str, bytes]
    loose: Files
    held: int
    pictures: Counter[str]

    def upload(self, store: ObjectStore, folder: str) -> "Laid":
        """Uploads the archive to a folder of a bucket, whose keys may be any valid UTF-8."""
        fs, _ = store.storage.filesystem(store.uri())
        loose = [(name, data) for name, data in self.loose if BYTES_ONLY not in name]
        for name, data in [*self.containers.items(), *loose]:
            fs.call_s3("put_object", Bucket=store.bucket, Key=f"{folder}/{name}", Body=data)
        return Laid(store.uri(folder), self.held + len(loose), self.pictures + digests(self.loose))

    def write(self, folder: Path) -> "Laid":
        """Writes the archive to a local folder, where the file system allows its names."""
        for name, data in self.containers.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        there = lay_out(folder, self.loose) - len(self.containers)
        return Laid(str(folder), self.held + there, self.pictures + digests(self.loose))


@dataclass(frozen=True)
class Laid:
    """A written archive.

    Attributes:
        uri: URI of its root.
        members: number of all its files, in containers or loose, each of which must be a row or left out.
        pictures: number of files by sha256.
    """

    uri: str
    members: int
    pictures: Counter[str]


def all_formats(seed: int) -> AllFormats:
    """Generates the archive for a seed."""
    rng = random.Random(seed)
    containers: dict[str, bytes] = {}
    held, packed_in_all = TAILS, list[tuple[str, bytes]]()
    for turn, (name, packer) in enumerate(PACKERS.items()):
        names = [*_hostile_names(rng), *FIXED_NAMES]
        if not name.endswith((".tar", ".gz", ".TGZ", ".zst")):  # other formats only support UTF-8 names
            names = [entry.replace(BYTES_ONLY, "Gruss") for entry in names]
        packed = _filled(rng.sample(names, len(names)), 1000 * seed + 100 * turn)
        containers[name] = packer(packed)
        held += len(packed)
        packed_in_all += packed
    plain = _filled([f"{i}.png" for i in range(9)], 1000 * seed + 700)
    containers["plain.tar"] = tar_of(plain)
    cut = _filled(["before.png"], 1000 * seed + 800)
    containers["cut.tar"] = tar_of(cut)[: BLOCK - len(cut[0][1]) // -BLOCK * BLOCK]  # before the final blocks of zeros
    containers["broken.zip"] = b"PK\3\4 and no directory"
    containers[".git/kept.tar"] = tar_of(plain)  # hidden, so it counts as one file
    held += len(plain) + len(cut) + 1 + 1 + 1  # the truncated, the broken and the hidden container
    loose = [f"loose/{name}" for name in dict.fromkeys([*_hostile_names(rng), *FIXED_NAMES])]
    loose.remove("loose/./twice/p.png")  # the same path as without `./` on a disk
    beside = [
        *_filled(loose, 1000 * seed + 900),
        ("plain.idx", index_bytes(containers["plain.tar"])),
        ("old.7z", b"7z"),
    ]
    return AllFormats(containers, beside, held, digests([*packed_in_all, *plain, *cut]))


def _hostile_names(rng: random.Random) -> Iterator[str]:
    name_parts: list[Sequence[str]] = [rng.sample(kind, len(kind)) for kind in (FOLDERS, (*STEMS, "b.l"), SUFFIXES)]
    for i in range(HOSTILE_NAMES):
        folder, stem, suffix = (kind[i % len(kind)] for kind in name_parts)
        yield folder + (BYTES_ONLY if i == 0 else stem) + suffix


def _filled(names: Sequence[str], number: int) -> Files:
    return [(name, _bytes_of(name, number + i)) for i, name in enumerate(names)]


def _bytes_of(name: str, number: int) -> bytes:
    """Content that matches the name: an image, possibly damaged, a sidecar, or something else."""
    base, lower = name.rpartition("/")[2], name.lower()
    if base in ("empty.png", "text.jpg"):
        return b"" if base == "empty.png" else b"no picture, but text\n" + number.to_bytes(4, "big")
    if lower.endswith((".json", ".cls")):
        return contents(name, number)
    if lower.endswith((".txt", ".bz2", ".db")) or base == "README":
        return b"words " + number.to_bytes(4, "big")
    kind = "JPEG" if lower.endswith((".jpg", ".jfif")) else "PNG"
    data = encode(normal_image(number, SIZE_PX), kind)
    return data[: len(data) // 2] if base.startswith("cut.") else data


def digests(files: Files) -> Counter[str]:
    """Number of files by sha256."""
    return Counter(hashlib.sha256(data).hexdigest() for _, data in files)


def conserved(results: str, storage: Storage, laid: Laid) -> list[dict[str, Any]]:
    """Checks a finished job: no file is lost or duplicated, and every row's URI opens its image.

    Returns:
        The rows, sorted by key.
    """
    rows, manifest = rows_of(results, storage), Ledger(results, storage).manifest()
    assert manifest is not None
    left_out = sum(entry["count"] for entry in manifest["left_out"].values())
    assert len(rows) + left_out == laid.members, manifest["left_out"]
    assert manifest["rows"] == len(rows) and manifest["statuses"] == dict(Counter(row["status"] for row in rows))
    scored = [row for row in rows if row["sha256"]]
    assert {row["key"] for row in rows if row["status"] == "ok"} <= {row["key"] for row in scored}
    assert Counter(row["sha256"] for row in scored) <= laid.pictures
    for row in scored:
        assert hashlib.sha256(opened(row["image_uri"], storage)).hexdigest() == row["sha256"], row["image_uri"]
    print(f"{laid.members} members = {len(rows)} rows + {left_out} left out; {len(scored)} opened by their URI")
    return rows


def opened(uri: str, storage: Storage) -> bytes:
    """Reads a row's URI with fsspec and the options of a storage."""
    container = uri.rpartition("::")[2]
    scheme = container.partition("://")[0]
    options = storage.fsspec_options(container)
    with fsspec.open(uri, **({scheme: options} if "::" in uri else options)) as handle:
        return bytes(handle.read())
