"""One training step of each detector that anomalib also implements, compared with anomalib: same sizes, batch, threads.

Both sides start from 8-bit images and random weights and end with the optimizer step; anomalib's Lightning modules are
called directly, without a Lightning Trainer. For CFLOW-AD, both sides take one optimizer step per batch of fibres of a
batch of images. For DRAEM, both simulate defects from the same texture files: anomalib in the step, raydetect those of
the next step beside it.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from jobs.bench.record import alternate, ratio, write
from jobs.bench.search import MEAN, STD
from raydetect.blocks.augment.textures import procedural_texture
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._registry import build_detector
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.reading.prepared_batches import cpu_threads, prepared_batches
from raydetect.fitting.train import Trainer
from raydetect.images.preprocess import Preprocess
from tests.builders.images import normal_image

BARE: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
RESNET: dict[str, Any] = {"backbone": "resnet18", "weights": "random"}
SIZE_PX, FIBRES, TEXTURES = 256, 256, 16


@dataclass(frozen=True)
class Peer:
    """One comparison.

    Attributes:
        name: name of the detector in the registry.
        params: our parameters that differ from the paper's.
        theirs: builds anomalib's Lightning module.
        images: number of images per batch.
        rounds: number of measurements of each side.
        normalised: whether anomalib's module gets normalised pixels instead of pixels in [0, 1].
    """

    name: str
    params: dict[str, Any]
    theirs: Callable[[], Any]
    images: int
    rounds: int = 7
    normalised: bool = True


def stfpm() -> Any:
    """Builds STFPM with random weights, at equal cost; its teacher would otherwise load pretrained ones."""
    from anomalib.models import Stfpm
    from anomalib.models.image.stfpm import torch_model

    def without_download(pre_trained: bool, **options: Any) -> Any:
        return extractor(pre_trained=False, **options)

    extractor = torch_model.TimmFeatureExtractor
    with patch.object(torch_model, "TimmFeatureExtractor", without_download):
        return Stfpm(**BARE)


def fastflow() -> Any:
    """Builds FastFlow with 8 steps on a ResNet-18."""
    from anomalib.models import Fastflow

    return Fastflow(pre_trained=False, **BARE)


def cflow(fibres: int) -> Any:
    """Builds CFLOW-AD with 8 couplings on a ResNet-18."""
    from anomalib.models import Cflow

    layers = ("layer2", "layer3")
    return Cflow(backbone="resnet18", layers=layers, pre_trained=False, fiber_batch_size=fibres, **BARE)


def draem(textures: str) -> Any:
    """Builds DRAEM with simulated defects from the textures in a folder."""
    from anomalib.models import Draem

    return Draem(dtd_dir=textures, **BARE)


def peers(textures: str) -> tuple[Peer, ...]:
    """All comparisons; `textures` is a folder of texture images for simulated defects."""
    two_levels = {**RESNET, "layers": ["layer2", "layer3"], "fibre_batch": FIBRES}
    return (
        Peer("stfpm", RESNET, stfpm, images=8),
        Peer("fastflow", RESNET, fastflow, images=8),
        Peer("cflow", two_levels, partial(cflow, FIBRES), images=2, rounds=5),
        Peer("draem", {"textures": textures}, partial(draem, textures), images=2, rounds=3, normalised=False),
    )


def write_textures(folder: str) -> None:
    """Writes procedural textures as PNG files."""
    for number in range(TEXTURES):
        texture_3HW = procedural_texture((SIZE_PX, SIZE_PX), keyed_generator(0, "texture", number))
        picture = (255 * texture_3HW).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(Path(folder) / f"{number:03d}.png")


def our_step(peer: Peer, images_BHWC: np.ndarray, pool: Executor) -> Callable[[], None]:
    """One batch of a training on a single worker, read from its cache."""
    size = (images_BHWC.shape[1], images_BHWC.shape[2])
    params = {**peer.params, "image_size": list(size), "batch_size": peer.images}
    detector = build_detector(peer.name, params)
    detector.load_weights()
    cache = ImageCache(Preprocess(size))
    for number, image_HWC in enumerate(images_BHWC):
        cache.add(CachedImage(f"{number:04d}", None, None), image_HWC)
    trainer = Trainer(detector, cache, list(cache.images), Group())
    plan = detector.begin_training(peer.images)
    loss_of, rates = trainer._loss_module(plan), [group["lr"] for group in plan.optimizer.param_groups]
    coming = prepared_batches(detector, cache, trainer._shares(plan, count()), pool)
    ready = [next(coming)]

    def step() -> None:
        trainer._steps(plan, loss_of, rates, *ready.pop())
        ready.append(next(coming))  # waits for what was prepared beside this step

    return step


def their_step(peer: Peer, images_BHWC: np.ndarray) -> Callable[[], None]:
    """The training step of anomalib's Lightning module."""
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
    module = peer.theirs().train()
    configured = module.configure_optimizers()
    optimizer = configured[0][0] if isinstance(configured, tuple | list) else configured
    module.log = lambda *_, **__: None
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()

    def step() -> None:
        pixels = images_BCHW.float() / 255
        batch = SimpleNamespace(image=(pixels - MEAN) / STD if peer.normalised else pixels)
        loss = module.training_step(batch)["loss"]
        if module.automatic_optimization:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def main() -> None:
    """Runs the benchmark and writes its results."""
    warnings.filterwarnings("ignore")
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {"threads": threads, "size_px": SIZE_PX, "anomalib_over_raydetect": {}}
    with tempfile.TemporaryDirectory() as textures, cpu_threads() as pool:
        write_textures(textures)
        for peer in peers(textures):
            images_BHWC = np.stack([normal_image(number, SIZE_PX) for number in range(peer.images)])
            theirs, ours = alternate(their_step(peer, images_BHWC), our_step(peer, images_BHWC, pool), peer.rounds)
            figures["anomalib_over_raydetect"][peer.name] = {"images": peer.images, **ratio(theirs, ours)}
            print(peer.name, figures["anomalib_over_raydetect"][peer.name], flush=True)
    write("training", "make bench", figures)


if __name__ == "__main__":
    main()
