"""Coreset selection compared with anomalib's KCenterGreedy and with one pass per centre: same embeddings and threads.

Uses PatchCore embeddings (ResNet-18, layer2 and layer3, 256 px) of real images if RAYDETECT_DATA is set, else of
generated ones. anomalib makes one pass per centre, each equally long, and needs half an hour for 21,401 centres; so by
default it selects the first fifth, is compared with as many of ours, and its total time is taken as five times that.
`--their-share 1` selects all centres; `--images 20` is quick.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.bench.record import write
from jobs.bench.search import BATCH, images, resnet18
from raydetect.blocks.coresets.coreset import Coreset, choose_coreset
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import KeyedRows
from raydetect.blocks.search.neighbors import BankSearch

RATIO = 0.1
ROWS_PER_IMAGE = 1024
OWN_ROUNDS = 3


def embeddings(count: int) -> torch.Tensor:
    """(N, 384) float32."""
    detector = resnet18()
    with torch.inference_mode():
        found = [detector._embed(part).flatten(0, 2) for part in images("train", count).split(BATCH)]
    return torch.cat(found).clone()


def keyed(parts: Any) -> KeyedRows:
    """The rows of images `0000`, `0001`, ..."""
    rows: KeyedRows | None = None
    for number, part in enumerate(parts):
        rows = rows or KeyedRows(part.shape[1], Group())
        rows.add(f"{number:04d}", part)
    assert rows is not None
    return rows


def own(rows: KeyedRows) -> Coreset:
    """Our coreset, with PatchCore's default of 384 projected dims, here all of them."""
    return choose_coreset(rows, int(len(rows) * RATIO), seed=0, projected_dims=384)


def plain(points_ND: torch.Tensor) -> torch.Tensor:
    """Farthest-first selection in float32, one pass per centre."""
    norms_N = points_ND.square().sum(1)
    nearest_N = torch.full_like(norms_N, torch.inf)
    chosen = [int(norms_N.argmax())]
    for _ in range(int(len(points_ND) * RATIO) - 1):
        last = chosen[-1]
        torch.minimum(nearest_N, norms_N + norms_N[last] - 2.0 * (points_ND @ points_ND[last]), out=nearest_N)
        chosen.append(int(nearest_N.argmax()))
    return torch.tensor(chosen)


def theirs(points_ND: torch.Tensor, share: float) -> torch.Tensor:
    """The given share of centres, as selected by anomalib."""
    from anomalib.models.components import KCenterGreedy

    torch.manual_seed(0)
    return torch.tensor(KCenterGreedy(points_ND, RATIO * share).select_coreset_idxs())


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Runs `work`; returns (result, wall seconds, CPU seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def memory(path: str) -> None:
    """Prints the peak memory of collecting and selecting, above the baseline, relative to the embeddings' size."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        (count, dims), _, _ = np.lib.format.read_array_header_1_0(file)
        own(keyed([torch.randn(64, dims)]))  # one-time allocations of torch
        before = peak_bytes(reset=True)
        images = (np.fromfile(file, np.float32, ROWS_PER_IMAGE * dims) for _ in range(count // ROWS_PER_IMAGE))
        rows = keyed(torch.from_numpy(image).view(-1, dims) for image in images)
    own(rows)
    print((peak_bytes() - before) / (count * dims * 4))


def peak_bytes(reset: bool = False) -> int:
    """Peak memory of this process; with `reset`, resets the peak to the current memory first."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line[:2] == "Vm")
    return int(fields["VmHWM"].split()[0]) << 10


def main() -> None:
    """Runs the benchmark and writes its results."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=209)
    parser.add_argument("--their-share", type=float, default=0.2)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    points_ND = embeddings(arguments.images)
    print(f"{len(points_ND)} embeddings of {points_ND.shape[1]} dims", flush=True)
    with tempfile.TemporaryDirectory(prefix="raydetect-bench-") as folder:
        np.save(Path(folder) / "points.npy", points_ND.numpy())
        command = [sys.executable, "-m", "jobs.bench.coreset", "memory", str(Path(folder) / "points.npy")]
        memory_share = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = keyed(points_ND.split(ROWS_PER_IMAGE))
    ours = [timed(lambda: own(rows)) for _ in range(OWN_ROUNDS - 1)]
    baseline = timed(lambda: plain(points_ND))
    print(f"ours {ours[0][1]:.1f} s, one pass per centre {baseline[1]:.1f} s", flush=True)
    peer = timed(lambda: theirs(points_ND, arguments.their_share))
    ours.append(timed(lambda: own(rows)))
    seconds, processor = (sorted(run[i] for run in ours)[OWN_ROUNDS // 2] for i in (1, 2))
    mine, first = ours[0][0].rows_MD, len(peer[0])
    banks = {"ours": mine, "plain": points_ND[baseline[0]], "ours_first": mine[:first], "anomalib": points_ND[peer[0]]}
    radius = {name: float(BankSearch(bank).nearest(points_ND)[0].max()) for name, bank in banks.items()}
    passes = len(mine) / first
    figures = {
        "images": "real" if "RAYDETECT_DATA" in os.environ else "generated",
        "embeddings": list(points_ND.shape),
        "centres": len(mine),
        "anomalib_centres": first,
        "threads": threads,
        "seconds": {"ours": round(seconds, 1), "plain": round(baseline[1], 1), "anomalib": round(peer[1], 1)},
        "processor_seconds": {
            "ours": round(processor, 1),
            "plain": round(baseline[2], 1),
            "anomalib": round(peer[2], 1),
        },
        "plain_over_ours": round(baseline[1] / seconds, 1),
        "anomalib_over_ours": round(peer[1] * passes / seconds, 1),
        "covering_radius_in_all_dims": {name: round(value, 4) for name, value in radius.items()},
        "our_radius_over_plain": round(radius["ours"] / radius["plain"], 4),
        "our_radius_over_anomalib": round(radius["ours_first"] / radius["anomalib"], 4),
        "peak_memory_over_embeddings": round(memory_share, 3),
    }
    write("coreset", "make bench", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(sys.argv[2])
    else:
        main()
