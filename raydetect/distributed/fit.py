"""Fitting on Ray Train: Ray Data deals chunks of encoded images to workers, which fit together.

A lost worker or node ends the attempt; Ray Train then starts the workers that still fit on the cluster, which read
the archive again. Rows are keyed and the result does not depend on the number of workers, so the artifact is the same.
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
from raydetect.blocks.group import TIMEOUT, Group, TorchGroup
from raydetect.distributed.board import Board
from raydetect.distributed.dealing import EveryChunk
from raydetect.distributed.ingest import Reading, chunk_dataset, unpack_chunks
from raydetect.distributed.ray_errors import ClusterError, translated
from raydetect.distributed.score import refuse_memory_uris
from raydetect.distributed.session import session
from raydetect.errors import RaydetectError, StorageError
from raydetect.records import Chunk, FitReport
from raydetect.spec import FIT_CHUNK_BYTES, FIT_CHUNK_IMAGES, FitSpec, SourceSpec, source_storage
from raydetect.storage import Storage, join_uri, normalise_uri

if TYPE_CHECKING:
    from raydetect.worker.one_fit import Tick

IMAGES, CALIBRATION, BEGUN = "images", "calibration", "begun"
POLL_SECONDS = 0.3
TICK_SECONDS = 0.2
GIVE_UP_SECONDS = 10.0
RESIZE_SECONDS = 600.0  # a fit that began on fewer workers than asked for starts again on a grown cluster, not sooner


def fit(spec: FitSpec, address: str | None, tick: "Tick") -> FitReport:
    """Fits on Ray and writes the artifact.

    Args:
        spec: the job.
        address: of a cluster, or None (see `session`).
        tick: told of the progress of all workers together.

    Raises:
        SpecError: the job cannot run as it is.
        TooManyBadRows: too many images of the source are bad.
        ClusterError: the cluster broke down more than `max_failures` times.
    """
    spec = _absolute(spec)
    extra = spec.calibration.source
    refuse_memory_uris([spec.artifact, *spec.source.uris(), *(extra.uris() if extra else ())])
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a relative path, as of weights, means the same to workers
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # that a worker ended or is lost is seen by then
    folder, storage = _ray_folder(spec), Storage(spec.storage)
    storage.write(join_uri(folder, BEGUN), b"")  # a place that cannot be written is told of now, and by us
    try:
        report = _fit(spec, address, tick)
    except BaseException as error:
        if isinstance(error, ClusterError):  # Ray Train writes there too, and says little of it where that is refused
            storage.write(join_uri(folder, BEGUN), b"")
        with suppress(RaydetectError):  # what ended the fit counts
            storage.delete_folder(folder)
        raise
    storage.delete_folder(folder)
    return report


def _fit(spec: FitSpec, address: str | None, tick: "Tick") -> FitReport:
    extra = spec.calibration.source
    with session(address, spec.resources):
        datasets = {IMAGES: _dataset(spec, spec.source)} | ({CALIBRATION: _dataset(spec, extra)} if extra else {})
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        trainer = _trainer(spec, datasets, board)
        with translated(address):
            return _followed(trainer, board, tick)


def _ray_folder(spec: FitSpec) -> str:
    """Where Ray Train keeps notes of a run; it wants a place that all nodes reach."""
    return join_uri(spec.artifact, "ray-train")


def _absolute(spec: FitSpec) -> FitSpec:
    """The same job with URIs that mean the same in any working directory."""
    extend = None if spec.extend is None else normalise_uri(spec.extend)
    return replace(spec, artifact=normalise_uri(spec.artifact), extend=extend)


def _reading(spec: FitSpec, source: SourceSpec) -> Reading:
    workers = spec.resources.num_workers
    archive = open_archive(source, Storage(source_storage(spec, source)))
    return Reading(archive, source, FIT_CHUNK_IMAGES, FIT_CHUNK_BYTES, readers=max(2, workers), consumers=workers)


def _dataset(spec: FitSpec, source: SourceSpec) -> Dataset:
    reading = _reading(spec, source)
    return chunk_dataset(reading, tuple(reading.archive.shards()))


def _trainer(spec: FitSpec, datasets: dict[str, Dataset], board: ActorHandle) -> "_Trainer":
    resources = spec.resources
    gpus = resources.gpus_per_worker
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    filesystem, path = Storage(spec.storage).filesystem(_ray_folder(spec))
    return _Trainer(
        _work,
        train_loop_config={"spec": spec, "board": board},
        datasets=datasets,
        dataset_config=EveryChunk(_reading(spec, spec.source)),
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


def _work(words: dict[str, Any]) -> None:
    """One worker; runs in its own process. Ray Train's controller handles this too, and needs no detectors."""
    import torch

    from raydetect.worker.fit import fit_worker

    spec: FitSpec = words["spec"]
    said = _Said(words["board"])
    device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
    group: Group = TorchGroup()
    if group.rank == 0:
        ray.get(said.board.begin.remote())
    group.gather_bytes(b"")  # nobody says anything before
    try:
        calibration = None if spec.calibration.source is None else _chunks(CALIBRATION)
        report = fit_worker(spec, _chunks(IMAGES), calibration, group, said.tick, device)
    except (StorageError, ClusterError) as error:  # another attempt may find storage and cluster well
        ray.get(said.board.fail.remote(error, final=False))
        raise
    except RaydetectError as error:
        ray.get(said.board.fail.remote(error, final=True))  # all workers have it (`shared_errors`), none waits
        return
    said.flush()
    if report is not None:
        ray.get(said.board.report.remote(report))


def _chunks(name: str) -> Iterator[Chunk]:
    """This worker's chunks."""
    for table in ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from unpack_chunks(table)


class _Said:
    """Progress of one worker, sent a few times a second."""

    def __init__(self, board: ActorHandle) -> None:
        self.board = board
        self._waiting: dict[str, tuple[int, int | None]] = {}
        self._sent = 0.0

    def tick(self, phase: str, done: int, total: int | None) -> None:
        """More of a phase is done; the totals of all workers are summed by the driver."""
        self._waiting[phase] = (self._waiting.get(phase, (0, None))[0] + done, total)
        if time.monotonic() - self._sent > TICK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends what has not been sent."""
        self.board.tick.remote([(phase, done, total) for phase, (done, total) in self._waiting.items()])
        self._waiting.clear()
        self._sent = time.monotonic()


def _followed(trainer: "_Trainer", board: ActorHandle, tick: "Tick") -> FitReport:
    """Runs the trainer while a thread passes on what its workers say.

    The thread ends before this does, also on Ctrl-C: a thread that asks Ray after a session's end ends the process.
    """
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(board, tick, over), daemon=True)
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
        over.set()
        listener.join()
    report, said = ray.get(board.outcome.remote())
    if report is None:
        raise said or failed or ClusterError("the fit ended without an artifact. Start it again.")
    return report


def _listen(board: ActorHandle, tick: "Tick", over: threading.Event) -> None:
    last = False
    while not last:
        last = over.wait(POLL_SECONDS)
        try:
            ticks = ray.get(board.ticks.remote())
        except ray.exceptions.RayError:  # the trainer ends by the same cause, and says so
            return
        for phase, done, total in ticks:
            tick(phase, done, total)


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray gives no types
    """Ctrl-C is a KeyboardInterrupt here, as in every command; Ray Train's own handler exits with 0 or 1."""

    _controller: ActorHandle | None = None

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Leaves Python's handler in place; the run ends with the session."""
        self._controller = controller

    def give_up(self) -> None:
        """Has Ray Train take back what it reserved for the run; else a fit that begins soon finds fewer slots."""
        if self._controller is not None:
            ray.wait([self._controller.abort.remote()], timeout=GIVE_UP_SECONDS)
