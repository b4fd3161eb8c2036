"""Checks that the tensors of an artifact match its detector, before the first image is scored."""

from collections.abc import Mapping

import torch
from torch import Tensor

from raydetect.detectors._base import Detector
from raydetect.errors import ArtifactError, RaydetectError

NAMED, REASON = 3, 200
OUT_OF_MEMORY = "allocate memory"  # in the RuntimeError that torch raises on CPUs
_tested: set[str] = set()


def load_checked(detector: Detector, tensors: Mapping[str, Tensor], place: str, digest: str) -> None:
    """Loads tensors and checks that they are complete, finite and have the types and shapes the detector needs.

    The first time in a process, also scores a black image to find shapes that do not fit together.

    Args:
        detector: an unfitted detector.
        tensors: tensors by name, on the CPU.
        place: location of their file, for messages.
        digest: digest of the artifact.

    Raises:
        ArtifactError: a check fails; the message says which.
        RaydetectError: memory ran out, which says nothing about the artifact.
    """
    require_finite(tensors, place)
    try:
        detector.load_tensors(tensors)
        expected = detector.tensors()
        _refuse_others(tensors, expected, place)
        if digest not in _tested:
            height, width = detector.params.image_size
            with torch.inference_mode():
                detector.score(torch.zeros((1, 3, height, width), dtype=torch.uint8, device=detector.device))
            _tested.add(digest)
    except ArtifactError as error:
        message = str(error).removeprefix(f"{place}: ").removeprefix("the artifact: ").removesuffix(" Fit again.")
        raise ArtifactError(f"{place}: {message} Fit again.") from None
    except Exception as error:  # torch raises many types for tensors that do not fit
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error):
            raise RaydetectError(
                f"{place}: does not fit into the memory of this process. Give it more memory, or shard the memory bank "
                "with resources.bank_shards."
            ) from error
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise ArtifactError(
            f"{place}: its tensors do not fit the detector that the record describes ({reason}). Fit again."
        ) from error


def require_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuses tensors with NaN or infinity, which would make every score non-finite.

    Raises:
        ArtifactError: a tensor contains such values.
    """
    bad = [name for name, value in tensors.items() if not _is_finite(value)]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ArtifactError(f"{place}: values of {', '.join(map(repr, bad[:NAMED]))}{more} are not finite. Fit again.")


def _is_finite(value: Tensor) -> bool:
    if not value.numel() or not value.is_floating_point():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))  # without a copy; propagates NaN


def _refuse_others(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str) -> None:
    for name, value in tensors.items():
        needed = expected.get(name)
        if needed is None:
            raise ArtifactError(f"{place}: the detector has no tensor {name!r}. Fit again.")
        if (value.dtype, value.shape) != (needed.dtype, needed.shape):
            raise ArtifactError(
                f"{place}: the tensor {name!r} is {_kind(value)}, but the detector needs {_kind(needed)}. Fit again."
            )
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ArtifactError(f"{place}: the tensor {missing[0]!r} is missing. Fit again.")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of {tuple(value.shape)}"
