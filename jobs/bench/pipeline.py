"""How busy a fast device is kept: `python -m jobs.bench.pipeline`.

The device is a detector whose `score` sleeps as long as a fast GPU computes (16 images in 6 ms, 2,700 images/s). Tars
of small JPEGs and the results are in an S3 store on loopback behind a proxy, which delays the first byte of every
answer by 0, 100 and 300 ms. One process scores them twice: as jobs do now, and as they did before (each chunk is read,
decoded, scored, written as a Parquet file and a zip, and only then is the next one begun).
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.bench import slow_store
from jobs.bench.record import write
from raydetect.archives.chunks import read_chunks
from raydetect.artifacts.store import Artifact, StoredDetectors, load_artifact
from raydetect.config import FitSpec, ScoreSpec, parse_job
from raydetect.detectors._base import Detector, Scores
from raydetect.local import jobs
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.scoring.scorer import Scorer, score_and_write
from raydetect.storage import Storage
from tests.builders.archives import tar_bytes
from tests.builders.images import normal_image

BATCH, BATCH_SECONDS = 16, 0.006
SIZE_PX, SHARDS, IMAGES_EACH = 64, 16, 1024
SHARDS_BEFORE = 2
DELAYS_MS = (0, 100, 300)
BUCKET = "bench"


@dataclass
class Device:
    """Notes when the device computes."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    def busy(self) -> float:
        """Share of the time between the first and the last batch."""
        return sum(end - start for start, end in self.spans) / (self.spans[-1][1] - self.spans[0][0])


class Sleeper:
    """A detector that sleeps instead of computing; everything else is the fitted detector's."""

    def __init__(self, detector: Detector, device: Device) -> None:
        """Wraps a fitted detector."""
        self._detector, self._noted = detector, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)

    def to(self, device: torch.device) -> "Sleeper":
        """Stays."""
        return self

    def score(self, images_BCHW: Tensor) -> Scores:
        """Sleeps; scores grow with brightness."""
        start = time.perf_counter()
        time.sleep(BATCH_SECONDS * len(images_BCHW) / BATCH)
        self._noted.spans.append((start, time.perf_counter()))
        map_BHW = torch.zeros(len(images_BCHW), *images_BCHW.shape[2:])
        return Scores(images_BCHW[:, 0, 0, 0].float() / 1000, map_BHW)


def make_archive(port: int) -> None:
    """Puts the tars into the store."""
    client = slow_store.client(port)
    client.create_bucket(Bucket=BUCKET)
    random = np.random.default_rng(7)
    images = [normal_image(i, SIZE_PX) for i in range(64)]
    for shard in range(SHARDS):
        files = []
        for i in range(IMAGES_EACH):
            buffer = io.BytesIO()
            image = images[i % 64].copy()
            image[:4, :4] = random.integers(0, 255, (4, 4, 3))
            Image.fromarray(image).save(buffer, "JPEG", quality=90)
            files.append((f"{i:06d}.jpg", buffer.getvalue()))
        client.put_object(Bucket=BUCKET, Key=f"archive/part-{shard:03d}.tar", Body=tar_bytes(files))


def fit(folder: Path) -> None:
    """Fits the detector whose record, input size and calibration are used."""
    (folder / "normal").mkdir()
    for i in range(32):
        Image.fromarray(normal_image(i, SIZE_PX)).save(folder / "normal" / f"{i}.png")
    params = {"backbone": "resnet18", "weights": "random", "image_size": [SIZE_PX, SIZE_PX]}
    job = {
        "kind": "fit",
        "source": {"uri": str(folder / "normal")},
        "detector": {"name": "patchcore", "params": params},
        "artifact": str(folder / "artifact"),
    }
    spec = parse_job(job, "fit")
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)


def plan_of(folder: str, port: int, name: str, threads: int) -> ScorePlan:
    """The scoring job."""
    job = {
        "kind": "score",
        "source": {"uri": f"s3://{BUCKET}/archive"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"s3://{BUCKET}/results-{name}"},
        "storage": {"endpoint_url": f"http://127.0.0.1:{port}", **slow_store.KEY, "region": "us-east-1"},
        "flag": {"threshold": 0.25},  # about one image in fifty
        "batch_size": BATCH,
        "resources": {"cpus_per_worker": threads},
    }
    spec = parse_job(job, "score")
    assert isinstance(spec, ScoreSpec)
    return plan_score(spec)


def before(plan: ScorePlan) -> None:
    """One chunk after the other, each with its own files."""
    scorer = Scorer(StoredDetectors(plan.artifact, Storage()), plan.spec)
    plan.begin()
    for shard in plan.todo[:SHARDS_BEFORE]:
        for chunk in read_chunks(plan.archive, shard, plan.spec.source, plan.spec.chunk_images, plan.spec.chunk_bytes):
            plan.sink.write_part(chunk.number, [score_and_write(scorer, plan.sink, chunk)])


def measure(way: str, folder: str, port: int, delay_ms: int, threads: int) -> None:
    """Runs one job and prints its figures as JSON."""
    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None  # as on a GPU, no thread of the CPU computes for the device
    device = Device()

    def load(self: StoredDetectors, ref: Any) -> Artifact:
        artifact = load_artifact(ref.uri, Storage())
        return Artifact(Sleeper(artifact.detector, device), artifact.record)  # type: ignore[arg-type]

    StoredDetectors.load = load  # type: ignore[method-assign]
    plan = plan_of(folder, port, f"{way}-{delay_ms}-{threads}", threads)
    started, used = time.perf_counter(), time.process_time()
    if way == "now":
        jobs.score(plan, lambda _: None)
    else:
        before(plan)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    images = IMAGES_EACH * (SHARDS if way == "now" else SHARDS_BEFORE)
    print(
        json.dumps(
            {
                "device_busy": round(device.busy(), 3),
                "images_per_second": round(images / (device.spans[-1][1] - device.spans[0][0]), 1),
                "seconds_until_first_batch": round(device.spans[0][0] - started, 2),
                "seconds_after_last_batch": round(started + seconds - device.spans[-1][1], 2),
                "cpu_ms_per_image": round(1000 * used / images, 3),
            }
        )
    )


def runs(folder: str, port: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Measures both ways at every delay, each in a process of its own."""
    for delay_ms in DELAYS_MS:
        with slow_store.proxy_process(port, delay_ms) as proxied:
            for way in ("before", "now"):
                command = [sys.executable, "-m", "jobs.bench.pipeline", way, folder, str(proxied), str(delay_ms), "2"]
                ended = subprocess.run(command, check=True, capture_output=True, text=True)
                yield way, delay_ms, json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measures and writes the results."""
    figures: dict[str, Any] = {"before": {}, "now": {}}
    with TemporaryDirectory() as folder, slow_store.s3_server() as port:
        fit(Path(folder))
        make_archive(port)
        for way, delay_ms, found in runs(folder, port):
            print(f"{way}, {delay_ms} ms: {found}", flush=True)
            figures[way][str(delay_ms)] = found
    device_busy = {delay: run["device_busy"] for delay, run in figures["now"].items()}
    settings = {"images": SHARDS * IMAGES_EACH, "px": SIZE_PX, "batch": BATCH, "batch_ms": 1000 * BATCH_SECONDS}
    write("pipeline", "python -m jobs.bench.pipeline", {"settings": settings, "device_busy": device_busy, **figures})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        partial(measure, sys.argv[1], sys.argv[2])(*map(int, sys.argv[3:]))
    else:
        main()
