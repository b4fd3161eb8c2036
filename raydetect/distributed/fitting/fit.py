"""Fitting on Ray Train: Ray Data distributes chunks of encoded images to workers, which fit one detector together.

Losing a worker or node ends the attempt; Ray Train then restarts with as many workers as the cluster has room for, and
they read the archive again. Rows are keyed and the result does not depend on the number of workers, so the artifact is
the same.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import ray
import ray.train
from ray.actor import ActorHandle
from ray.data import Dataset
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydetect.archives.open import open_archive
from raydetect.blocks.coresets.group import TIMEOUT, Group, TorchGroup
from raydetect.config import FIT_CHUNK_BYTES, FIT_CHUNK_IMAGES, FitSpec, SourceSpec, source_storage
from raydetect.distributed.chunk_dataset import Reading, chunk_dataset, unpack_chunks
from raydetect.distributed.fitting.chunk_split import ChunkSplit
from raydetect.distributed.fitting.progress_actor import ProgressActor
from raydetect.distributed.ray_errors import ClusterError, translated
from raydetect.distributed.scoring.score import refuse_memory_uris
from raydetect.distributed.session import session
from raydetect.errors import RaydetectError, StorageError
from raydetect.records import Chunk, FitReport
from raydetect.storage import Storage, join_uri, normalise_uri

if TYPE_CHECKING:
    from raydetect.fitting.fit_run import ProgressCallback

IMAGES, CALIBRATION, AUXILIARY, STARTED = "images", "calibration", "auxiliary", "started"
POLL_SECONDS = 0.3
PROGRESS_SECONDS = 0.2
GIVE_UP_SECONDS = 10.0
RESIZE_SECONDS = 600.0  # earliest restart with more workers after starting on fewer than requested


def fit(spec: FitSpec, address: str | None, on_progress: "ProgressCallback") -> FitReport:
    """Fits on Ray and writes the artifact.

    Args:
        spec: the fit job.
        address: cluster address, or None (see `session`).
        on_progress: called with the combined progress of all workers.

    Raises:
        SpecError: the job cannot run with these settings.
        TooManyBadRows: too many images of the source are bad.
        ClusterError: the cluster failed more than `max_failures` times.
    """
    spec = _absolute(spec)
    refuse_memory_uris([spec.artifact, *(uri for source in _sources(spec).values() for uri in source.uris())])
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # workers resolve relative paths, e.g. of weights, like the driver
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a finished or lost worker is noticed
    folder, storage = _ray_folder(spec), Storage(spec.storage)
    storage.write(join_uri(folder, STARTED), b"")  # fails early, with our message, if the folder is read-only
    try:
        report = _fit(spec, address, on_progress)
    except BaseException as error:
        if isinstance(error, ClusterError):  # Ray Train writes there too; its error says little if that fails
            storage.write(join_uri(folder, STARTED), b"")
        with suppress(RaydetectError):  # the error of the fit takes precedence
            storage.delete_folder(folder)
        raise
    storage.delete_folder(folder)
    return report


def _fit(spec: FitSpec, address: str | None, on_progress: "ProgressCallback") -> FitReport:
    on_progress("start Ray", 0, None)
    with session(address, spec.resources):
        on_progress("start workers and load weights", 0, None)
        datasets = {name: _dataset(spec, source) for name, source in _sources(spec).items()}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor).remote()
        trainer = _trainer(spec, datasets, actor)
        with translated(address):
            return _run_trainer(trainer, actor, on_progress)


def _sources(spec: FitSpec) -> dict[str, SourceSpec]:
    """The sources of a job by the names of their data sets."""
    named = {IMAGES: spec.source, CALIBRATION: spec.calibration.source, AUXILIARY: spec.auxiliary}
    return {name: source for name, source in named.items() if source is not None}


def _ray_folder(spec: FitSpec) -> str:
    """Storage path for the state of a Ray Train run, which all nodes must reach."""
    return join_uri(spec.artifact, "ray-train")


def _absolute(spec: FitSpec) -> FitSpec:
    """The same job with absolute URIs, valid in any working directory."""
    extend = None if spec.extend is None else normalise_uri(spec.extend)
    return replace(spec, artifact=normalise_uri(spec.artifact), extend=extend)


def _reading(spec: FitSpec, source: SourceSpec) -> Reading:
    workers = spec.resources.num_workers
    archive = open_archive(source, Storage(source_storage(spec, source)))
    return Reading(archive, source, FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES, readers=max(2, workers), consumers=workers)


def _dataset(spec: FitSpec, source: SourceSpec) -> Dataset:
    reading = _reading(spec, source)
    return chunk_dataset(reading, tuple(reading.archive.shards()))


def _trainer(spec: FitSpec, datasets: dict[str, Dataset], actor: ActorHandle) -> "_Trainer":
    resources = spec.resources
    gpus = resources.gpus_per_worker
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    filesystem, path = Storage(spec.storage).filesystem(_ray_folder(spec))
    return _Trainer(
        _work,
        train_loop_config={"spec": spec, "board": actor},
        datasets=datasets,
        dataset_config=ChunkSplit(_reading(spec, spec.source)),
        torch_config=TorchConfig(backend=backend, timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(1, resources.num_workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
            failure_config=ray.train.FailureConfig(max_failures=spec.max_failures),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """The training function of one worker. Imports detectors late: Ray Train's controller loads this module too."""
    import torch

    from raydetect.fitting.worker import fit_worker

    spec: FitSpec = config["spec"]
    progress = _Progress(config["board"])
    device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
    group: Group = TorchGroup()
    if group.rank == 0:
        ray.get(progress.actor.begin.remote())
    group.gather_bytes(b"")  # barrier: no worker reports before `begin`
    try:
        chunks = {name: _chunks(name) for name in _sources(spec)}
        report = fit_worker(
            spec,
            chunks[IMAGES],
            chunks.get(CALIBRATION),
            group,
            progress.on_progress,
            device,
            chunks.get(AUXILIARY),
        )
    except (StorageError, ClusterError) as error:  # a retry may succeed
        ray.get(progress.actor.fail.remote(error, final=False))
        raise
    except RaydetectError as error:
        ray.get(progress.actor.fail.remote(error, final=True))  # raised on all workers (`shared_errors`)
        return
    progress.flush()
    if report is not None:
        ray.get(progress.actor.report.remote(report))


def _chunks(name: str) -> Iterator[Chunk]:
    """Yields this worker's chunks."""
    for table in ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from unpack_chunks(table)


class _Progress:
    """Sends the progress of one worker a few times a second."""

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self._unsent: dict[str, tuple[int, int | None]] = {}
        self._sent = 0.0

    def on_progress(self, phase: str, done: int, total: int | None) -> None:
        """Adds progress of a phase; the driver sums over all workers."""
        self._unsent[phase] = (self._unsent.get(phase, (0, None))[0] + done, total)
        if time.monotonic() - self._sent > PROGRESS_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends the unsent progress."""
        self.actor.on_progress.remote([(phase, done, total) for phase, (done, total) in self._unsent.items()])
        self._unsent.clear()
        self._sent = time.monotonic()


def _run_trainer(trainer: "_Trainer", actor: ActorHandle, on_progress: "ProgressCallback") -> FitReport:
    """Runs the trainer while a thread forwards the progress of its workers.

    The thread is joined even on Ctrl-C: a thread that calls Ray after the session has ended kills the process.
    """
    finished = threading.Event()
    listener = threading.Thread(target=_forward_progress, args=(actor, on_progress, finished), daemon=True)
    listener.start()
    failed: Exception | None = None
    try:
        trainer.fit()
    except KeyboardInterrupt:
        trainer.give_up()
        raise
    except Exception as error:
        failed = error
    finally:
        finished.set()
        listener.join()
    report, worker_error = ray.get(actor.outcome.remote())
    if report is None:
        raise worker_error or failed or ClusterError("the fit ended without an artifact. Start it again.")
    return report


def _forward_progress(actor: ActorHandle, on_progress: "ProgressCallback", finished: threading.Event) -> None:
    last = False
    while not last:
        last = finished.wait(POLL_SECONDS)
        try:
            updates = ray.get(actor.updates.remote())
        except ray.exceptions.RayError:  # the trainer fails for the same reason and reports it
            return
        for phase, done, total in updates:
            on_progress(phase, done, total)


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray gives no types
    """Raises KeyboardInterrupt on Ctrl-C, like every command; Ray Train's own handler exits with 0 or 1."""

    _controller: ActorHandle | None = None

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Keeps Python's handler; the run ends with the session."""
        self._controller = controller

    def give_up(self) -> None:
        """Releases the resources reserved for the run, so that a fit started right afterwards can have them."""
        if self._controller is not None:
            ray.wait([self._controller.abort.remote()], timeout=GIVE_UP_SECONDS)
