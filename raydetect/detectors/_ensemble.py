"""Ensemble: the weighted mean of several detectors' scores, after each was put on a common scale.

Raw scores of different detectors do not add up, so every member's image score x becomes

    f(x) = asinh((x - centre) / spread)

where centre is the median of scores of held-out normal images and spread 1.4826 times their median absolute deviation
(the standard deviation, if they were Gaussian). Of maps, centre is the median over those images of an image's median
pixel, and spread the median distance from there to an image's highest pixel: 0 is a pixel of normal ground, asinh(1)
the highest one of a usual normal image. f is strictly increasing, so a member alone ranks images and pixels as before;
medians do not heed a few odd images; and asinh, linear near 0 and logarithmic far from it, keeps a member with a heavy
tail, such as a product of errors, from outvoting all others.

Source: robust z-scores (Rousseeuw and Croux, JASA 88, 1993); averaging of normalised outlier scores: Kriegel et al.,
"Interpreting and Unifying Outlier Scores", SDM 2011. asinh for the tail is a choice made here.

Shapes: B images, H W pixels, K members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from raydetect.config import digest
from raydetect.detectors._base import Detector, DetectorInfo, NotFittedError, Scores
from raydetect.errors import ArtifactError
from raydetect.spec import ENSEMBLE, MemberSpec

SCALES = "scales"
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True, slots=True)
class Scale:
    """The common scale of one member.

    Attributes:
        centre: image score that becomes 0.
        spread: distance from there that becomes asinh(1).
        map_centre: likewise of pixels.
        map_spread: likewise of pixels.
    """

    centre: float
    spread: float
    map_centre: float
    map_spread: float

    @classmethod
    def of(cls, measured_M3: Tensor) -> "Scale":
        """The scale by held-out normal images.

        Args:
            measured_M3: float64: image score, median pixel and highest pixel of every image.
        """
        score_M, middle_M, highest_M = measured_M3.unbind(1)
        centre, map_centre = median(score_M), median(middle_M)
        deviation_M = (score_M - centre).abs()
        spread = MAD_TO_DEVIATION * median(deviation_M) or float(deviation_M.mean())
        return cls(centre, spread, map_centre, median(highest_M - map_centre))


def median(values_M: Tensor) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered_M = values_M.sort().values
    half = len(ordered_M) // 2
    return float(ordered_M[half] if len(ordered_M) % 2 else (ordered_M[half - 1] + ordered_M[half]) / 2)


class Ensemble(Detector):
    """Several fitted detectors that score as one."""

    info = DetectorInfo(
        title="Ensemble", paper="", venue="", summary="weighted mean of several detectors' scores on a common scale"
    )
    phases = ()

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """What the members are; `image_size` is theirs."""

        members: Annotated[tuple[MemberSpec, ...], Field(min_length=1, description="with all of their parameters")]
        weights: Annotated[tuple[float, ...], Field(description="of the mean; only their ratios matter")]

    params: Params

    def __init__(self, params: Params, members: Sequence[Detector], seed: int = 0) -> None:
        """Takes the members, fitted or not.

        Args:
            params: what they are.
            members: the detectors, in the order of `params.members`.
            seed: of every member.
        """
        super().__init__(params, seed)
        self.members = tuple(members)
        self.scales: tuple[Scale, ...] = ()
        words = [digest([member, weight]) for member, weight in zip(params.members, params.weights, strict=True)]
        self._order = sorted(range(len(members)), key=lambda k: words[k])  # so that no sum depends on theirs

    def load_weights(self) -> str:
        """Loads those of all members."""
        said = zip(self.params.members, [member.load_weights() for member in self.members], strict=True)
        return "; ".join(f"{spec.name}: {words}" for spec, words in said)

    def score(self, images_BCHW: Tensor) -> Scores:
        """The weighted mean on the common scale; the map is that of the members that localise, if any does."""
        if not self.scales:
            raise NotFittedError(f"{ENSEMBLE}: is not fitted. Fit it or load an artifact first.")
        image_score_B = torch.zeros(len(images_BCHW), dtype=torch.float64, device=images_BCHW.device)
        anomaly_map_BHW = torch.zeros_like(images_BCHW[:, 0], dtype=torch.float64)
        places = self._localising()
        shares, map_shares = self._shares(self._order), self._shares(places)
        for k in self._order:
            scores, scale = self.members[k].score(images_BCHW), self.scales[k]
            image_score_B += shares[k] * common(scores.image_score_B, scale.centre, scale.spread)
            if k in places:
                anomaly_map_BHW += map_shares[k] * common(scores.anomaly_map_BHW, scale.map_centre, scale.map_spread)
        if not places:
            anomaly_map_BHW += image_score_B[:, None, None]
        return Scores(image_score_B.float(), anomaly_map_BHW.float())

    def _localising(self) -> list[int]:
        return [k for k in self._order if self.members[k].info.localises]

    def _shares(self, places: Sequence[int]) -> dict[int, float]:
        total = sum(self.params.weights[k] for k in places)
        return {k: self.params.weights[k] / total for k in places}

    def facts(self) -> Mapping[str, Any]:
        """Every member's share, scale and own facts."""
        shares = self._shares(self._order)
        found = []
        for k, (spec, scale) in enumerate(zip(self.params.members, self.scales, strict=True)):
            places = {"centre": scale.centre, "spread": scale.spread}
            maps = {"map_centre": scale.map_centre, "map_spread": scale.map_spread}
            own = self.members[k].facts()
            found.append({"detector": spec.name, "share": round(shares[k], 6), "scale": {**places, **maps}, **own})
        return {"members": found}

    def tensors(self) -> dict[str, Tensor]:
        """The scales, and every member's tensors as `number.name`."""
        if not self.scales:
            raise NotFittedError(f"{ENSEMBLE}: is not fitted, there is nothing to save.")
        rows = [(s.centre, s.spread, s.map_centre, s.map_spread) for s in self.scales]
        found = {SCALES: torch.tensor(rows, dtype=torch.float64)}
        for k, member in enumerate(self.members):
            found |= {f"{k}.{name}": value for name, value in member.tensors().items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores scales and members."""
        scales = tensors.get(SCALES)
        if scales is None or scales.shape != (len(self.members), 4):
            raise ArtifactError(
                f"{ENSEMBLE}: the artifact has no tensor {SCALES!r} of ({len(self.members)}, 4). Fit again."
            )
        for k, member in enumerate(self.members):
            start = f"{k}."
            member.load_tensors({n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)})
        self.scales = tuple(Scale(*row) for row in scales.tolist())

    def to(self, device: torch.device) -> "Ensemble":
        """Moves all members."""
        self.device = device
        for member in self.members:
            member.to(device)
        return self


def common(values: Tensor, centre: float, spread: float) -> Tensor:
    """asinh((x - centre) / spread), float64."""
    return torch.asinh((values.double() - centre) / spread)


def parts(detector: Detector) -> list[tuple[int | None, Detector]]:
    """The detectors that a fit takes through their phases: the members of an ensemble by number, else itself."""
    return list(enumerate(detector.members)) if isinstance(detector, Ensemble) else [(None, detector)]


def learns_from_labels(detector: Detector) -> bool:
    """Whether it, or a member of it, needs anomalous images."""
    return any(part.info.labels != "none" for _, part in parts(detector))
