"""Trains a gradient-based detector on one or several workers, with the same global batches for any number of workers.

Every worker holds all images and takes every size-th item of each global batch: an image, or the images that a loss
looks at together. Gradients are averaged by DistributedDataParallel, and norms over batches see the whole batch. The
order depends on seed and epoch only, and an epoch is split into batches of nearly equal size, so that none is too small
for the workers. Learning rates are a function of the completed epochs, so resuming needs only tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydetect.blocks.coresets.group import Group
from raydetect.blocks.networks.sync_norm import shared_norms
from raydetect.blocks.seeding import shuffled
from raydetect.detectors._base import Batch, Detector, Known, TrainingPlan
from raydetect.errors import RaydetectError, SpecError
from raydetect.fitting.checkpoints import Checkpoints
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.prepared_batches import Share, cpu_threads, prepared_batches

Part = TypeVar("Part")


class TrainingDiverged(RaydetectError):
    """The loss became NaN or infinite."""


class _Loss(nn.Module):
    """A detector's loss as a module, so that DistributedDataParallel can wrap its parameters."""

    def __init__(self, detector: Detector, module: nn.Module) -> None:
        super().__init__()
        self.trained = module
        self.detector = detector

    def forward(self, piece: Any) -> Tensor:
        return self.detector.training_loss(piece)


@dataclass(slots=True)
class Trainer:
    """One worker's part of a training run.

    Attributes:
        detector: with weights loaded.
        cache: holds all images of `keys`.
        keys: images to train on, the same on every worker.
        group: the workers.
        checkpoints: where checkpoints are checkpoint; None = nowhere.
        resumed_epochs: number of epochs that were restored from a checkpoint.
    """

    detector: Detector
    cache: ImageCache
    keys: list[str]
    group: Group
    checkpoints: Checkpoints | None = None
    resumed_epochs: int = 0

    def run(self, on_progress: Callable[[int, int], None]) -> list[float]:
        """Trains to the end and returns the mean loss of every epoch.

        Args:
            on_progress: called with the number of newly completed batches and the total.

        Raises:
            TrainingDiverged: a loss is not finite.
            SpecError: a batch has fewer items than there are workers.
        """
        plan = self.detector.begin_training(len(self.keys))
        checkpoint = self.checkpoints.last() if self.checkpoints else None
        losses = [] if checkpoint is None else checkpoint.losses
        self.resumed_epochs = len(losses)
        rates = [float(param_group["lr"]) for param_group in plan.optimizer.param_groups]
        if checkpoint is not None:
            checkpoint.restore(plan.module, plan.optimizer)
        loss_of, of_epoch = self._loss_module(plan), list[float]()
        with shared_norms(plan.module) if self.group.size > 1 else nullcontext(), cpu_threads() as pool:
            shares = self._shares(plan, range(self.resumed_epochs, plan.epochs))
            for share, batch in prepared_batches(self.detector, self.cache, shares, pool):
                if (share.epoch, share.number) == (self.resumed_epochs, 0):
                    on_progress(share.epoch * share.batches, plan.epochs * share.batches)
                of_epoch += self._steps(plan, loss_of, rates, share, batch)
                on_progress(1, plan.epochs * share.batches)
                if share.number + 1 == share.batches:
                    losses.append(sum(of_epoch) / len(of_epoch))
                    of_epoch = []
                    self._keep(plan, losses)
        self.detector.end_training()
        return losses

    def measure(self, num_images: int, seconds_of: Callable[[Callable[[], object]], float]) -> tuple[float, int]:
        """Trains on one batch twice; returns the seconds of the second time for each image, and the epochs of a fit.

        They include the preparation of a third batch, which a training waits for only if it takes longer than the step.

        Args:
            num_images: of the fit to forecast.
            seconds_of: runs a function and returns how long it took.
        """
        plan = self.detector.begin_training(num_images)
        rates = [float(param_group["lr"]) for param_group in plan.optimizer.param_groups]
        loss_of = self._loss_module(plan)
        share = next(self._shares(plan, [0]))

        with cpu_threads() as pool:
            coming = prepared_batches(self.detector, self.cache, [share] * 3, pool)

            def train(batch: Batch) -> Batch:
                self._steps(plan, loss_of, rates, share, batch)
                return next(coming)[1]

            second = train(next(coming)[1])  # the first time is slower
            seconds = seconds_of(lambda: train(second))
        self.detector.end_training()
        return seconds / len(share.keys), plan.epochs

    def _loss_module(self, plan: TrainingPlan) -> nn.Module:
        loss = _Loss(self.detector, plan.module)
        if self.group.size == 1:
            return loss
        return DistributedDataParallel(loss, broadcast_buffers=False, find_unused_parameters=not plan.all_in_every_step)

    def _keep(self, plan: TrainingPlan, losses: list[float]) -> None:
        due = self.checkpoints is not None and len(losses) % self.checkpoints.every == 0
        if due and self.group.rank == 0 and len(losses) < plan.epochs:
            assert self.checkpoints is not None
            self.checkpoints.save(plan.module, plan.optimizer, losses)

    def _shares(self, plan: TrainingPlan, epochs: Iterable[int]) -> Iterator[Share]:
        """This worker's shares of all batches."""
        for epoch in epochs:
            batches, drawn = self._batches(plan, epoch), 0
            for number, keys in enumerate(batches):
                mine = self._share(keys, plan)
                draws = self._share(range(drawn, drawn + len(keys)), plan)
                drawn += len(keys)
                yield Share(epoch, number, len(batches), len(mine) / len(keys), mine, draws)

    def _steps(
        self, plan: TrainingPlan, loss_of: nn.Module, rates: list[float], share: Share, batch: Batch
    ) -> list[float]:
        """Takes the steps of a batch at its learning rates; returns their losses."""
        factor = plan.rate(share.epoch + share.number / share.batches)
        for param_group, rate in zip(plan.optimizer.param_groups, rates, strict=True):
            param_group["lr"] = rate * factor
        pieces = self.detector.training_pieces(batch)
        return [self._step(plan, loss_of, piece, share.ratio, share.epoch) for piece in pieces]

    def _share(self, parts: Sequence[Part], plan: TrainingPlan) -> list[Part]:
        """What belongs to this worker's images of a batch: every size-th item, whole."""
        return [part for i, part in enumerate(parts) if i // plan.images_per_item % self.group.size == self.group.rank]

    def _batches(self, plan: TrainingPlan, epoch: int) -> list[list[str]]:
        each = plan.images_per_item
        if plan.batches is not None:
            images = {key: self.cache.images[key] for key in self.keys}
            known = {key: Known(image.label or 0, image.category) for key, image in images.items()}
            batches = plan.batches(known, epoch)
        else:
            items = whole_items(shuffled(self.keys, self.detector.seed, epoch), each)
            batches = [list(chain(*batch)) for batch in even_batches(items, plan.batch_size // each)]
        if min(map(len, batches)) // each < self.group.size:
            what = "images" if each == 1 else f"sets of {each} images"
            raise SpecError(
                f"{len(self.keys)} images in batches of {plan.batch_size} leave a batch with fewer {what} than the "
                f"{self.group.size} workers. Lower resources.num_workers."
            )
        return batches

    def _step(self, plan: TrainingPlan, loss_of: nn.Module, piece: Any, share: float, epoch: int) -> float:
        """Takes one optimizer step; returns the loss over the images of all workers, of which this one has `share`."""
        loss = loss_of(piece)
        value = float(self.group.sum(loss.detach().double().cpu() * share))
        if not np.isfinite(value):
            raise TrainingDiverged(
                f"the loss became {value} in epoch {epoch + 1}. Lower the learning rate or check the images."
            )
        plan.optimizer.zero_grad(set_to_none=True)
        (loss * share * self.group.size if self.group.size > 1 else loss).backward()  # DDP divides by size
        if plan.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(plan.module.parameters(), plan.max_gradient_norm)
        plan.optimizer.step()
        return value


def whole_items(order: Sequence[str], images_per_item: int) -> list[list[str]]:
    """Consecutive items of an epoch's order; the last one is completed with the first keys, so that all are used."""
    missing = -len(order) % images_per_item
    keys = [*order, *islice(cycle(order), missing)]
    return [keys[start : start + images_per_item] for start in range(0, len(keys), images_per_item)]


def even_batches(items: Sequence[Part], batch_size: int) -> list[list[Part]]:
    """Splits items into consecutive batches of at most `batch_size`; sizes differ by at most one, smaller ones last."""
    count = -(-len(items) // batch_size)
    least, longer = divmod(len(items), count)
    batches: list[list[Part]] = []
    start = 0
    for number in range(count):
        stop = start + least + (number < longer)
        batches.append(list(items[start:stop]))
        start = stop
    return batches
