"""A memory bank in pieces: each holder reads only its own rows of the artifact's file."""

import torch

from raydetect.artifact_record import ArtifactRecord
from raydetect.blocks.search import Search, ShardedSearch, cut_bank
from raydetect.detectors._registry import build_detector
from raydetect.storage import Storage
from raydetect.tensor_header import tensors_uri
from raydetect.worker.tensor_file import TensorFile
from raydetect.worker.trial import require_finite


def piece_search(record: ArtifactRecord, storage: Storage, number: int, pieces: int, device: torch.device) -> Search:
    """The search over one piece of an artifact's memory bank.

    The sha256 of the file is not checked here, as a piece cannot tell it: see `TensorFile.verify`.

    Args:
        record: of the artifact.
        storage: reaches it.
        number: of the piece, from 0 on.
        pieces: that the bank is cut into.
        device: where the piece is held.

    Raises:
        SpecError: the detector has no bank that can be cut, or it has fewer rows.
        ArtifactError, StorageError: the file is damaged or cannot be read.
    """
    start, stop = cut_bank(record.require_bank(pieces)[0], pieces)[number]
    body = record.body
    piece_MD = TensorFile.of(record, storage).rows(body["bank"]["tensor"], start, stop)
    require_finite({body["bank"]["tensor"]: piece_MD}, tensors_uri(record.uri, body["tensors"]))
    detector = build_detector(body["detector"], body["params"], body["seed"])
    return detector.piece_search(piece_MD.to(device))


def sharded_search(record: ArtifactRecord, storage: Storage, pieces: int, device: torch.device) -> Search | None:
    """All pieces in this process, checked; None for one piece, which is the artifact's own search.

    Raises:
        As `piece_search`.
    """
    if pieces == 1:
        return None
    TensorFile.of(record, storage).verify()
    return ShardedSearch([piece_search(record, storage, number, pieces, device) for number in range(pieces)])
