"""Ensemble: the weighted mean of several detectors' scores on a common scale.

Raw scores of different detectors are not comparable, so every member's image score x is transformed to

    f(x) = asinh((x - centre) / spread)

where centre is the median score of held-out normal images and spread is 1.4826 times their median absolute deviation
(the standard deviation, if they were Gaussian). For maps, centre is the median over those images of the median pixel,
and spread the median distance from centre to an image's maximum pixel: 0 is a normal background pixel, asinh(1) the
maximum of a typical normal image. f is strictly increasing, so a single member's ranking of images and pixels is
unchanged; medians are robust to a few outliers; and asinh, linear near 0 and logarithmic far from it, keeps a member
with a heavy tail, such as a product of errors, from dominating the mean.

Source: robust z-scores (Rousseeuw and Croux, JASA 88, 1993); averaging of normalised outlier scores: Kriegel et al.,
"Interpreting and Unifying Outlier Scores", SDM 2011. The use of asinh for the tail is our own choice.

Shapes: B images, H W pixels, K members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from raydetect.config import ENSEMBLE, MemberSpec
from raydetect.config.validation import digest
from raydetect.detectors._base import Detector, DetectorInfo, NotFittedError, Scores
from raydetect.errors import ArtifactError

SCALES = "scales"
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True, slots=True)
class Scale:
    """The common scale of one member.

    Attributes:
        centre: image score that maps to 0.
        spread: distance from `centre` that maps to asinh(1).
        map_centre: the same for pixels.
        map_spread: the same for pixels.
    """

    centre: float
    spread: float
    map_centre: float
    map_spread: float

    @classmethod
    def of(cls, measured_M3: Tensor) -> "Scale":
        """The scale estimated from held-out normal images.

        Args:
            measured_M3: image score, median pixel and maximum pixel of every image, float64.
        """
        score_M, middle_M, highest_M = measured_M3.unbind(1)
        centre, map_centre = median(score_M), median(middle_M)
        deviation_M = (score_M - centre).abs()
        spread = MAD_TO_DEVIATION * median(deviation_M) or float(deviation_M.mean())
        return cls(centre, spread, map_centre, median(highest_M - map_centre))


def median(values_M: Tensor) -> float:
    """The median; for an even count, the mean of the two middle values."""
    ordered_M = values_M.sort().values
    half = len(ordered_M) // 2
    return float(ordered_M[half] if len(ordered_M) % 2 else (ordered_M[half - 1] + ordered_M[half]) / 2)


class Ensemble(Detector):
    """Several fitted detectors that act as one."""

    info = DetectorInfo(
        title="Ensemble", paper="", venue="", summary="weighted mean of several detectors' scores on a common scale"
    )
    phases = ()

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """The members and their weights; all share `image_size`. `precision` is bfloat16 if that of any member is."""

        members: Annotated[tuple[MemberSpec, ...], Field(min_length=1, description="with all of their parameters")]
        weights: Annotated[tuple[float, ...], Field(description="of the mean; only their ratios matter")]

    params: Params

    def __init__(self, params: Params, members: Sequence[Detector], seed: int = 0) -> None:
        """Stores the members, fitted or not.

        Args:
            params: describes the members.
            members: the detectors, in the order of `params.members`.
            seed: the seed of every member.
        """
        super().__init__(params, seed)
        self.members = tuple(members)
        self.scales: tuple[Scale, ...] = ()
        digests = [digest([member, weight]) for member, weight in zip(params.members, params.weights, strict=True)]
        self._order = sorted(range(len(members)), key=lambda k: digests[k])  # sums do not depend on member order

    def load_weights(self) -> str:
        """Loads the weights of all members."""
        sources = zip(self.params.members, [member.load_weights() for member in self.members], strict=True)
        return "; ".join(f"{spec.name}: {source}" for spec, source in sources)

    @property
    def scores_by_map(self) -> bool:
        """Whether all members do."""
        return all(member.scores_by_map for member in self.members)

    def score(self, images_BCHW: Tensor) -> Scores:
        """Weighted mean on the common scale; the map averages the members that localise, if any."""
        if not self.scales:
            raise NotFittedError(f"{ENSEMBLE}: is not fitted. Fit it or load an artifact first.")
        image_score_B = torch.zeros(len(images_BCHW), dtype=torch.float64, device=images_BCHW.device)
        anomaly_map_BHW = torch.zeros_like(images_BCHW[:, 0], dtype=torch.float64)
        localising = self._localising()
        shares, map_shares = self._shares(self._order), self._shares(localising)
        for k in self._order:
            scores, scale = self.members[k].score(images_BCHW), self.scales[k]
            image_score_B += shares[k] * common(scores.image_score_B, scale.centre, scale.spread)
            if k in localising:
                anomaly_map_BHW += map_shares[k] * common(scores.anomaly_map_BHW, scale.map_centre, scale.map_spread)
        if not localising:
            anomaly_map_BHW += image_score_B[:, None, None]
        return Scores(image_score_B.float(), anomaly_map_BHW.float())

    def _localising(self) -> list[int]:
        return [k for k in self._order if self.members[k].info.localises]

    def _shares(self, indices: Sequence[int]) -> dict[int, float]:
        total = sum(self.params.weights[k] for k in indices)
        return {k: self.params.weights[k] / total for k in indices}

    def facts(self) -> Mapping[str, Any]:
        """Each member's share, scale and facts."""
        shares = self._shares(self._order)
        found = []
        for k, (spec, scale) in enumerate(zip(self.params.members, self.scales, strict=True)):
            image_scale = {"centre": scale.centre, "spread": scale.spread}
            map_scale = {"map_centre": scale.map_centre, "map_spread": scale.map_spread}
            own = self.members[k].facts()
            common_scale = {**image_scale, **map_scale}
            found.append({"detector": spec.name, "share": round(shares[k], 6), "scale": common_scale, **own})
        return {"members": found}

    def tensors(self) -> dict[str, Tensor]:
        """The scales, and each member's tensors as `number.name`."""
        if not self.scales:
            raise NotFittedError(f"{ENSEMBLE}: is not fitted, there is nothing to save.")
        rows = [(s.centre, s.spread, s.map_centre, s.map_spread) for s in self.scales]
        found = {SCALES: torch.tensor(rows, dtype=torch.float64)}
        for k, member in enumerate(self.members):
            found |= {f"{k}.{name}": value for name, value in member.tensors().items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the scales and the members."""
        scales = tensors.get(SCALES)
        if scales is None or scales.shape != (len(self.members), 4):
            raise ArtifactError(
                f"{ENSEMBLE}: the artifact has no tensor {SCALES!r} of shape ({len(self.members)}, 4). Fit again."
            )
        for k, member in enumerate(self.members):
            prefix = f"{k}."
            member.load_tensors({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
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
    """The detectors whose phases a fit runs: the members of an ensemble by number, else the detector itself."""
    return list(enumerate(detector.members)) if isinstance(detector, Ensemble) else [(None, detector)]


def learns_from_labels(detector: Detector) -> bool:
    """Whether the detector, or one of its members, needs anomalous images."""
    return any(part.info.labels != "none" for _, part in parts(detector))


def localises(detector: Detector) -> bool:
    """Whether the anomaly map of the detector, or of one of its members, locates defects."""
    return any(part.info.localises for _, part in parts(detector))
