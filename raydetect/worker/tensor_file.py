"""A safetensors file read in parts: the header, then only the bytes of what is wanted. Nothing is unpickled.

Format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydetect.artifact_record import ArtifactRecord
from raydetect.errors import ArtifactError, StorageError
from raydetect.storage import RANGE_BYTES, Storage, join_uri

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def tensors_uri(uri: str, entry: Mapping[str, Any]) -> str:
    """Where an artifact's tensors lie.

    Raises:
        ArtifactError: the record names a file outside the artifact's folder.
    """
    file_name = str(entry["file"])
    if "/" in file_name or file_name.startswith("."):
        raise ArtifactError(f"{uri}: the record names {file_name!r}, outside the folder. Fit again.")
    return join_uri(uri, file_name)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; `start` and `stop` are bytes of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open file: where it is, and what its header says.

    The sha256 of the record covers the whole file and cannot be checked on a part of it; size and header are. Someone
    must call `verify` once for the whole, which is a stream in bounded memory.
    """

    uri: str
    storage: Storage
    entries: Mapping[str, TensorEntry]
    sha256: str

    @classmethod
    def of(cls, record: ArtifactRecord, storage: Storage) -> "TensorFile":
        """Reads the header of an artifact's tensors.

        Raises:
            ArtifactError: the file is missing, of another size than the record says, or its header is damaged.
        """
        place = tensors_uri(record.uri, record.body["tensors"])
        try:
            found = storage.info(place)
            size = int(record.body["tensors"]["bytes"])
            if found is None or found.size_bytes != size:
                said = "is missing" if found is None else f"has {found.size_bytes} bytes, the record says {size}"
                raise ArtifactError(f"{place}: {said}. Fit again or copy it anew.")
            length = int.from_bytes(storage.read_range(place, 0, LENGTH_BYTES), "little")
            data_start = LENGTH_BYTES + length
            if length > min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
                raise ArtifactError(f"{place}: not a safetensors file (a header of {length} bytes). Fit again.")
            header = storage.read_range(place, LENGTH_BYTES, data_start)
        except StorageError as error:
            raise ArtifactError(f"the artifact is incomplete: {error} Fit again.") from None
        return cls(place, storage, _parse(header, data_start, size, place), record.body["tensors"]["sha256"])

    def verify(self) -> None:
        """Reads the whole file once and compares its sha256.

        Raises:
            ArtifactError: it is another one.
            StorageError: it cannot be read.
        """
        total = hashlib.sha256()
        with self.storage.open(self.uri) as handle:
            while part := handle.read(RANGE_BYTES):
                total.update(part)
        if total.hexdigest() != self.sha256:
            raise ArtifactError(f"{self.uri}: its sha256 is not the record's. Fit again or copy it anew.")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors; runs that lie side by side come in one read.

        Raises:
            StorageError: they cannot be read.
        """
        wanted = sorted(((self.entries[name], name) for name in names), key=lambda pair: pair[0].start)
        runs: list[list[tuple[TensorEntry, str]]] = []
        for entry, name in wanted:
            if runs and runs[-1][-1][0].stop == entry.start:
                runs[-1].append((entry, name))
            else:
                runs.append([(entry, name)])
        found = {}
        for run in runs:
            begin = run[0][0].start
            data = self.storage.read_range(self.uri, begin, run[-1][0].stop)
            for entry, name in run:
                part = data[entry.start - begin : entry.stop - begin]  # a copy, which is aligned
                found[name] = _tensor(part, entry.dtype, entry.shape)
        return found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` up to `stop` of one tensor; only their bytes are read.

        Raises:
            ArtifactError: there are no such rows.
            StorageError: they cannot be read.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            shape = None if entry is None else entry.shape
            raise ArtifactError(f"{self.uri}: has no rows {start} to {stop} of {name!r} {shape}. Fit again.")
        row_bytes = (entry.stop - entry.start) // max(1, entry.shape[0])
        begin = entry.start + start * row_bytes
        data = self.storage.read_range(self.uri, begin, begin + (stop - start) * row_bytes)
        return _tensor(data, entry.dtype, (stop - start, *entry.shape[1:]))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _parse(header: bytearray, data_start: int, size: int, place: str) -> dict[str, TensorEntry]:
    """Every entry of a header, each inside the file and as long as its shape says."""
    try:
        found = {}
        for name, words in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in words["data_offsets"])
            shape = tuple(int(length) for length in words["shape"])
            entry = TensorEntry(DTYPES[words["dtype"]], shape, data_start + begin, data_start + end)
            if not 0 <= begin <= end <= size - data_start or min(shape, default=0) < 0:
                raise ValueError(f"{name!r} lies outside")
            if end - begin != math.prod(shape) * entry.dtype.itemsize:
                raise ValueError(f"{name!r} has {end - begin} bytes for shape {shape}")
            found[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{place}: its safetensors header is damaged ({error}). Fit again.") from None
    return found
