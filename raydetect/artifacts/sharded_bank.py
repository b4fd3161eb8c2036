"""Splits a memory bank into pieces; each holder reads only its own rows of the artifact's file."""

import torch

from raydetect.artifacts.checks import require_finite
from raydetect.artifacts.record import ArtifactRecord
from raydetect.artifacts.tensor_file import TensorFile
from raydetect.artifacts.tensor_header import tensors_uri
from raydetect.blocks.search.search import Search, ShardedSearch, split_bank
from raydetect.detectors._registry import build_detector
from raydetect.storage import Storage


def piece_search(record: ArtifactRecord, storage: Storage, number: int, pieces: int, device: torch.device) -> Search:
    """Creates the search over one piece of an artifact's memory bank.

    The file's sha256 is not checked here, because it covers the whole file: see `TensorFile.verify`.

    Args:
        record: of the artifact.
        storage: gives access to it.
        number: index of the piece, from 0.
        pieces: number of pieces.
        device: device of the piece.

    Raises:
        SpecError: the detector has no bank that can be split, or the bank has fewer rows than pieces.
        ArtifactError, StorageError: the file is damaged or cannot be read.
    """
    start, stop = split_bank(record.require_bank(pieces)[0], pieces)[number]
    body = record.body
    piece_MD = TensorFile.of(record, storage).rows(body["bank"]["tensor"], start, stop)
    require_finite({body["bank"]["tensor"]: piece_MD}, tensors_uri(record.uri, body["tensors"]))
    detector = build_detector(body["detector"], body["params"], body["seed"])
    return detector.piece_search(piece_MD.to(device))


def sharded_search(record: ArtifactRecord, storage: Storage, pieces: int, device: torch.device) -> Search | None:
    """Creates the search over all pieces in this process and checks the file; None if there is only one piece.

    Raises:
        As `piece_search`.
    """
    if pieces == 1:
        return None
    TensorFile.of(record, storage).verify()
    return ShardedSearch([piece_search(record, storage, number, pieces, device) for number in range(pieces)])
