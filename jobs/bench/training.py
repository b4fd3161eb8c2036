"""One training step of each detector that anomalib trains too, against anomalib's own: same sizes, batch and threads.

Both sides start from 8-bit images and random weights and end with the optimizer's step; anomalib's steps are those of
its Lightning modules, called without the rest of Lightning. CFLOW-AD takes an optimizer step for every batch of fibres
of a batch of images, on both sides.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from jobs.bench.record import alternate, ratio, write
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from tests.made.images import normal_image

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BARE: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
RESNET: dict[str, Any] = {"backbone": "resnet18", "weights": "random", "layers": ["layer1", "layer2", "layer3"]}


@dataclass(frozen=True)
class Peer:
    """One comparison.

    Attributes:
        name: of the registry.
        params: ours; the rest is the paper's.
        theirs: builds anomalib's Lightning module.
        images: of a batch.
        rounds: measurements of each side.
    """

    name: str
    params: dict[str, Any]
    theirs: Callable[[], Any]
    images: int
    rounds: int = 7


def stfpm() -> Any:
    """Its teacher takes pretrained weights without asking; random ones cost the same."""
    from anomalib.models import Stfpm
    from anomalib.models.image.stfpm import torch_model

    def without_download(pre_trained: bool, **words: Any) -> Any:
        return extractor(pre_trained=False, **words)

    extractor = torch_model.TimmFeatureExtractor
    with patch.object(torch_model, "TimmFeatureExtractor", without_download):
        return Stfpm(**BARE)


def fastflow() -> Any:
    """With 8 steps on a ResNet-18."""
    from anomalib.models import Fastflow

    return Fastflow(pre_trained=False, **BARE)


def cflow(fibres: int) -> Any:
    """With 8 couplings on a ResNet-18."""
    from anomalib.models import Cflow

    layers = ("layer2", "layer3")
    return Cflow(backbone="resnet18", layers=layers, pre_trained=False, fiber_batch_size=fibres, **BARE)


FIBRES = 256
PEERS = (
    Peer("stfpm", RESNET, stfpm, images=8),
    Peer("fastflow", RESNET, fastflow, images=8),
    Peer(
        "cflow",
        {**RESNET, "layers": ["layer2", "layer3"], "fibre_batch": FIBRES, "batch_size": 2},
        partial(cflow, FIBRES),
        images=2,
        rounds=5,
    ),
)


def our_step(peer: Peer, images_BCHW: torch.Tensor) -> Callable[[], None]:
    """The step of `worker.train` on one worker."""
    detector = build_detector(peer.name, {**peer.params, "image_size": list(images_BCHW.shape[-2:])})
    detector.load_weights()
    plan = detector.begin_training(len(images_BCHW))
    keys = [f"{number:04d}" for number in range(len(images_BCHW))]
    batch = Batch(images_BCHW, keys, None, 0, range(len(keys)))

    def step() -> None:
        for piece in detector.training_pieces(batch):
            loss = detector.training_loss(piece)
            float(loss.detach())
            plan.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            plan.optimizer.step()

    return step


def their_step(peer: Peer, images_BCHW: torch.Tensor) -> Callable[[], None]:
    """The step that Lightning would take."""
    module = peer.theirs().train()
    found = module.configure_optimizers()
    optimizer = found[0][0] if isinstance(found, tuple | list) else found
    module.log = lambda *_, **__: None
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()

    def step() -> None:
        batch = SimpleNamespace(image=(images_BCHW.float() / 255 - MEAN) / STD)
        loss = module.training_step(batch)["loss"]
        if module.automatic_optimization:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def main() -> None:
    """Measures and writes."""
    warnings.filterwarnings("ignore")
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {"threads": threads, "size_px": 256, "anomalib_over_raydetect": {}}
    for peer in PEERS:
        arrays = [normal_image(number, 256) for number in range(peer.images)]
        images_BCHW = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        theirs, ours = alternate(their_step(peer, images_BCHW), our_step(peer, images_BCHW), peer.rounds)
        figures["anomalib_over_raydetect"][peer.name] = {"images": peer.images, **ratio(theirs, ours)}
        print(peer.name, figures["anomalib_over_raydetect"][peer.name], flush=True)
    write("training", "make bench", figures)


if __name__ == "__main__":
    main()
