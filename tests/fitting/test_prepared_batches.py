"""Images are prepared a batch ahead of the steps, on threads; what goes wrong there ends the training."""

import threading

import pytest
import torch
from torch import Tensor

from raydetect.blocks.coresets.group import Group
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector, detector_class
from raydetect.errors import SpecError
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.reading.prepared_batches import Share, cpu_threads, prepared_batches
from raydetect.fitting.train import Trainer
from raydetect.images.preprocess import Preprocess
from tests.builders.images import normal_image
from tests.fitting.test_train import KEYS, Small, filled, train

STEPS_PER_EPOCH = 3
EPOCHS = 5


def threads_of_pools() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("prepare")}


def test_the_next_batch_and_no_other_is_prepared_during_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_prepare, plain_loss = Small.prepare_image, Small.training_loss
    seen: list[tuple[int, int]] = []
    news = threading.Condition()

    def notes(self: Small, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        assert threading.current_thread() is not threading.main_thread() and not torch.is_grad_enabled()
        with news:
            seen.append((epoch, draw))
            news.notify_all()
        return plain_prepare(self, image_3HW, key, epoch, draw)

    def waits(self: Small, batch: Batch) -> Tensor:
        drawn = batch.epoch * len(KEYS) + max(batch.draws) + 1
        following = EPOCHS * len(KEYS) if batch.epoch == EPOCHS - 1 and drawn == EPOCHS * len(KEYS) else drawn + 3
        with news:
            assert news.wait_for(lambda: len(seen) >= min(following, EPOCHS * len(KEYS)), timeout=60)
            assert len(seen) <= drawn + 4  # batches have three or four images
        return plain_loss(self, batch)

    monkeypatch.setattr(Small, "prepare_image", notes)
    monkeypatch.setattr(Small, "training_loss", waits)
    train(Group())
    assert sorted(seen) == [(epoch, draw) for epoch in range(EPOCHS) for draw in range(len(KEYS))]
    assert not threads_of_pools()


@pytest.mark.parametrize("name", ["cutpaste", "draem", "memseg", "reverse_distillation_pp"])
def test_what_is_prepared_depends_on_no_number_of_threads(name: str, one_thread: None) -> None:
    detector = build_detector(name, dict(detector_class(name).smoke))
    cache = ImageCache(Preprocess((64, 64)))
    for number, key in enumerate(KEYS):
        cache.add(CachedImage(key, None, None), normal_image(number, 64))
    shares = [Share(epoch, 0, 1, 1.0, KEYS, list(range(len(KEYS)))) for epoch in range(3)]

    def found(threads: int) -> list[tuple[Tensor, ...]]:
        torch.set_num_threads(threads)
        with cpu_threads() as pool:
            return [batch.prepared for _, batch in prepared_batches(detector, cache, shares, pool)]

    one, many = found(1), found(4)
    assert len(one) == 3 and all(len(parts) > 0 and len(parts[0]) == len(KEYS) for parts in one)
    for alone, together in zip(one, many, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(one[0][-1], one[1][-1])
    share = Share(1, 0, 1, 0.5, KEYS[1::2], list(range(len(KEYS)))[1::2])
    with cpu_threads() as pool:
        ((_, half),) = prepared_batches(detector, cache, [share], pool)
    assert all(torch.equal(a, b[1::2]) for a, b in zip(half.prepared, one[1], strict=True))


def test_each_thread_computes_with_one_and_later_threads_with_all(one_thread: None) -> None:
    torch.set_num_threads(3)
    counts: list[int] = []
    with cpu_threads() as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(9))) == [1] * 9
        later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert counts == [3] and torch.get_num_threads() == 3


def test_what_goes_wrong_in_a_thread_ends_the_training_when_its_batch_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_prepare, plain_loss = Small.prepare_image, Small.training_loss
    steps: list[int] = []

    def breaks(self: Small, image_3HW: Tensor, key: str, epoch: int, draw: int) -> tuple[Tensor, ...]:
        if (epoch, draw) == (1, 5):
            raise SpecError("the image is too small for a defect. Raise image_size.")
        return plain_prepare(self, image_3HW, key, epoch, draw)

    def counts(self: Small, batch: Batch) -> Tensor:
        steps.append(batch.epoch)
        return plain_loss(self, batch)

    monkeypatch.setattr(Small, "prepare_image", breaks)
    monkeypatch.setattr(Small, "training_loss", counts)
    with pytest.raises(SpecError, match=r"^the image is too small for a defect\. Raise image_size\.$"):
        train(Group())
    assert steps == [0] * STEPS_PER_EPOCH + [1]
    assert not threads_of_pools()


def test_a_forecast_times_a_step_with_the_preparation_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"prepared": 0, "steps": 0}
    plain_prepare, plain_loss = Small.prepare_image, Small.training_loss

    def prepares(self: Small, *args: object) -> tuple[Tensor, ...]:
        counts["prepared"] += 1
        return plain_prepare(self, *args)  # type: ignore[arg-type]

    def steps(self: Small, batch: Batch) -> Tensor:
        counts["steps"] += 1
        return plain_loss(self, batch)

    monkeypatch.setattr(Small, "prepare_image", prepares)
    monkeypatch.setattr(Small, "training_loss", steps)
    trainer = Trainer(Small(Small.Params()), filled(KEYS), KEYS, Group())

    def seconds_of(work):  # type: ignore[no-untyped-def]
        before = dict(counts)
        work()
        assert counts == {"prepared": 12, "steps": 2} and before["steps"] == 1 and before["prepared"] >= 8
        return 6.0

    assert trainer.measure(len(KEYS), seconds_of) == (1.5, EPOCHS)
