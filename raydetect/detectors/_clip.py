"""Base class of detectors that compare CLIP's embeddings of images with those of text prompts.

Shapes: B images, N prompts, D embedding dim; 2 = prompts for normal parts and for defects.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from raydetect.blocks.backbones.backbone import tensors_digest
from raydetect.blocks.backbones.clip import (
    PIXEL_MEAN,
    PIXEL_STD,
    ClipConfig,
    ImageTower,
    TextTower,
    build_clip,
    clip_config,
    load_clip,
)
from raydetect.detectors._base import Detector
from raydetect.detectors._networks import NetworkDetector
from raydetect.detectors._weights import RANDOM, clip_facts, clip_weights
from raydetect.errors import ArtifactError, SpecError

IMAGE, TEXT = "image", "text"
TEXT_EMBEDDINGS, QUICK_GELU = "text_embeddings", "quick_gelu"


class ClipDetector(NetworkDetector):
    """A detector on a frozen CLIP model: loads both towers, embeds the prompts, and changes the class name."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """Parameters of all detectors on CLIP."""

        clip_model: Annotated[str, Field(description="open_clip name of a CLIP model with a vision transformer")]
        weights: Annotated[
            str, Field(description='open_clip weights tag, "random", or path or URL of a file with its key names')
        ]
        class_name: Annotated[str, Field(min_length=1, description="what the images show")] = "object"
        prompts_normal: Annotated[
            tuple[str, ...] | None, Field(min_length=1, description="prompts for a normal part, {} is the class name")
        ] = None
        prompts_anomalous: Annotated[
            tuple[str, ...] | None, Field(min_length=1, description="prompts for a defect, {} is the class name")
        ] = None
        keep_text_tower: Annotated[
            bool, Field(description="store the text tower, which set_class_name needs; false = smaller artifact")
        ] = True

    params: Params

    def __init__(self, params: Params, seed: int = 0) -> None:
        """Stores the parameters."""
        super().__init__(params, seed)
        self.words_2D: Tensor | None = None
        self.quick_gelu = False

    @abc.abstractmethod
    def default_prompts(self) -> tuple[Sequence[str], Sequence[str]]:
        """The published prompts for normal parts and for defects; {} is the class name."""

    @abc.abstractmethod
    def mean_embedding(self, embeddings_ND: Tensor) -> Tensor:
        """The L2-normalised embedding (D,) that stands for all prompts of a kind."""

    def load_weights(self) -> str:
        """Loads both towers and embeds the prompts."""
        config, weights = clip_config(self.params.clip_model), self.params.weights
        facts = {} if weights == RANDOM else clip_facts(config.name, weights)
        self.quick_gelu = bool(facts.get("quick_gelu", False))
        found = None if weights == RANDOM else clip_weights(config.name, weights)
        pixels = facts.get("mean", PIXEL_MEAN), facts.get("std", PIXEL_STD)
        image, text = build_clip(config, self.params.image_size, self.seed, self.quick_gelu, *pixels)
        if found is not None:
            load_clip(image, text, found, weights)
        source = f"random seed:{self.seed}" if weights == RANDOM else weights
        source += f" sha256:{tensors_digest({**image.state_dict(), **text.state_dict()})}"
        self.networks = {IMAGE: image, TEXT: text}
        self.to(self.device)
        self.words_2D = self.embed_words(self.params.class_name)
        return source

    def make_networks(self) -> dict[str, nn.Module]:
        """The stored towers, with random weights."""
        config = clip_config(self.params.clip_model)
        image, text = build_clip(config, self.params.image_size, self.seed, self.quick_gelu)
        return {IMAGE: image, TEXT: text} if self.params.keep_text_tower else {IMAGE: image}

    def prompts(self, class_name: str) -> tuple[list[str], list[str]]:
        """Prompts for normal parts of a class, and for defects of it."""
        own = self.params.prompts_normal, self.params.prompts_anomalous
        texts = (mine or published for mine, published in zip(own, self.default_prompts(), strict=True))
        normal, anomalous = ([text.replace("{}", class_name) for text in part] for part in texts)
        return normal, anomalous

    @torch.inference_mode()
    def embed_words(self, class_name: str) -> Tensor:
        """Embeddings (2, D) of the prompts for normal parts of a class, and for defects of it; L2-normalised."""
        text = self.networks[TEXT]
        assert isinstance(text, TextTower)
        return torch.stack([self.mean_embedding(self.run(text.embed, texts)) for texts in self.prompts(class_name)])

    def set_class_name(self, name: str) -> None:
        """Sets the class name; a fitted detector keeps its normal images.

        Raises:
            SpecError: the name is empty, there is no text tower, or no user prompt contains {}.
        """
        if not name.strip():
            raise SpecError(
                f"{self._name()}: an empty class name was given. Name what the images show, such as 'screw'."
            )
        require_named(self._name(), self.params)
        if self.words_2D is not None and not self.params.keep_text_tower:
            raise SpecError(f"{self._name()}: has no text tower to embed a class name. Fit with keep_text_tower: true.")
        self.params = replace(self.params, class_name=name)
        if TEXT in self.networks:
            self.words_2D = self.embed_words(name)

    def tower(self) -> ImageTower:
        """The image tower.

        Raises:
            NotFittedError: no weights are loaded yet.
        """
        tower = self.networks.get(IMAGE)
        if not isinstance(tower, ImageTower):
            self.require_fitted()
        assert isinstance(tower, ImageTower)
        return tower

    def require_size(self, images_BCHW: Tensor) -> None:
        """Checks that images have the size that the position embeddings are for.

        Raises:
            SpecError: they do not.
        """
        height, width = self.params.image_size
        if images_BCHW.shape[-2:] != (height, width):
            raise SpecError(
                f"{self._name()}: expects images of {height} x {width} px, given {images_BCHW.shape[-2]} x "
                f"{images_BCHW.shape[-1]}. Resize them."
            )

    def tensors(self) -> dict[str, Tensor]:
        """Towers and prompt embeddings."""
        found = super().tensors()
        assert self.words_2D is not None
        if not self.params.keep_text_tower:
            found = {name: value for name, value in found.items() if not name.startswith(f"{TEXT}.")}
        return {**found, TEXT_EMBEDDINGS: self.words_2D, QUICK_GELU: torch.tensor([self.quick_gelu])}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores towers and prompt embeddings."""
        self.require_tensors(tensors, TEXT_EMBEDDINGS, QUICK_GELU)
        self.quick_gelu = bool(tensors[QUICK_GELU])
        self.words_2D = tensors[TEXT_EMBEDDINGS].float()
        super().load_tensors(tensors)

    def require_tensors(self, tensors: Mapping[str, Tensor], *names: str) -> None:
        """Checks that an artifact has some tensors.

        Raises:
            ArtifactError: one is missing; the message names it.
        """
        for name in names:
            if name not in tensors:
                raise ArtifactError(f"{self._name()}: the artifact has no tensor {name!r}. Fit again.")

    def to(self, device: torch.device) -> "ClipDetector":
        """Moves towers and prompt embeddings."""
        super().to(device)
        self.words_2D = None if self.words_2D is None else self.words_2D.to(device)
        return self


def checked_config(detector: str, params: ClipDetector.Params) -> ClipConfig:
    """The configuration of the CLIP model, for `__post_init__` of parameters.

    Raises:
        ValueError: there is no such model, or a class name is given that no prompt contains.
    """
    try:
        if params.class_name != "object":
            require_named(detector, params)
        return clip_config(params.clip_model)
    except SpecError as error:
        raise ValueError(str(error)) from None


def require_whole_patches(size: tuple[int, int], config: ClipConfig) -> None:
    """Checks that an image size is a multiple of the model's patch.

    Raises:
        ValueError: it is not.
    """
    if min(size) < 1 or size[0] % config.patch_px or size[1] % config.patch_px:
        raise ValueError(f"image_size {list(size)} is not a multiple of {config.patch_px} px, {config.name}'s patch")


def require_named(detector: str, params: ClipDetector.Params) -> None:
    """Rejects user prompts that do not depend on the class name.

    Raises:
        SpecError: both prompt lists are the user's, and none contains {}.
    """
    prompts = params.prompts_normal, params.prompts_anomalous
    if all(texts is not None and not any("{}" in text for text in texts) for texts in prompts):
        raise SpecError(
            f"{detector}: the class name would change nothing. Put {{}} into prompts_normal or prompts_anomalous."
        )
