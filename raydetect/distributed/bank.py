"""Actors that each hold one piece of a memory bank which is larger than one device.

The driver handles these classes too, so torch is loaded in the actors alone; `remote_search` is what asks them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from raydetect.artifact_record import read_record
from raydetect.distributed.ray_errors import ClusterError, translated
from raydetect.errors import SpecError
from raydetect.plan import ScorePlan, only_record
from raydetect.spec import ScoreSpec
from raydetect.storage import Storage

START_SECONDS = 1800  # a cluster may have to add nodes first
RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Bank:
    """The pieces of one bank.

    Attributes:
        actors: handles, in order of rows.
        num_rows: of the whole bank.
        dims: of a row.
    """

    actors: tuple[Any, ...]
    num_rows: int
    dims: int


class BankActor:
    """Searches one piece. A restarted one reads its rows again, so a lost actor costs time and nothing else."""

    def __init__(self, spec: ScoreSpec, artifact_uri: str, digest: str, number: int) -> None:
        """Loads the piece.

        Raises:
            SpecError: the artifact is another one than the driver planned with.
        """
        import torch

        from raydetect.worker.bank import piece_search

        torch.set_num_threads(spec.resources.cpus_per_worker)
        self.storage = Storage(spec.storage)
        self.record = read_record(artifact_uri, self.storage)
        if self.record.digest != digest:
            raise SpecError(f"{artifact_uri}: was replaced while the job started. Start the job again.")
        self.device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
        pieces = spec.resources.bank_shards
        self.search = piece_search(self.record, self.storage, number, pieces, self.device)

    def ready(self, verify: bool) -> None:
        """Returns when the piece is there; with `verify`, after the whole file's sha256 was checked."""
        from raydetect.worker.tensor_file import TensorFile

        if verify:
            TensorFile.of(self.record, self.storage).verify()

    def nearest(self, patches_ND: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
        """The K nearest rows of the piece, or all when it has fewer; numbers count from the piece's first row."""
        import torch

        count = min(num_neighbors, self.search.num_rows)
        with torch.inference_mode():
            distance_NK, index_NK = self.search.nearest(torch.tensor(patches_ND).to(self.device), count)
        return distance_NK.cpu().numpy(), index_NK.cpu().numpy()

    def rows(self, index_X: np.ndarray) -> np.ndarray:
        """Rows of the piece."""
        import torch

        return self.search.rows(torch.tensor(index_X).to(self.device)).cpu().numpy()


@contextmanager
def bank_actors(plan: ScorePlan, address: str | None) -> Iterator[Bank | None]:
    """The pieces of the plan's bank while the block runs; None when it is not cut.

    Raises:
        ArtifactError: the artifact is damaged.
        ClusterError: the actors do not start.
    """
    resources = plan.spec.resources
    if resources.bank_shards == 1:
        yield None
        return
    rows, dims = only_record(plan.artifact, plan.records).require_bank(resources.bank_shards)
    kind = ray.remote(BankActor).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    words = (plan.spec, plan.artifact.uri, plan.artifact.digest)
    actors = tuple(kind.remote(*words, number) for number in range(resources.bank_shards))
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
