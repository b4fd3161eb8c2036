"""The driver alone, with chunks that come as fast as they can be made: `python -m jobs.bench.driver`.

How many images a second are committed on one core, how much memory a hundred thousand shards need and how long
finishing them takes, and how long `status`, `report` and `export --as csv` of ten million rows take, with their peak
memory.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from jobs.bench.record import write
from raydetect.config import ScoreSpec, parse_job
from raydetect.planning.committer import commit_all
from raydetect.planning.plan import ScorePlan, finish, plan_score
from raydetect.records import Row, Shard
from raydetect.sinks.scored_chunk import SCHEMA, ChunkFacts, ScoredChunk, rows_table

CHUNK = 64
RATE_SHARDS, RATE_CHUNKS = 64, 32  # 131,072 images
MANY_SHARDS = 100_000
READ_SHARDS, READ_CHUNKS = 9_766, 16  # ten million rows
READERS = {
    "status": ["status"],
    "report": ["report", "-o", "{folder}/report.html"],
    "export_csv": ["export", "--as", "csv", "-o", "{folder}/rows.csv"],
}


def plan_of(folder: Path, name: str, shards: int) -> ScorePlan:
    """A scoring job over shards that exist in name only."""
    job = {
        "kind": "score",
        "source": {"uri": str(folder / "normal")},
        "artifact": str(folder / "artifact"),
        "sink": {"uri": str(folder / name)},
        "flag": {"threshold": 0.99},
    }
    spec = parse_job(job, "score")
    assert isinstance(spec, ScoreSpec)
    listed = (Shard(i, f"s3://archive/line4/part-{i:06d}.tar", "tar", 1 << 20, f"{i:032x}") for i in range(shards))
    return plan_score(spec, tuple(listed))


def chunks(plan: ScorePlan, each: int, rows: int = CHUNK) -> Iterator[bytes]:
    """Encoded chunks, `each` per shard; one row in a hundred is flagged."""
    row = Row(
        key="",
        image_uri="",
        chunk="00000-0000",
        status="ok",
        width=4000,
        height=3000,
        brightness=0.5,
        sharpness=0.25,
        p_value=0.5,
        threshold=0.99,
        flagged=False,
        artifact=plan.artifact.digest,
        sha256="0" * 64,
    )
    template = rows_table([replace(row, image_score=i / 100, flagged=i == 99 % rows) for i in range(rows)])
    for shard in plan.todo:
        for number in range(each):
            first = number * rows
            table = _with(template, "key", [f"{shard.uri}#image-{first + i:06d}.jpg" for i in range(rows)])
            table = _with(table, "image_uri", [f"tar://image-{first + i:06d}.jpg::{shard.uri}" for i in range(rows)])
            facts = ChunkFacts(shard=shard.index, number=number, last=number == each - 1)
            yield ScoredChunk(facts, table, {}).to_bytes()


def _with(table: pa.Table, name: str, values: list[str]) -> pa.Table:
    index = SCHEMA.get_field_index(name)
    return table.set_column(index, SCHEMA.field(index), pa.array(values, SCHEMA.field(index).type))


def peak_megabytes() -> float:
    """Peak memory of this process; `ru_maxrss` would count that of the parent, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def commit_rate(folder: Path) -> dict[str, Any]:
    """Images/s and CPU time of committing."""
    plan = plan_of(folder, "rate", RATE_SHARDS)
    encoded = list(chunks(plan, RATE_CHUNKS))
    images = RATE_SHARDS * RATE_CHUNKS * CHUNK
    plan.begin()
    os.sched_setaffinity(0, {0})
    started, used = time.perf_counter(), time.process_time()
    commit_all(plan, map(ScoredChunk.from_bytes, encoded), lambda _: None)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    files = [path for path in (folder / "rate" / "scores").rglob("*.parquet")]
    return {
        "images_per_second_on_one_core": round(images / seconds),
        "cpu_us_per_image": round(1e6 * used / images, 2),
        "bytes_per_row": round(sum(path.stat().st_size for path in files) / images, 1),
        "files": len(files),
    }


def many_shards(folder: Path) -> dict[str, Any]:
    """Memory of a driver with many shards, and the time that finishing takes."""
    plan = plan_of(folder, "many", MANY_SHARDS)
    plan.begin()
    started = time.perf_counter()
    commit_all(plan, map(ScoredChunk.from_bytes, chunks(plan, 1, 1)), lambda _: None)
    committed = time.perf_counter() - started
    started = time.perf_counter()
    assert finish(plan)["rows"] == MANY_SHARDS
    return {
        "shards": MANY_SHARDS,
        "committed_per_second": round(MANY_SHARDS / committed),
        "finish_seconds": round(time.perf_counter() - started, 1),
        "peak_megabytes": round(peak_megabytes()),
    }


def ten_million_rows(folder: Path) -> dict[str, Any]:
    """Time and peak memory of the commands that read a results directory."""
    plan = plan_of(folder, "large", READ_SHARDS)
    plan.begin()
    commit_all(plan, map(ScoredChunk.from_bytes, chunks(plan, READ_CHUNKS)), lambda _: None)
    found: dict[str, Any] = {"rows": finish(plan)["rows"]}
    for name, template in READERS.items():
        command = [sys.executable, "-m", "jobs.bench.driver", "read", str(folder), template[0], str(folder / "large")]
        command += [argument.format(folder=folder) for argument in template[1:]]
        started = time.perf_counter()
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = round(time.perf_counter() - started, 1)
        found[name] = {"seconds": seconds, "peak_megabytes": round(float(ended.stdout.splitlines()[-1]))}
        print(name, found[name], flush=True)
    return found


MEASURED = {"rate": commit_rate, "many": many_shards, "large": ten_million_rows}


def read(arguments: list[str]) -> None:
    """Runs a command in this process and prints its peak memory."""
    from click.testing import CliRunner

    from raydetect.cli.main import main as command

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    print(peak_megabytes())


def main() -> None:
    """Measures each part in a process of its own and writes the results."""
    from jobs.bench.pipeline import fit  # imports torch, which a driver does not

    figures: dict[str, Any] = {}
    for name in MEASURED:
        with TemporaryDirectory() as folder:
            fit(Path(folder))
            command = [sys.executable, "-m", "jobs.bench.driver", name, folder]
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[name] = json.loads(ended.stdout.splitlines()[-1])
            print(name, figures[name], flush=True)
    write("driver", "python -m jobs.bench.driver", figures)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "read":
        read(sys.argv[3:])
    else:
        print(json.dumps(MEASURED[sys.argv[1]](Path(sys.argv[2]))))
