"""A safetensors file read in parts: the header, then only the bytes of what is wanted. Nothing is unpickled."""

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
            ArtifactError, StorageError: as for `read_header`.
        """
        place = tensors_uri(record.uri, record.body["tensors"])
        return cls(place, storage, read_header(record, storage), record.body["tensors"]["sha256"])

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
                found[name] = _tensor(part, DTYPES[entry.dtype], entry.shape)
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
        return _tensor(data, DTYPES[entry.dtype], (stop - start, *entry.shape[1:]))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)
