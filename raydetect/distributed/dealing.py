"""Chunks dealt to the workers of a fit. Ray's process that deals loads no torch, so it is apart from `fit`."""

import copy
from typing import Any

import ray.train
from ray.data import DataIterator, Dataset

from raydetect.distributed.ingest import Reading, limits


class EveryChunk(ray.train.DataConfig):  # type: ignore[misc]
    """Deals every chunk to one worker. Ray's own splitting drops rows until all workers have equally many."""

    def __init__(self, reading: Reading) -> None:
        """Deals what `reading` reads."""
        super().__init__()
        self.reading = reading

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, worker_handles: Any, worker_node_ids: Any, **words: Any
    ) -> list[dict[str, DataIterator]]:
        """See `ray.train.DataConfig`."""
        dealt: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            mine = copy.copy(dataset)
            mine.context.execution_options.resource_limits = limits(self.reading)
            splits = mine.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for words_of, split in zip(dealt, splits, strict=True):
                words_of[name] = split
        return dealt
