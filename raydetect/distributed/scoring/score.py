"""Scoring on Ray Data: read tasks feed actors, actors score chunks and the driver commits shards."""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy

from raydetect.artifacts.fleet import ArtifactIndex
from raydetect.config import ScoreSpec
from raydetect.distributed.chunk_dataset import Reading, chunk_dataset, unpack_chunks
from raydetect.distributed.ray_errors import deliberate, translated
from raydetect.distributed.scoring.bank_actors import Bank, bank_actors
from raydetect.distributed.session import session
from raydetect.errors import RaydetectError, SpecError, error_of, error_text
from raydetect.planning.committer import OnProgress, commit_all
from raydetect.planning.plan import ScorePlan, finish
from raydetect.sinks.parquet import ResultsSink
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import Storage

CHUNKS_IN_FLIGHT, CHUNKS_WAITING = 4, 2  # per actor


class ScoreActor:
    """A Ray actor that keeps a Scorer loaded. The driver imports this class too, so only the actor imports torch."""

    def __init__(self, spec: ScoreSpec, artifact: ArtifactIndex, sink: ResultsSink, bank: Bank | None) -> None:
        """Loads an ordinary artifact, without its memory bank if that is sharded over other actors.

        The detectors of a fleet are loaded when they are needed. An error of it ends the run at the first chunk.
        """
        self.failure: RaydetectError | None = None
        try:
            self._load(spec, artifact, bank)
        except RaydetectError as error:  # Ray would pass on the text alone, after it has tried again
            self.failure = error
        self.sink = sink

    def _load(self, spec: ScoreSpec, artifact: ArtifactIndex, bank: Bank | None) -> None:
        import torch

        from raydetect.artifacts.store import StoredDetectors
        from raydetect.scoring.device_queue import DeviceQueue
        from raydetect.scoring.garbage import spare_what_is_loaded
        from raydetect.scoring.scorer import Scorer

        torch.set_num_threads(spec.resources.cpus_per_worker)
        spare_what_is_loaded()
        search = None
        if bank is not None:
            from raydetect.distributed.scoring.remote_search import RemoteSearch

            search = RemoteSearch(bank)
        detectors = StoredDetectors(artifact, Storage(spec.storage), search)
        self.scorer = Scorer(detectors, spec, DeviceQueue("cuda" if spec.resources.gpus_per_worker else "cpu"))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Scores chunks; returns each as `ScoredChunk.to_bytes`, or the error that ends the run.

        Several threads call it, so that decoding and writing overlap with the device. The driver would only receive a
        raised exception as text.
        """
        from raydetect.scoring.scorer import score_and_write

        try:
            if self.failure is not None:
                raise self.failure
            scored = [score_and_write(self.scorer, self.sink, chunk).to_bytes() for chunk in unpack_chunks(table)]
        except Exception as error:
            deliberate_error = deliberate(error)
            if deliberate_error is None:
                raise
            return pa.table({"chunk": pa.array([b""], pa.large_binary()), "error": [error_text(deliberate_error)]})
        return pa.table({"chunk": pa.array(scored, pa.large_binary()), "error": [""] * len(scored)})


def score(plan: ScorePlan, address: str | None, on_progress: OnProgress) -> dict[str, Any]:
    """Scores the remaining shards of a plan on Ray and returns the manifest.

    Args:
        plan: the scoring plan.
        address: cluster address, or None (see `session`).
        on_progress: called with each scored chunk, and with each receipt.

    Raises:
        ArchiveError: a shard or member is bad and the source is set to `fail`.
        ClusterError: the cluster failed; committed shards are kept.
        TooManyBadRows: the run is complete but too many rows are bad.
    """
    refuse_memory_uris([plan.ledger.uri, plan.artifact.uri, *(shard.uri for shard in plan.shards[:1])])
    plan.begin()
    if plan.todo:
        with session(address, plan.spec.resources), bank_actors(plan, address) as bank:
            commit_all(plan, _scored(plan, address, bank), on_progress)
    return finish(plan)


def refuse_memory_uris(uris: Iterable[str]) -> None:
    """Rejects `memory://` URIs, which are visible to one process only.

    Raises:
        SpecError: one of the URIs starts with `memory://`.
    """
    for uri in uris:
        if uri.startswith("memory://"):
            raise SpecError(f"{uri}: memory:// is not shared between processes. Use --local or another storage.")


def _scored(plan: ScorePlan, address: str | None, bank: Bank | None) -> Iterator[ScoredChunk]:
    spec, resources = plan.spec, plan.spec.resources
    reading = Reading(
        plan.archive,
        spec.source,
        spec.chunk_images,
        spec.chunk_bytes,
        readers=max(2, resources.num_workers),
        consumers=resources.num_workers,
    )
    chunks = chunk_dataset(reading, plan.todo)
    scored = chunks.map_batches(
        ScoreActor,
        fn_constructor_kwargs={
            "spec": plan.spec,
            "artifact": plan.artifact,
            "sink": plan.sink,
            "bank": bank,
        },
        batch_format="pyarrow",
        batch_size=1,
        compute=ActorPoolStrategy(
            size=resources.num_workers,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=CHUNKS_IN_FLIGHT,
            max_tasks_in_flight_per_actor=CHUNKS_IN_FLIGHT + CHUNKS_WAITING,
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    with translated(address):
        for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for data, error in zip(batch["chunk"], batch["error"].to_pylist(), strict=True):
                if error:
                    raise error_of(error)
                yield ScoredChunk.from_bytes(data.as_buffer())
