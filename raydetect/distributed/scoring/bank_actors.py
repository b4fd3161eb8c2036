"""Actors that each hold one shard of a memory bank too large for one device.

The driver imports these classes too, so only the actors import torch. `remote_search` queries them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from raydetect.artifacts.record import read_record
from raydetect.config import ScoreSpec
from raydetect.distributed.ray_errors import ClusterError, translated
from raydetect.errors import SpecError
from raydetect.planning.plan import ScorePlan, only_record
from raydetect.storage import Storage

START_SECONDS = 1800  # the cluster may have to add nodes first
RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Bank:
    """The shards of one bank.

    Attributes:
        actors: actor handles, in row order.
        num_rows: rows in the whole bank.
        dims: length of a row.
    """

    actors: tuple[Any, ...]
    num_rows: int
    dims: int


class BankActor:
    """Searches one shard. A restarted actor reads its rows again, so losing an actor only costs time."""

    def __init__(self, spec: ScoreSpec, artifact_uri: str, digest: str, number: int) -> None:
        """Loads the shard.

        Raises:
            SpecError: the artifact is not the one the driver planned with.
        """
        import torch

        from raydetect.artifacts.sharded_bank import piece_search

        torch.set_num_threads(spec.resources.cpus_per_worker)
        self.storage = Storage(spec.storage)
        self.record = read_record(artifact_uri, self.storage)
        if self.record.digest != digest:
            raise SpecError(f"{artifact_uri}: was replaced while the job started. Start the job again.")
        self.device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
        pieces = spec.resources.bank_shards
        self.search = piece_search(self.record, self.storage, number, pieces, self.device)

    def ready(self, verify: bool) -> None:
        """Returns once the shard is loaded; with `verify`, also checks the sha256 of the whole file."""
        from raydetect.artifacts.tensor_file import TensorFile

        if verify:
            TensorFile.of(self.record, self.storage).verify()

    def nearest(self, patches_ND: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and indices, within the shard, of the K nearest rows; of all rows if the shard has fewer."""
        import torch

        count = min(num_neighbors, self.search.num_rows)
        with torch.inference_mode():
            distance_NK, index_NK = self.search.nearest(torch.tensor(patches_ND).to(self.device), count)
        return distance_NK.cpu().numpy(), index_NK.cpu().numpy()

    def rows(self, index_X: np.ndarray) -> np.ndarray:
        """Returns rows by their index within the shard."""
        import torch

        return self.search.rows(torch.tensor(index_X).to(self.device)).cpu().numpy()


@contextmanager
def bank_actors(plan: ScorePlan, address: str | None) -> Iterator[Bank | None]:
    """Holds the plan's bank in actors while the block runs; yields None if the bank is not sharded.

    Raises:
        ArtifactError: the artifact is damaged.
        ClusterError: the actors do not start.
    """
    resources = plan.spec.resources
    if resources.bank_shards == 1:
        yield None
        return
    rows, dims = only_record(plan.artifact, plan.records).require_bank(resources.bank_shards)
    actor_class = ray.remote(BankActor).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    arguments = (plan.spec, plan.artifact.uri, plan.artifact.digest)
    actors = tuple(actor_class.remote(*arguments, number) for number in range(resources.bank_shards))
    try:
        _wait(actors, address)
        yield Bank(actors, rows, dims)
    finally:
        for actor in actors:
            ray.kill(actor)


def _wait(actors: tuple[Any, ...], address: str | None) -> None:
    with translated(address):
        ready = [actor.ready.remote(verify=number == 0) for number, actor in enumerate(actors)]
        try:
            ray.get(ready, timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(
                f"{address or 'the local Ray'}: {len(actors)} bank actors did not start in {START_SECONDS} s. The "
                "cluster needs CPU slots and GPUs for num_workers + bank_shards actors."
            ) from None
