"""Packs named bytes into tar, zip, Parquet or loose files at any URL.

`python -m tests.builders.archives FOLDER` makes the archive of the demo.
"""

import gzip
import io
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from raydetect.storage import Storage, join_uri, normalise_uri
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

Files = Sequence[tuple[str, bytes]]


def tar_bytes(files: Files) -> bytes:
    """A tar of regular files, in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: Files) -> bytes:
    """A deflated zip, in order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return buffer.getvalue()


def parquet_bytes(files: Files, rows_per_group: int = 4) -> bytes:
    """A Parquet file with the columns path and image."""
    table = pa.table({"path": [name for name, _ in files], "image": pa.array([d for _, d in files], pa.binary())})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def index_bytes(tar: bytes) -> bytes:
    """The wds2idx index of a tar whose samples have one component each."""
    lines = []
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        for info in opened:
            extension = info.name.rpartition(".")[2]
            lines.append(f"{extension} {info.offset_data} {info.size} {info.name}")
    return "\n".join([f"v1.2 {len(lines)}", *lines]).encode()


PACKERS = {
    ".tar": tar_bytes,
    ".tar.gz": lambda files: gzip.compress(tar_bytes(files), mtime=0),
    ".tar.zst": lambda files: zstandard.ZstdCompressor(write_checksum=True).compress(tar_bytes(files)),
    ".zip": zip_bytes,
    ".parquet": parquet_bytes,
}


def pack(folder: str, suffix: str, files: Files, shards: int, storage: Storage | None = None) -> list[str]:
    """Distributes files over `shards` containers, masks with their images; writes loose files if `suffix` is ""."""
    storage = storage or Storage()
    if not suffix:
        for name, data in files:
            storage.write(join_uri(folder, name), data)
        return [join_uri(folder, name) for name, _ in files]
    uris = [join_uri(folder, f"part-{i}{suffix}") for i in range(shards)]
    groups: list[list[tuple[str, bytes]]] = [[] for _ in uris]
    samples = 0
    for name, data in files:
        samples += "/ground_truth/" not in name
        groups[(samples - 1) % shards].append((name, data))
    for uri, group in zip(uris, groups, strict=True):
        storage.write(uri, PACKERS[suffix](group))
    return uris


def normal_files(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Normal images as `widget/train/good/0001.png`."""
    return [(f"widget/train/good/{i:04d}.png", encode(normal_image(i))) for i in range(start, start + count)]


def mixed_files(normal: int, per_defect: int, masks: bool = True) -> list[tuple[str, bytes]]:
    """Images as `widget/test/<defect>/0001.png`, with masks under `widget/ground_truth/`."""
    files = [(f"widget/test/good/{i:04d}.png", encode(normal_image(50_000 + i))) for i in range(normal)]
    for defect in DEFECTS:
        for i in range(per_defect):
            image, mask = defect_image(i, defect)
            files.append((f"widget/test/{defect}/{i:04d}.png", encode(image)))
            if masks:
                files.append((f"widget/ground_truth/{defect}/{i:04d}_mask.png", encode(mask)))
    return files


def main(folder: str) -> None:
    """Writes the demo's archive and prints where it is."""
    root = normalise_uri(folder)
    pack(join_uri(root, "normal"), ".tar", normal_files(240), 3)
    pack(join_uri(root, "mixed"), ".tar", mixed_files(30, 10), 3)
    print(f"Made 240 normal images in 3 tar shards: {Path(folder) / 'normal'}")
    print(f"Made 30 normal and 30 defective images in 3 tar shards: {Path(folder) / 'mixed'}")


if __name__ == "__main__":
    main(sys.argv[1])
