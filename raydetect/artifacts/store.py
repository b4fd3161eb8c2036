"""Saves and loads artifacts: tensors as safetensors, checked by sha256, never pickled."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from raydetect.artifacts.checks import load_checked, require_finite
from raydetect.artifacts.fleet import READERS, ArtifactIndex, ArtifactRef, member_uri, write_fleet
from raydetect.artifacts.record import ArtifactRecord, Calibration, read_record, write_record
from raydetect.artifacts.replacement import remove_replaced
from raydetect.artifacts.tensor_file import TensorFile
from raydetect.artifacts.tensor_header import check_bank
from raydetect.blocks.search.search import Search
from raydetect.config.validation import to_plain
from raydetect.detectors._base import Detector
from raydetect.detectors._registry import build_detector
from raydetect.errors import ArtifactError, MissingError, SpecError
from raydetect.storage import Storage, join_uri

FEW_ROWS = 256  # of the zeros that a detector is tried with when its memory bank is sharded over other actors
PACKAGES = ("raydetect", "torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "ray")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A fitted detector, on the CPU, with its record."""

    detector: Detector
    record: ArtifactRecord

    @property
    def index(self) -> ArtifactIndex:
        """An index with only this artifact."""
        return ArtifactIndex(self.record.uri, self.record.digest, self.record.body)

    def load(self, ref: ArtifactRef) -> "Artifact":
        """Returns itself, as it is already loaded."""
        return self

    def record_of(self, ref: ArtifactRef) -> ArtifactRecord:
        """Returns its own record."""
        return self.record


class DetectorSource(Protocol):
    """Source of detectors for scoring: an index and the loaded artifacts."""

    @property
    def index(self) -> ArtifactIndex:
        """Maps categories to artifacts."""

    def load(self, ref: ArtifactRef) -> Artifact:
        """Loads an artifact of the index.

        Raises:
            ArtifactError: the artifact cannot be loaded.
        """

    def record_of(self, ref: ArtifactRef) -> ArtifactRecord:
        """Reads the record alone, of an artifact whose detector is loaded already.

        Raises:
            ArtifactError: the record cannot be read.
        """


@dataclass(frozen=True, slots=True)
class StoredDetectors:
    """Loads the detectors of an index on demand and checks each against the index.

    Attributes:
        index: index of an artifact or a fleet.
        storage: storage of the artifacts.
        search: search over the sharded memory bank of an ordinary artifact, if any; see `artifacts/sharded_bank.py`.
    """

    index: ArtifactIndex
    storage: Storage
    search: Search | None = None

    def load(self, ref: ArtifactRef) -> Artifact:
        """Loads an artifact of the index.

        Raises:
            ArtifactError: the artifact is missing or damaged, or was replaced since the index was read.
        """
        artifact = load_artifact(ref.uri, self.storage, self.search)
        return Artifact(artifact.detector, _unchanged(artifact.record, ref))

    def record_of(self, ref: ArtifactRef) -> ArtifactRecord:
        """Reads the record alone, of an artifact whose detector is loaded already.

        Raises:
            ArtifactError: the record is missing or damaged, or was replaced since the index was read.
        """
        return _unchanged(read_record(ref.uri, self.storage), ref)


def _unchanged(record: ArtifactRecord, ref: ArtifactRef) -> ArtifactRecord:
    if record.digest != ref.digest:
        raise ArtifactError(f"{ref.uri}: was replaced after the job was planned. Start the job again.")
    return record


def save_artifact(
    uri: str,
    storage: Storage,
    name: str,
    detector: Detector,
    calibration: Calibration,
    facts: Mapping[str, Any],
) -> str:
    """Writes an artifact, removes the files of an earlier one in that folder, and returns the digest.

    Args:
        uri: folder of the artifact.
        storage: storage of that folder.
        name: detector name.
        detector: a fitted detector.
        calibration: scores of held-out normal images.
        facts: further entries of the record: preprocess, spec, weights, counts, times.

    Raises:
        ArtifactError: a tensor has values that are not finite.
        StorageError: a file cannot be written.
    """
    entry = _write_tensors(uri, storage, detector)
    body = {**_describe(name, detector, facts), "tensors": entry, "calibration": to_plain(calibration)}
    written = write_record(uri, storage, body)
    remove_replaced(uri, storage)
    return written


def save_shared(
    uri: str,
    storage: Storage,
    name: str,
    detector: Detector,
    calibrations: Mapping[str, Calibration],
    facts: Mapping[str, Any],
    facts_of: Mapping[str, Mapping[str, Any]],
) -> str:
    """Writes a fleet whose categories share one detector, with its tensors once, and returns the digest of the index.

    Args:
        uri: folder of the fleet; the files of an earlier artifact there are removed.
        storage: storage of that folder.
        name: detector name.
        detector: a fitted detector.
        calibrations: scores of held-out normal images by category.
        facts: further entries of the index, as for `save_artifact`.
        facts_of: entries of the record of each category that differ from `facts`.

    Raises:
        ArtifactError: a tensor has values that are not finite.
        StorageError: a file cannot be written.
    """
    entry, common = _write_tensors(uri, storage, detector), _describe(name, detector, facts)

    def write(category: str) -> str:
        own = {"tensors": {**entry, "shared": True}, "calibration": to_plain(calibrations[category])}
        return write_record(member_uri(uri, category), storage, {**common, **facts_of[category], **own})

    with ThreadPoolExecutor(READERS) as pool:
        members = dict(zip(calibrations, pool.map(write, calibrations), strict=True))
    written = write_fleet(uri, storage, members, {**common, "tensors": entry})
    remove_replaced(uri, storage)
    return written


def _write_tensors(uri: str, storage: Storage, detector: Detector) -> dict[str, Any]:
    """Writes the tensors of a detector and returns their entry in its record."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in detector.tensors().items()}
    require_finite(tensors, uri)
    storage.remove_leftovers(uri)
    data = save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    file_name = f"tensors-{sha256[:16]}.safetensors"
    storage.write(join_uri(uri, file_name), data)
    return {"file": file_name, "sha256": sha256, "bytes": len(data)}


def _describe(name: str, detector: Detector, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record but for tensors and calibration."""
    bank = detector.memory_bank()
    return {
        **facts,
        **({} if bank is None else {"bank": _describe_bank(bank, detector)}),
        "detector": name,
        "params": to_plain(detector.params),
        "seed": detector.seed,
        "packages": package_versions(),
    }


def _describe_bank(name: str, detector: Detector) -> dict[str, Any]:
    rows, dims = detector.tensors()[name].shape
    return {"tensor": name, "rows": rows, "dims": dims}


def load_artifact(uri: str, storage: Storage, search: Search | None = None) -> Artifact:
    """Loads a fitted detector and checks its files.

    Args:
        uri: folder of the artifact.
        storage: storage of that folder.
        search: search over a sharded memory bank, which is then neither read nor checked here; see
            `artifacts/sharded_bank.py`.

    Raises:
        ArtifactError: a file is missing, damaged, of a newer format or does not match its detector.
    """
    record = read_record(uri, storage)
    body = record.body
    try:
        detector = build_detector(body["detector"], body["params"], body["seed"])
    except (SpecError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).replace("\n", "; ")
        raise ArtifactError(f"{uri}: this raydetect cannot build its detector ({reason}). Fit again.") from None
    file = TensorFile.of(record, storage)
    check_bank(record, file.entries)
    if search is None:
        load_checked(detector, _read_tensors(file), file.uri, record.digest)
    else:
        bank = body["bank"]
        others = file.read([name for name in file.entries if name != bank["tensor"]])
        zeros = torch.zeros((min(bank["rows"], FEW_ROWS), bank["dims"]))
        load_checked(detector, {**others, bank["tensor"]: zeros}, file.uri, record.digest)
        detector.load_beside(others, search)
    return Artifact(detector, record)


def _read_tensors(file: TensorFile) -> dict[str, torch.Tensor]:
    try:
        data = file.storage.read(file.uri)
    except MissingError as error:
        raise ArtifactError(f"the artifact is incomplete: {error} Fit again.") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ArtifactError(f"{file.uri}: its sha256 differs from the record. Fit again or copy the file again.")
    try:
        return load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{file.uri}: not a safetensors file ({error}). Fit again.") from None


def package_versions() -> dict[str, str]:
    """Versions of the packages that influence numerical results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
