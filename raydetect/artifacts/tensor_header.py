"""Reads the header of an artifact's safetensors file, with names, types and shapes of the tensors, without torch.

Format: length n as 8 bytes, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; then the data.
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
MAX_HEADER_BYTES = 100_000_000  # limit of the format
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header: `dtype` is a key of `ITEM_BYTES`; `start` and `stop` are offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def tensors_uri(uri: str, entry: Mapping[str, Any]) -> str:
    """Returns the URI of an artifact's tensors.

    Raises:
        ArtifactError: the record names a file outside the artifact's folder, or shares those of a fleet and is in none.
    """
    file_name = str(entry["file"])
    if "/" in file_name or file_name.startswith("."):
        raise ArtifactError(f"{uri}: the record names {file_name!r}, outside the folder. Fit again.")
    if not entry.get("shared"):
        return join_uri(uri, file_name)
    fleet, _, folder = uri.rstrip("/").rpartition("/categories/")
    if not fleet or "/" in folder:
        raise ArtifactError(
            f"{uri}: its tensors are those of a fleet, and the folder is not in one. Copy the whole fleet, and name "
            "the category's folder in it."
        )
    return join_uri(fleet, file_name)


def read_header(record: ArtifactRecord, storage: Storage) -> dict[str, TensorEntry]:
    """Reads the tensor entries of an artifact by name; reads only the beginning of the file.

    Raises:
        ArtifactError: the file is missing, its size differs from the record, or its header is damaged.
        StorageError: the storage failed.
    """
    uri = tensors_uri(record.uri, record.body["tensors"])
    info, size = storage.info(uri), int(record.body["tensors"]["bytes"])
    if info is None or info.size_bytes != size:
        message = "is missing" if info is None else f"has {info.size_bytes} bytes, the record says {size}"
        raise ArtifactError(f"{uri}: {message}. Fit again or copy the file again.")
    length = int.from_bytes(storage.read_range(uri, 0, min(size, LENGTH_BYTES)), "little")
    stop = LENGTH_BYTES + length
    if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise ArtifactError(f"{uri}: not a safetensors file (a header of {length} bytes). Fit again.")
    return _parse(storage.read_range(uri, LENGTH_BYTES, stop), stop, size, uri)


def check_bank(record: ArtifactRecord, entries: Mapping[str, TensorEntry]) -> None:
    """Compares the memory bank in a header with the record, if the record has one.

    Raises:
        ArtifactError: the bank is missing or its type or shape differs.
    """
    bank = record.body.get("bank")
    if bank is None:
        return
    entry = entries.get(bank["tensor"])
    if entry is None or entry.dtype != "F32" or entry.shape != (bank["rows"], bank["dims"]):
        found = "is missing" if entry is None else f"is {entry.dtype} of {entry.shape}"
        raise ArtifactError(
            f"{tensors_uri(record.uri, record.body['tensors'])}: its memory bank {bank['tensor']!r} {found}, but the "
            f"record says F32 of ({bank['rows']}, {bank['dims']}). Fit again or copy the file again."
        )


def _parse(header: bytearray, data_start: int, size: int, uri: str) -> dict[str, TensorEntry]:
    """Parses a header and checks that each tensor lies inside the file and has the size of its shape."""
    try:
        entries = {}
        for name, fields in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in fields["data_offsets"])
            shape = tuple(int(length) for length in fields["shape"])
            entry = TensorEntry(fields["dtype"], shape, data_start + begin, data_start + end)
            if not 0 <= begin <= end <= size - data_start or min(shape, default=0) < 0:
                raise ValueError(f"{name!r} lies outside")
            if end - begin != math.prod(shape) * ITEM_BYTES[entry.dtype]:
                raise ValueError(f"{name!r} has {end - begin} bytes for shape {shape}")
            entries[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{uri}: its safetensors header is damaged ({error}). Fit again.") from None
    return entries
