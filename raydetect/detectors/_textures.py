"""Texture images for simulated defects, read from a folder or archive of any storage."""

import hashlib
import heapq
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydetect.archives.open import open_archive
from raydetect.blocks.seeding import keyed_seed
from raydetect.config import SourceSpec
from raydetect.errors import ArtifactError, RaydetectError
from raydetect.records import OK, Member
from raydetect.storage import Storage

MAX_TEXTURES = 1000
MAX_TEXTURE_BYTES = 32 << 20
MAX_TEXTURE_PIXELS = 64 << 20


def load_textures(uri: str, size_px: tuple[int, int]) -> tuple[Tensor, str]:
    """Texture images of size `size_px`, sorted by key, and a description for the artifact.

    If there are more than 1,000, the images with the smallest key hashes are used; all are read, sequentially.

    Args:
        uri: a folder, glob, tar, zip or Parquet file of images.
        size_px: (height, width) to resize to, bilinear and antialiased.

    Returns:
        textures_N3HW: uint8 RGB.
        description: "<n> textures of <uri> sha256:<digest>".

    Raises:
        ArtifactError: no image was found, or one cannot be decoded.
        SpecError: the URI is invalid.
    """
    members, seen = _chosen(uri)
    total, textures = hashlib.sha256(), np.empty((len(members), *size_px, 3), np.uint8)
    for number, member in enumerate(members):
        total.update(hashlib.sha256(member.data).digest())
        textures[number] = _decoded(member, size_px)
    of = "" if seen == len(members) else f" of {seen}"
    description = f"{len(members)}{of} textures of {uri} sha256:{total.hexdigest()}"
    return torch.from_numpy(textures).permute(0, 3, 1, 2).contiguous(), description


def _chosen(uri: str) -> tuple[list[Member], int]:
    """The images with the smallest keyed hashes, sorted by key, and the total number of images."""
    source = SourceSpec(uri=uri, max_image_bytes=MAX_TEXTURE_BYTES, max_pixels=MAX_TEXTURE_PIXELS)
    archive = open_archive(source, Storage())
    kept: list[tuple[int, str, Member]] = []
    seen = 0
    try:
        for shard in archive.shards():
            for member in archive.read(shard):
                seen += 1
                entry = (-keyed_seed(0, "texture", member.key), member.key, member)
                (heapq.heappush if len(kept) < MAX_TEXTURES else heapq.heappushpop)(kept, entry)
    except RaydetectError as error:
        raise ArtifactError(f"textures: {error}") from None
    if not kept:
        raise ArtifactError(f"textures: {uri} contains no images. Give a folder or archive of images or omit textures.")
    return sorted((member for _, _, member in kept), key=lambda member: member.key), seen


def _decoded(member: Member, size_px: tuple[int, int]) -> np.ndarray:
    if member.status != OK:
        raise ArtifactError(f"textures: {member.error}")
    try:
        picture = Image.open(io.BytesIO(member.data))
        if picture.width * picture.height > MAX_TEXTURE_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} px is too large")
        return np.asarray(picture.convert("RGB").resize(size_px[::-1], Image.Resampling.BILINEAR))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(f"textures: {member.key}: cannot be decoded ({reason}). Remove it.") from None
