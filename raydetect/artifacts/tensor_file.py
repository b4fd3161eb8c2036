"""Reads a safetensors file in parts: the header, then only the requested tensors or rows."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raydetect.artifacts.record import ArtifactRecord
from raydetect.artifacts.tensor_header import TensorEntry, read_header, tensors_uri
from raydetect.errors import ArtifactError
from raydetect.storage import RANGE_BYTES, Storage

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


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file with its parsed header.

    Size and header are checked on opening. The sha256 of the record covers the whole file and cannot be checked on a
    part; the caller must call `verify` once, which streams the file in bounded memory.
    """

    uri: str
    storage: Storage
    entries: Mapping[str, TensorEntry]
    sha256: str

    @classmethod
    def of(cls, record: ArtifactRecord, storage: Storage) -> "TensorFile":
        """Opens the tensors of an artifact by reading their header.

        Raises:
            ArtifactError, StorageError: see `read_header`.
        """
        uri = tensors_uri(record.uri, record.body["tensors"])
        return cls(uri, storage, read_header(record, storage), record.body["tensors"]["sha256"])

    def verify(self) -> None:
        """Reads the whole file once and compares its sha256 with the record.

        Raises:
            ArtifactError: the sha256 differs.
            StorageError: the file cannot be read.
        """
        digest = hashlib.sha256()
        with self.storage.open(self.uri) as handle:
            while part := handle.read(RANGE_BYTES):
                digest.update(part)
        if digest.hexdigest() != self.sha256:
            raise ArtifactError(f"{self.uri}: its sha256 differs from the record. Fit again or copy the file again.")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads tensors by name; adjacent ones are read in one request.

        Raises:
            StorageError: the file cannot be read.
        """
        wanted = sorted(((self.entries[name], name) for name in names), key=lambda pair: pair[0].start)
        runs: list[list[tuple[TensorEntry, str]]] = []
        for entry, name in wanted:
            if runs and runs[-1][-1][0].stop == entry.start:
                runs[-1].append((entry, name))
            else:
                runs.append([(entry, name)])
        tensors = {}
        for run in runs:
            run_start = run[0][0].start
            data = self.storage.read_range(self.uri, run_start, run[-1][0].stop)
            for entry, name in run:
                part = data[entry.start - run_start : entry.stop - run_start]  # an aligned copy
                tensors[name] = _tensor(part, DTYPES[entry.dtype], entry.shape)
        return tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads rows `start` to `stop` of one tensor, and only their bytes.

        Raises:
            ArtifactError: the tensor or the rows do not exist.
            StorageError: the file cannot be read.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            shape = None if entry is None else entry.shape
            raise ArtifactError(f"{self.uri}: has no rows {start} to {stop} of {name!r} {shape}. Fit again.")
        row_bytes = (entry.stop - entry.start) // max(1, entry.shape[0])
        offset = entry.start + start * row_bytes
        data = self.storage.read_range(self.uri, offset, offset + (stop - start) * row_bytes)
        return _tensor(data, DTYPES[entry.dtype], (stop - start, *entry.shape[1:]))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)
