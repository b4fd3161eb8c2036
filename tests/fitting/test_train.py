"""Training on one and two workers in float64, where only a mistake could tell them apart; kept states; batches."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raydetect.blocks.coresets.group import Group, TorchGroup
from raydetect.blocks.networks.volume_norm import VolumeNorm
from raydetect.blocks.seeding import keyed_generator
from raydetect.detectors._base import Batch, Detector, DetectorInfo, Scores, TrainingPlan
from raydetect.errors import SpecError, StorageError
from raydetect.fitting.checkpoints import Checkpoints
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.train import Trainer, TrainingDiverged, even_batches, whole_items
from raydetect.images.preprocess import Preprocess
from raydetect.storage import Storage

SIZE_PX = 6


class Small(Detector):
    """Two convolutions with batch norm that learn an image's mean, with keyed noise; everything in float64."""

    info = DetectorInfo(title="Small", paper="-", venue="-", summary="-")
    phases = ("train",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params(Detector.Params):
        """None of its own."""

    def load_weights(self) -> str:
        return "none"

    def begin_training(self, num_images: int) -> TrainingPlan:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)]
        self.net = nn.Sequential(*layers).double().train()
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        return TrainingPlan(
            self.net, optimizer, epochs=5, batch_size=4, rate=lambda done: 0.5 ** (done // 2), max_gradient_norm=1.0
        )

    def prepare_image(self, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        return (torch.randn(image_3HW.shape, generator=keyed_generator(1, epoch, key, draw)),)

    def training_loss(self, batch: Batch) -> Tensor:
        images = batch.images_BCHW.double() / 255
        found = self.net(images + 0.1 * batch.prepared[0])
        return (found - images.mean((1, 2, 3))[:, None, None, None]).square().mean()

    def end_training(self) -> None:
        self.net.eval()

    def score(self, images_BCHW: Tensor) -> Scores:
        raise AssertionError("not scored here")

    def tensors(self) -> dict[str, Tensor]:
        return self.net.state_dict()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        raise AssertionError("not loaded here")

    def to(self, device: torch.device) -> "Small":
        return self


class Paired(Small):
    """Convolutions with both volume norms; the outputs for two images of a pair are to be a keyed distance apart."""

    def begin_training(self, num_images: int) -> TrainingPlan:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            norms = VolumeNorm("channel", 4, (4, 4)), VolumeNorm("spatial", 2, (2, 2))
            layers = [nn.Conv2d(3, 4, 3), norms[0], nn.Tanh(), nn.Conv2d(4, 2, 3), norms[1]]
        self.net = nn.Sequential(*layers).double().train()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=1.0)
        return TrainingPlan(self.net, optimizer, 5, 6, images_per_item=2, max_gradient_norm=0.01)

    def training_loss(self, batch: Batch) -> Tensor:
        first, second = self.net(batch.images_BCHW.double() / 255).unflatten(0, (-1, 2)).unbind(1)
        pairs = zip(batch.keys[0::2], batch.keys[1::2], batch.draws[0::2], strict=True)
        apart = [torch.rand(2, 2, 2, generator=keyed_generator(1, batch.epoch, *pair)) for pair in pairs]
        return (first - second - torch.stack(apart)).square().mean()


def filled(keys: list[str]) -> ImageCache:
    """Random images that are functions of their keys."""
    cache = ImageCache(Preprocess((SIZE_PX, SIZE_PX)))
    for key in keys:
        pixels = np.random.default_rng([int(key)]).integers(0, 256, (SIZE_PX, SIZE_PX, 3)).astype(np.uint8)
        cache.add(CachedImage(key, None, None), pixels)
    return cache


KEYS = [str(i) for i in range(11)]


def train(
    group: Group, checkpoints: Checkpoints | None = None, kind: type[Small] = Small
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights; every worker has read every size-th image."""
    cache = filled(KEYS[group.rank :: group.size])
    cache.share(group, lambda _: True)
    detector = kind(kind.Params())
    losses = Trainer(detector, cache, KEYS, group, checkpoints=checkpoints).run(lambda *_: None)
    return losses, {name: value.double() for name, value in detector.tensors().items()}


def _process(rank: int, size: int, folder: str, kind: type[Small]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    losses, tensors = train(TorchGroup(), kind=kind)
    Path(folder, f"{rank}.json").write_text(json.dumps([losses, {n: v.tolist() for n, v in tensors.items()}]))
    dist.barrier()
    os._exit(0)  # gloo's threads abort a process that ends in the ordinary way


@pytest.mark.parametrize("kind", [Small, Paired])
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_global_batches_on_any_number_of_workers(size: int, kind: type[Small], tmp_path: Path) -> None:
    losses, tensors = train(Group(), kind=kind)
    assert len(losses) == 5 and losses[-1] < losses[0]
    multiprocessing.spawn(_process, (size, str(tmp_path), kind), nprocs=size)
    for rank in range(size):
        other_losses, other = json.loads((tmp_path / f"{rank}.json").read_text())
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, value in tensors.items():
            np.testing.assert_allclose(np.array(other[name]), value.numpy(), rtol=1e-6, atol=1e-9, err_msg=name)


def test_every_draw_of_an_epoch_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str, int]] = []
    plain = Small.training_loss

    def notes(self: Small, batch: Batch) -> Tensor:
        seen.extend((batch.epoch, key, draw) for key, draw in zip(batch.keys, batch.draws, strict=True))
        return plain(self, batch)

    monkeypatch.setattr(Small, "training_loss", notes)
    train(Group())
    for epoch in range(5):
        mine = [(key, draw) for number, key, draw in seen if number == epoch]
        assert [draw for _, draw in mine] == list(range(len(KEYS))) and {key for key, _ in mine} == set(KEYS)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_items_stay_whole_and_every_image_is_used(size: int) -> None:
    crowd = Group()
    crowd.size = size
    trainer = Trainer(Paired(Paired.Params()), filled(KEYS), KEYS, crowd)
    plan = trainer.detector.begin_training(len(KEYS))
    for epoch in range(3):
        batches = trainer._batches(plan, epoch)
        order = [key for batch in batches for key in batch]
        assert set(order) == set(KEYS) and order[-1] == order[0] and len(order) == len(KEYS) + 1
        assert [len(batch) for batch in batches] == [6, 6]
        for batch in batches:
            pairs = [tuple(batch[i : i + 2]) for i in range(0, len(batch), 2)]
            shares = []
            for crowd.rank in range(size):
                mine = trainer._share(batch, plan)
                assert [batch[i] for i in trainer._share(range(len(batch)), plan)] == mine
                shares += [tuple(mine[i : i + 2]) for i in range(0, len(mine), 2)]
            assert sorted(shares) == sorted(pairs)


@given(st.integers(1, 30), st.integers(1, 7))
def test_the_last_item_is_completed_with_the_first_images(count: int, images_per_item: int) -> None:
    keys = [str(i) for i in range(count)]
    items = whole_items(keys, images_per_item)
    flat = [key for item in items for key in item]
    assert all(len(item) == images_per_item for item in items) and len(flat) - count < images_per_item
    assert flat == [keys[i % count] for i in range(len(flat))]


def test_a_gradient_is_clipped_over_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    plain = torch.optim.SGD.step

    def notes(self: torch.optim.SGD, *args: object) -> None:
        grads = [value.grad for group in self.param_groups for value in group["params"]]
        norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        plain(self)

    monkeypatch.setattr(torch.optim.SGD, "step", notes)
    train(Group(), kind=Paired)
    assert max(norms) == pytest.approx(0.01, rel=1e-3) and len(norms) == 10
    begin = Paired.begin_training
    monkeypatch.setattr(
        Paired, "begin_training", lambda self, images: replace(begin(self, images), max_gradient_norm=None)
    )
    norms.clear()
    train(Group(), kind=Paired)
    assert norms[0] > 0.02


def test_a_kept_state_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(Group())
    checkpoints = Checkpoints(f"file://{tmp_path}/states", Storage(), every=2)
    plain, count = Small.training_loss, 0

    def dies(self: Small, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        if batch.epoch == 3:
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(Small, "training_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train(Group(), checkpoints)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["epoch-000002.safetensors"]
    monkeypatch.setattr(Small, "training_loss", plain)
    resumed = train(Group(), checkpoints)
    assert resumed[0] == whole[0]
    assert all(torch.equal(value, whole[1][name]) for name, value in resumed[1].items())
    checkpoints.clear()
    assert not list((tmp_path / "states").iterdir())
    Storage().write(f"file://{tmp_path}/states/epoch-000001.safetensors", b"nothing of use")
    with pytest.raises(StorageError, match="not a checkpoint of this fit"):
        train(Group(), checkpoints)
    other = nn.Linear(1, 2)
    checkpoints.save(other, torch.optim.SGD(other.parameters(), 0.1), [1.0])
    with pytest.raises(StorageError, match=r"epoch-000001\.safetensors: is not a checkpoint of this fit .*Remove it"):
        train(Group(), checkpoints)


def length(parts: Iterable[Tensor]) -> float:
    """L2 norm of all values together."""
    return float(torch.cat([part.flatten() for part in parts]).norm())


@pytest.mark.parametrize("limit", [None, 0.01, 100.0])
def test_only_a_gradient_above_the_limit_is_clipped(limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[float, float]] = []
    plain = Small.begin_training

    def begins(self: Small, num_images: int) -> TrainingPlan:
        plain(self, num_images)
        return TrainingPlan(self.net, torch.optim.SGD(self.net.parameters(), 1.0), 1, 4, max_gradient_norm=limit)

    def step(self: Trainer, plan: TrainingPlan, *others: Any) -> float:
        values = list(plan.module.parameters())
        before = [value.detach().clone() for value in values]
        gradients = torch.autograd.grad(self.detector.training_loss(others[1]), values)
        found = one_step(self, plan, *others)
        moved = [was - value.detach() for was, value in zip(before, values, strict=True)]
        steps.append((length(gradients), length(moved)))
        return found

    one_step = Trainer._step
    monkeypatch.setattr(Small, "begin_training", begins)
    monkeypatch.setattr(Trainer, "_step", step)
    train(Group())
    assert len(steps) == 3 and steps[0][0] > 1
    for gradient, moved in steps:
        assert moved == pytest.approx(gradient if limit is None else min(gradient, limit), rel=1e-3)


@given(st.integers(1, 200), st.integers(1, 40))
def test_batches_are_even_and_complete(count: int, batch_size: int) -> None:
    keys = [str(i) for i in range(count)]
    batches = even_batches(keys, batch_size)
    assert [key for batch in batches for key in batch] == keys
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-count // batch_size)


def test_a_loss_that_is_not_finite_stops_and_too_many_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Group()
    crowd.size = 5
    trainer = Trainer(Small(Small.Params()), filled(KEYS), KEYS, crowd)
    monkeypatch.setattr(Trainer, "_loss_module", lambda self, plan: None)
    with pytest.raises(SpecError, match=r"Lower resources\.num_workers"):
        trainer.run(lambda *_: None)
    pairs = Trainer(Paired(Paired.Params()), filled(KEYS), KEYS, crowd)
    with pytest.raises(SpecError, match="fewer sets of 2 images than the 5 workers"):
        pairs.run(lambda *_: None)
    monkeypatch.undo()
    monkeypatch.setattr(Small, "training_loss", lambda self, batch: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainingDiverged, match="epoch 1"):
        train(Group())
