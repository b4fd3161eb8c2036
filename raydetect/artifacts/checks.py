"""Whether the tensors of an artifact are those that its detector needs: found out before the first image is scored."""

from collections.abc import Mapping

import torch
from torch import Tensor

from raydetect.detectors._base import Detector
from raydetect.errors import ArtifactError

NAMED, REASON = 3, 200
_tried: set[str] = set()


def load_checked(detector: Detector, tensors: Mapping[str, Tensor], place: str, digest: str) -> None:
    """Loads tensors, and makes sure that they are all, of the types and shapes that the detector saves, and finite.

    The first time in a process, it scores a black image, so that shapes which do not go together are found too.

    Args:
        detector: not fitted.
        tensors: by name, on the CPU.
        place: of their file, for messages.
        digest: of the artifact.

    Raises:
        ArtifactError: they are not; says what is wrong.
    """
    require_finite(tensors, place)
    try:
        detector.load_tensors(tensors)
        expected = detector.tensors()
        _refuse_others(tensors, expected, place)
        if digest not in _tried:
            height, width = detector.params.image_size
            with torch.inference_mode():
                detector.score(torch.zeros((1, 3, height, width), dtype=torch.uint8, device=detector.device))
            _tried.add(digest)
    except ArtifactError as error:
        message = str(error).removeprefix(f"{place}: ").removeprefix("the artifact: ").removesuffix(" Fit again.")
        raise ArtifactError(f"{place}: {message} Fit again.") from None
    except Exception as error:  # torch has many kinds for what does not fit
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise ArtifactError(
            f"{place}: its tensors do not fit the detector that the record describes ({reason}). Fit again."
        ) from error


def require_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuses NaN and infinity, with which every score would be none.

    Raises:
        ArtifactError: a tensor holds one.
    """
    bad = [name for name, value in tensors.items() if not _is_finite(value)]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ArtifactError(f"{place}: values of {', '.join(map(repr, bad[:NAMED]))}{more} are not finite. Fit again.")


def _is_finite(value: Tensor) -> bool:
    if not value.numel() or not value.is_floating_point():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))  # no copy; NaN stays NaN


def _refuse_others(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str) -> None:
    for name, value in tensors.items():
        needed = expected.get(name)
        if needed is None:
            raise ArtifactError(f"{place}: the detector has no tensor {name!r}. Fit again.")
        if (value.dtype, value.shape) != (needed.dtype, needed.shape):
            raise ArtifactError(
                f"{place}: the tensor {name!r} is {_kind(value)}, and the detector needs {_kind(needed)}. Fit again."
            )
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ArtifactError(f"{place}: the tensor {missing[0]!r} is missing. Fit again.")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of {tuple(value.shape)}"
