"""Reading the images of a fit: who is there, who is held out, and batches of them."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from raydetect.archives.base import Archive, cut_chunks
from raydetect.blocks.seeding import keyed_unit
from raydetect.detectors._base import Batch, Detector, FitState
from raydetect.errors import SpecError, TooManyBadRows
from raydetect.records import OK, Member, Shard
from raydetect.spec import SourceSpec
from raydetect.worker.preprocess import DecodeRules, Pixels, decode_all
from raydetect.worker.read import read_members, refuse_bad_member

CHUNK_IMAGES = 64
CHUNK_BYTES = 128 << 20
PAD_KEY = ""


@dataclass(slots=True)
class Survey:
    """What one pass over the source found.

    Attributes:
        labels: label of every usable image by key; None is unknown.
        bad: (status, error) of every member that cannot be used, by key.
    """

    labels: dict[str, int | None] = field(default_factory=dict)
    bad: dict[str, tuple[str, str]] = field(default_factory=dict)

    def normal_keys(self) -> list[str]:
        """Keys of images that are not labelled anomalous, sorted."""
        return sorted(key for key, label in self.labels.items() if label != 1)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One archive with the rules to read it at one input size.

    Attributes:
        archive: open.
        shards: all of it.
        source: the job file's words.
        image_size: (height, width) px.
        threads: decoding threads.
    """

    archive: Archive
    shards: tuple[Shard, ...]
    source: SourceSpec
    image_size: tuple[int, int]
    threads: int

    def chunks(self, keys: Collection[str] | None = None) -> Iterator[list[tuple[Member, Pixels]]]:
        """Decoded members chunk by chunk, bad ones included; only those in `keys` when given."""
        rules = DecodeRules.of(self.source)
        for shard in self.shards:
            members = (
                member
                for member in read_members(self.archive, shard, self.source)
                if keys is None or member.key in keys
            )
            for chunk in cut_chunks(shard, members, CHUNK_IMAGES, CHUNK_BYTES):
                pixels = decode_all(chunk.members, rules, self.image_size, self.threads)
                yield list(zip(chunk.members, pixels, strict=True))


def survey(images: ImageSource, tick: Callable[[int], None], max_bad_fraction: float) -> Survey:
    """Decodes every image once to learn which can be used.

    Args:
        images: the source.
        tick: told how many members each chunk had.
        max_bad_fraction: more bad members than this share are refused.

    Raises:
        BadMemberError: a bad member and `on_bad_member: fail`.
        TooManyBadRows: too many members are bad; the message has the first reasons.
    """
    found = Survey()
    for pairs in images.chunks():
        for member, pixels in pairs:
            refuse_bad_member(pixels.status, pixels.error, images.source)
            if pixels.status == OK:
                found.labels[member.key] = member.label
            else:
                found.bad[f"{member.key} ({pixels.status})"] = (pixels.status, pixels.error)
        tick(len(pairs))
    total = len(found.labels) + len(found.bad)
    if total == 0:
        raise SpecError(f"{images.source.uri}: holds no image. Check source.uri, format and pattern.")
    if len(found.bad) > max_bad_fraction * total:
        reasons = "; ".join(error for _, error in list(found.bad.values())[:3])
        raise TooManyBadRows(
            f"{len(found.bad)} of {total} images cannot be used, more than max_bad_fraction = "
            f"{max_bad_fraction}. First: {reasons}"
        )
    return found


def choose_holdout(keys: list[str], ratio: float, seed: int) -> frozenset[str]:
    """The share of `keys` kept for calibration: those with the smallest keyed hash; at least one.

    Raises:
        SpecError: fewer than two images.
    """
    if len(keys) < 2:
        raise SpecError(
            f"the source has {len(keys)} usable normal image(s); one to fit and one to calibrate are needed. "
            "Add images or state calibration.source."
        )
    count = min(max(1, round(ratio * len(keys))), len(keys) - 1)
    ranked = sorted(keys, key=lambda key: (keyed_unit(seed, "holdout", key), key))
    return frozenset(ranked[:count])


def padded_batches(pairs: Iterable[tuple[Member, Pixels]], batch_size: int, detector: Detector) -> Iterator[Batch]:
    """Batches of the ok images of one chunk, each of exactly `batch_size`; zeros under `PAD_KEY` fill up."""
    usable = [(member, pixels) for member, pixels in pairs if pixels.image_HWC is not None]
    for start in range(0, len(usable), batch_size):
        part = usable[start : start + batch_size]
        shape = part[0][1].image_HWC.shape  # type: ignore[union-attr]
        images_BHWC = np.zeros((batch_size, *shape), dtype=np.uint8)
        for i, (_, pixels) in enumerate(part):
            images_BHWC[i] = pixels.image_HWC
        keys = [member.key for member, _ in part] + [PAD_KEY] * (batch_size - len(part))
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(detector.device)
        yield Batch(images_BCHW, keys)


def collect(
    detector: Detector,
    images: ImageSource,
    keys: Collection[str],
    batch_size: int,
    tick: Callable[[int], None],
) -> FitState:
    """The merged state of all images in `keys`."""
    state = FitState()
    for pairs in images.chunks(keys):
        for batch in padded_batches(pairs, batch_size, detector):
            with torch.inference_mode():
                state = state.merge(detector.collect(batch))
        tick(len(pairs))
    state.items.pop(PAD_KEY, None)
    return state
