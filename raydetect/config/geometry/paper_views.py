"""How the papers resize and crop: what `preset: paper` adds to the defaults of a detector.

Detectors know nothing of views, so these facts are here. Sizes are (height, width) in px.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from raydetect.config.view import STRETCH, ViewSpec


@dataclass(frozen=True, slots=True)
class PaperView:
    """What a paper feeds to its network.

    Attributes:
        params: parameters of the detector whose defaults are not the paper's, such as the size of the input.
        view: of the whole picture.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    view: ViewSpec = STRETCH


CENTRE_224 = PaperView({"image_size": (224, 224)}, ViewSpec(resize="short_side", size=(256, 256), crop=(224, 224)))
AT_DEFAULT_SIZE = PaperView()
PAPER_VIEWS: Mapping[str, PaperView] = {
    "aprilgan": AT_DEFAULT_SIZE,
    "cflow": AT_DEFAULT_SIZE,
    "cutpaste": AT_DEFAULT_SIZE,
    "devnet": AT_DEFAULT_SIZE,
    "differnet": AT_DEFAULT_SIZE,
    "draem": AT_DEFAULT_SIZE,
    "fastflow": AT_DEFAULT_SIZE,
    "memseg": AT_DEFAULT_SIZE,
    "patchcore": replace(CENTRE_224, params={**CENTRE_224.params, "embedding_dims": 1024}),
    "pyramidflow": AT_DEFAULT_SIZE,
    "reverse_distillation_pp": AT_DEFAULT_SIZE,
    "regad": AT_DEFAULT_SIZE,
    "riad": AT_DEFAULT_SIZE,
    "simplenet": CENTRE_224,  # the paper's; the script of its authors uses 329 and 288 px
    "spade": CENTRE_224,
    "stfpm": AT_DEFAULT_SIZE,
    "uniad": AT_DEFAULT_SIZE,
    "winclip": PaperView(view=ViewSpec(resize="short_side")),  # CLIP's own: the short side fills the input
}


class Preset(Protocol):
    """What is known of a detector of a job."""

    @property
    def name(self) -> str:
        """Of the algorithm."""

    @property
    def preset(self) -> str:
        """`standard`, `paper` or `smoke`."""


def paper_view(name: str) -> PaperView:
    """What the paper of a detector feeds to its network; of an unknown detector, the whole picture."""
    return PAPER_VIEWS.get(name, AT_DEFAULT_SIZE)


def view_of_presets(members: tuple[Preset, ...], stated: ViewSpec) -> ViewSpec:
    """The view of a fit: with `preset: paper`, the paper's resize and crop.

    What does not contradict them (region, align, bands and range) may be stated too.

    Args:
        members: the detectors of an ensemble, or the only one.
        stated: the view in the job.

    Raises:
        ValueError: another resize, crop or tiles are stated, or the members of an ensemble differ.
    """
    if all(member.preset != "paper" for member in members):
        return stated
    published = [_published(member) for member in members]
    if any(view != published[0] for view in published):
        raise ValueError(
            f"preset: paper resizes and crops differently for {' and '.join(m.name for m in members)}, and all members "
            "of an ensemble see the same pixels; set preset: standard for all of them"
        )
    whole = _with_size_of(published[0], stated)
    if stated not in (whole, _with_size_of(STRETCH, stated)):
        raise ValueError(
            "preset: paper has a resize and crop of its own; remove resize, size, crop, scale and tile from view, or "
            "set preset: standard"
        )
    return whole


def _published(member: Preset) -> ViewSpec:
    return paper_view(member.name).view if member.preset == "paper" else STRETCH


def _with_size_of(view: ViewSpec, stated: ViewSpec) -> ViewSpec:
    """The stated view with the resize and crop of another."""
    return replace(stated, resize=view.resize, size=view.size, crop=view.crop, scale=view.scale, tile=view.tile)
