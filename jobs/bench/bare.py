"""The bare Scorer: `python -m jobs.bench.bare FOLDER COUNT` prints ready, waits for a line, scores, prints seconds."""

import sys
import time
from pathlib import Path

import torch

from jobs.bench.job import SIZE_PX
from jobs.bench.load import BATCH, pictures
from raydetect.artifacts.store import load_artifact
from raydetect.config import ScoreSpec, parse_job
from raydetect.records import Chunk, Member
from raydetect.scoring.scorer import Scorer
from raydetect.storage import Storage


def scorer(folder: Path) -> Scorer:
    """A Scorer with the batch size and the single thread of a replica."""
    torch.set_num_threads(1)
    job = {
        "kind": "score",
        "source": {"uri": f"{folder}/day"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"{folder}/none", "heatmaps": "none"},
        "flag": {"alpha": 0.1},
        "batch_size": BATCH,
    }
    spec = parse_job(job, "bare")
    assert isinstance(spec, ScoreSpec)
    return Scorer(load_artifact(f"file://{folder}/artifact", Storage()), spec)


def main(folder: Path, count: int) -> None:
    """Scores a chunk with one batch `count` times."""
    bare = scorer(folder)
    members = tuple(Member(f"{i}", f"{i}", data=data) for i, data in enumerate(pictures(BATCH, SIZE_PX)))
    bare.score_chunk(Chunk(0, 0, True, members))
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for _ in range(count):
        bare.score_chunk(Chunk(0, 0, True, members))
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
