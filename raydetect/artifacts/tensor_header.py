"""The header of an artifact's safetensors file: which tensors are in it, of which types and shapes; without torch.

Format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetect.artifacts.record import ArtifactRecord
from raydetect.errors import ArtifactError
from raydetect.storage import Storage, join_uri

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header: `dtype` is a key of `ITEM_BYTES`; `start` and `stop` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def tensors_uri(uri: str, entry: Mapping[str, Any]) -> str:
    """Where an artifact's tensors lie.

    Raises:
        ArtifactError: the record names a file outside the artifact's folder.
    """
    file_name = str(entry["file"])
    if "/" in file_name or file_name.startswith("."):
        raise ArtifactError(f"{uri}: the record names {file_name!r}, outside the folder. Fit again.")
    return join_uri(uri, file_name)


def read_header(record: ArtifactRecord, storage: Storage) -> dict[str, TensorEntry]:
    """The tensors of an artifact by name; only the beginning of the file is read.

    Raises:
        ArtifactError: the file is missing, of another size than the record says, or its header is damaged.
        StorageError: the storage failed.
    """
    place = tensors_uri(record.uri, record.body["tensors"])
    found, size = storage.info(place), int(record.body["tensors"]["bytes"])
    if found is None or found.size_bytes != size:
        message = "is missing" if found is None else f"has {found.size_bytes} bytes, the record says {size}"
        raise ArtifactError(f"{place}: {message}. Fit again or copy it anew.")
    length = int.from_bytes(storage.read_range(place, 0, min(size, LENGTH_BYTES)), "little")
    stop = LENGTH_BYTES + length
    if size < LENGTH_BYTES or length > min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
        raise ArtifactError(f"{place}: not a safetensors file (a header of {length} bytes). Fit again.")
    return _parse(storage.read_range(place, LENGTH_BYTES, stop), stop, size, place)


def check_bank(record: ArtifactRecord, entries: Mapping[str, TensorEntry]) -> None:
    """Compares the memory bank of a header with the record's, where that has one.

    Raises:
        ArtifactError: it is another one.
    """
    bank = record.body.get("bank")
    if bank is None:
        return
    entry = entries.get(bank["tensor"])
    if entry is None or entry.dtype != "F32" or entry.shape != (bank["rows"], bank["dims"]):
        there = "is not there" if entry is None else f"is {entry.dtype} of {entry.shape}"
        raise ArtifactError(
            f"{tensors_uri(record.uri, record.body['tensors'])}: its memory bank {bank['tensor']!r} {there}, and the "
            f"record says F32 of ({bank['rows']}, {bank['dims']}). Fit again or copy it anew."
        )


def _parse(header: bytearray, data_start: int, size: int, place: str) -> dict[str, TensorEntry]:
    """Every entry of a header, each inside the file and as long as its shape says."""
    try:
        found = {}
        for name, words in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in words["data_offsets"])
            shape = tuple(int(length) for length in words["shape"])
            entry = TensorEntry(words["dtype"], shape, data_start + begin, data_start + end)
            if not 0 <= begin <= end <= size - data_start or min(shape, default=0) < 0:
                raise ValueError(f"{name!r} lies outside")
            if end - begin != math.prod(shape) * ITEM_BYTES[entry.dtype]:
                raise ValueError(f"{name!r} has {end - begin} bytes for shape {shape}")
            found[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{place}: its safetensors header is damaged ({error}). Fit again.") from None
    return found
