"""Writes benchmark results together with the machine and package versions."""

import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor and the package versions, on which results depend besides the code."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "machine": {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()},
        "packages": {p: found for p in ("raydetect", "torch", "torchvision", "ray") if (found := _version(p))},
    }


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed, as Ray for the check of a GPU."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(name: str, command: str, figures: dict[str, Any]) -> None:
    """Writes `results/<name>.json` and prints it."""
    body = {"command": command, **machine(), **figures}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    print(f"Written: {path}")


def alternate(first: Callable[[], Any], second: Callable[[], Any], rounds: int = 7) -> tuple[list[float], list[float]]:
    """Seconds of both functions, measured alternately after one warm-up call each."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, work in zip(seconds, (first, second), strict=True):
            start = perf_counter()
            work()
            times.append(perf_counter() - start)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Median and range of the ratios of paired measurements."""
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    return {"median": round(median(ratios), 2), "least": round(ratios[0], 2), "most": round(ratios[-1], 2)}
