"""Distributes chunks to fit workers. Apart from `fit`, so that the Ray process involved does not import torch."""

import copy
from typing import Any

import ray.train
from ray.data import DataIterator, Dataset

from raydetect.distributed.chunk_dataset import Reading, limits


class ChunkSplit(ray.train.DataConfig):  # type: ignore[misc]
    """Sends each chunk to exactly one worker. Ray's own splitting drops rows until all workers have equally many."""

    def __init__(self, reading: Reading) -> None:
        """Stores how the archive is read."""
        super().__init__()
        self.reading = reading

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, worker_handles: Any, worker_node_ids: Any, **options: Any
    ) -> list[dict[str, DataIterator]]:
        """See `ray.train.DataConfig`."""
        iterators: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            split_dataset = copy.copy(dataset)
            split_dataset.context.execution_options.resource_limits = limits(self.reading)
            splits = split_dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for worker_iterators, split in zip(iterators, splits, strict=True):
                worker_iterators[name] = split
        return iterators
