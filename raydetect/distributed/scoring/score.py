"""Scoring on Ray Data: read tasks feed actors, actors write parts and the driver commits shards."""

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy

from raydetect.artifacts.fleet import ArtifactIndex
from raydetect.config import ScoreSpec
from raydetect.config.validation import to_plain, validate
from raydetect.distributed.chunk_dataset import Reading, chunk_dataset, unpack_chunks
from raydetect.distributed.ray_errors import deliberate, translated
from raydetect.distributed.scoring.bank_actors import Bank, bank_actors
from raydetect.distributed.session import session
from raydetect.errors import RaydetectError, SpecError, error_of, error_text
from raydetect.planning.plan import Committer, ScorePlan, finish
from raydetect.records import Part, Receipt
from raydetect.sinks.parquet import ResultsSink
from raydetect.storage import Storage

CHUNKS_WAITING_PER_ACTOR = 2


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
        from raydetect.scoring.scorer import Scorer

        torch.set_num_threads(spec.resources.cpus_per_worker)
        search = None
        if bank is not None:
            from raydetect.distributed.scoring.remote_search import RemoteSearch

            search = RemoteSearch(bank)
        detectors = StoredDetectors(artifact, Storage(spec.storage), search)
        self.scorer = Scorer(detectors, spec, "cuda" if spec.resources.gpus_per_worker else "cpu")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Scores and writes chunks; returns their parts as JSON, or the error that ends the run.

        The driver would only receive a raised exception as text.
        """
        try:
            parts = self._parts(table)
        except Exception as error:
            found = deliberate(error)
            if found is None:
                raise
            return pa.table({"part": [""], "error": [error_text(found)]})
        return pa.table({"part": parts, "error": [""] * len(parts)})

    def _parts(self, table: pa.Table) -> list[str]:
        if self.failure is not None:
            raise self.failure
        parts = []
        for chunk in unpack_chunks(table):
            started = time.perf_counter()
            result = self.scorer.score_chunk(chunk)
            part = self.sink.write(chunk, result.rows, result.pictures, result.clipped_pixels)
            part = replace(part, seconds=round(time.perf_counter() - started, 3), host=socket.gethostname())
            parts.append(json.dumps(to_plain(part)))
        return parts


def score(plan: ScorePlan, address: str | None, on_part: Callable[[Part, Receipt | None], None]) -> dict[str, Any]:
    """Scores the remaining shards of a plan on Ray and returns the manifest.

    Args:
        plan: the scoring plan.
        address: cluster address, or None (see `session`).
        on_part: called with each part, and with the receipt if the part completed its shard.

    Raises:
        ArchiveError: a shard or member is bad and the source is set to `fail`.
        ClusterError: the cluster failed; committed shards are kept.
        TooManyBadRows: the run is complete but too many rows are bad.
    """
    refuse_memory_uris([plan.ledger.uri, plan.artifact.uri, *(shard.uri for shard in plan.shards[:1])])
    plan.begin()
    if plan.todo:
        with session(address, plan.spec.resources), bank_actors(plan, address) as bank:
            committer = Committer(plan)
            for part in _parts(plan, address, bank):
                on_part(part, committer.add(part))
    return finish(plan)


def refuse_memory_uris(uris: Iterable[str]) -> None:
    """Rejects `memory://` URIs, which are visible to one process only.

    Raises:
        SpecError: one of the URIs starts with `memory://`.
    """
    for uri in uris:
        if uri.startswith("memory://"):
            raise SpecError(f"{uri}: memory:// is not shared between processes. Use --local or another storage.")


def _parts(plan: ScorePlan, address: str | None, bank: Bank | None) -> Iterator[Part]:
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
        compute=ActorPoolStrategy(size=resources.num_workers, max_tasks_in_flight_per_actor=CHUNKS_WAITING_PER_ACTOR),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    with translated(address):
        for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                if row["error"]:
                    raise error_of(row["error"])
                yield validate(Part, json.loads(row["part"]), "a part")
