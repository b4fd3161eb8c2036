"""How busy a fast device is kept: `python -m jobs.bench.pipeline`.

The device is a detector whose `score` sleeps as long as a fast GPU computes (16 images in 6 ms, 2,700 images/s). Tars
of small JPEGs and the results are in an S3 store on loopback behind a proxy, which delays the first byte of every
answer by 0, 100 and 300 ms. One process scores them twice: as jobs do now, and as they did before (each chunk is read,
decoded, scored, written as a Parquet file and a zip, and only then is the next one begun).

Larger JPEGs, which take longer to decode than to score, are compared with decoding alone on as many threads. The store
and the proxy run on the same cores, which a store in use does not: the limit is decoding on what they leave of them.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from raydetect.config import FitSpec, ScoreSpec, SourceSpec, parse_job
from raydetect.detectors._base import Detector, Scores
from raydetect.images.decode import DecodePool, Pixels, decode_stream
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.records import Member
from raydetect.scoring.scorer import Scorer, score_and_write
from raydetect.storage import Storage
from tests.builders.archives import tar_bytes
from tests.builders.images import normal_image

BATCH, BATCH_SECONDS = 16, 0.006
SIZE_PX, SHARDS, IMAGES_EACH = 64, 16, 1024
SHARDS_BEFORE = 2
DELAYS_MS = (0, 100, 300)
REPEATS = 3
LARGE_PX, LARGE_IMAGES = 1000, 4096  # decoded in full, they are the limit
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
        self._map_BHW = torch.zeros(BATCH, SIZE_PX, SIZE_PX)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)

    def to(self, device: torch.device) -> "Sleeper":
        """Stays."""
        return self

    def score(self, images_BCHW: Tensor) -> Scores:
        """Sleeps and does as little as possible besides; scores grow with brightness, maps are black."""
        start = time.perf_counter()
        time.sleep(BATCH_SECONDS * len(images_BCHW) / BATCH)
        self._noted.spans.append((start, time.perf_counter()))
        score_B = images_BCHW.numpy()[:, 0, 0, 0].astype(np.float32) / 1000
        return Scores(torch.from_numpy(score_B), self._map_BHW)


def make_archives(port: int) -> None:
    """Puts the tars into the store."""
    client = slow_store.client(port)
    client.create_bucket(Bucket=BUCKET)
    for name, size_px, count in (("small", SIZE_PX, IMAGES_EACH), ("large", LARGE_PX, LARGE_IMAGES // SHARDS)):
        pool = jpegs(size_px)
        for shard in range(SHARDS):
            files = [(f"{i:06d}.jpg", pool[i % len(pool)]) for i in range(count)]
            client.put_object(Bucket=BUCKET, Key=f"{name}/part-{shard:03d}.tar", Body=tar_bytes(files))


def jpegs(size_px: int) -> list[bytes]:
    """Different JPEGs of one size."""
    made = []
    for i in range(16):
        buffer = io.BytesIO()
        Image.fromarray(normal_image(i, size_px)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def fit(folder: Path) -> None:
    """Fits the detector whose record, input size and calibration are used."""
    (folder / "normal").mkdir()
    for i in range(32):
        Image.fromarray(normal_image(i, SIZE_PX)).save(folder / "normal" / f"{i}.png")
    params = {"backbone": "resnet18", "weights": "random", "image_size": [SIZE_PX, SIZE_PX]}
    job = {
        "kind": "fit",
        "preprocess": {"jpeg_scale": "full"},
        "source": {"uri": str(folder / "normal")},
        "detector": {"name": "patchcore", "params": params},
        "artifact": str(folder / "artifact"),
    }
    spec = parse_job(job, "fit")
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)


def plan_of(folder: str, port: int, archive: str, name: str, threads: int) -> ScorePlan:
    """The scoring job."""
    job = {
        "kind": "score",
        "source": {"uri": f"s3://{BUCKET}/{archive}"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"s3://{BUCKET}/results-{name}"},
        "storage": {"endpoint_url": f"http://127.0.0.1:{port}", **slow_store.KEY, "region": "us-east-1"},
        "flag": {"threshold": 0.2},
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


def measure(way: str, folder: str, port: int, name: str, threads: int) -> None:
    """Runs one job and prints its figures as JSON."""
    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None  # as on a GPU, no thread of the CPU computes for the device
    device = Device()

    def load(self: StoredDetectors, ref: Any) -> Artifact:
        artifact = load_artifact(ref.uri, Storage())
        return Artifact(Sleeper(artifact.detector, device), artifact.record)  # type: ignore[arg-type]

    StoredDetectors.load = load  # type: ignore[method-assign]
    archive = "large" if way == "large" else "small"
    plan = plan_of(folder, port, archive, f"{way}-{name}", threads)
    started, used = time.perf_counter(), time.process_time()
    if way == "before":
        before(plan)
    else:
        jobs.score(plan, lambda _: None)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    images = {"now": SHARDS * IMAGES_EACH, "before": SHARDS_BEFORE * IMAGES_EACH, "large": LARGE_IMAGES}[way]
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


def decoding_alone(threads: int) -> float:
    """Images/s of decoding the large JPEGs on `threads` threads, with nothing else."""
    pool = jpegs(LARGE_PX)
    members = [Member(f"{i}", f"{i}", data=pool[i % len(pool)]) for i in range(LARGE_IMAGES)]
    rules = DecodeRules.of(SourceSpec(uri="none"))
    started = time.perf_counter()
    with DecodePool(threads) as executor:
        for item in decode_stream(members, rules, Preprocess((SIZE_PX, SIZE_PX)), executor):
            assert not isinstance(item, Pixels) or item.status == "ok"
    return LARGE_IMAGES / (time.perf_counter() - started)


def over_decoding(folder: str, port: int) -> dict[str, Any]:
    """Images/s of jobs with large JPEGs over decoding alone and over its limit beside the store, alternating."""
    over_alone, over_limit = [], []
    with slow_store.proxy_process(port, 100) as proxied:
        for number in range(REPEATS):
            alone = decoding_alone(2)
            used = slow_store.cpu_seconds()
            job = measured("large", folder, proxied, str(number))
            stores = (slow_store.cpu_seconds() - used) / (2 * LARGE_IMAGES / job["images_per_second"])
            over_alone.append(job["images_per_second"] / alone)
            over_limit.append(over_alone[-1] / (1 - stores))
            print(f"large images: {job}, decoding alone {alone:.1f}, store {stores:.2f} of the cores", flush=True)
    ratios = {"job_over_decoding": over_alone, "job_over_decoding_beside_the_store": over_limit}
    return {"px": LARGE_PX, "delay_ms": 100, **{name: round(sorted(three)[1], 3) for name, three in ratios.items()}}


def measured(way: str, folder: str, port: int, name: str) -> dict[str, Any]:
    """The figures of one job, run in a process of its own."""
    command = [sys.executable, "-m", "jobs.bench.pipeline", way, folder, str(port), name, "2"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def runs(folder: str, port: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Measures both ways at every delay, each in a process of its own; the middle of REPEATS runs."""
    for delay_ms in DELAYS_MS:
        with slow_store.proxy_process(port, delay_ms) as proxied:
            for way in ("before", "now"):
                names = [f"{delay_ms}-{number}" for number in range(REPEATS)]
                found = [measured(way, folder, proxied, name) for name in names]
                yield way, delay_ms, sorted(found, key=lambda one: one["device_busy"])[REPEATS // 2]


def main() -> None:
    """Measures and writes the results."""
    figures: dict[str, Any] = {"before": {}, "now": {}}
    with TemporaryDirectory() as folder, slow_store.s3_server() as port:
        fit(Path(folder))
        make_archives(port)
        for way, delay_ms, found in runs(folder, port):
            print(f"{way}, {delay_ms} ms: {found}", flush=True)
            figures[way][str(delay_ms)] = found
        figures["large_images"] = over_decoding(folder, port)
    device_busy = {delay: run["device_busy"] for delay, run in figures["now"].items()}
    settings = {"images": SHARDS * IMAGES_EACH, "px": SIZE_PX, "batch": BATCH, "batch_ms": 1000 * BATCH_SECONDS}
    write("pipeline", "python -m jobs.bench.pipeline", {"settings": settings, "device_busy": device_busy, **figures})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
