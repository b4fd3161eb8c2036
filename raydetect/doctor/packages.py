"""Python, the installed packages, and whether their versions fit together and the hardware."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement

from raydetect.doctor.finding import Finding

MIN_PYTHON = (3, 11)
SHOWN = ("torch", "torchvision", "timm", "ray")
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
Requirements = Callable[[str], Sequence[str] | None]


def package_findings() -> Iterator[Finding]:
    """Python, the packages that matter by name, and all requirements."""
    yield _python(sys.version_info[:3])
    for name in SHOWN:
        yield _package(name)
    yield _first_of("faiss", FAISS, "searches banks with `search: faiss` and ivfpq; the default needs none")
    yield _first_of("rasterio", ("rasterio",), "reads GeoTIFF, JPEG 2000 and other rasters")
    yield from misfits(("raydetect", *SHOWN))
    yield _cuda()


def misfits(names: Sequence[str], requires: Requirements = metadata.requires) -> Iterator[Finding]:
    """One finding for each requirement of these packages that the installed versions do not meet, or one that all fit.

    Args:
        names: packages; those that are not installed are skipped.
        requires: gives the requirements of a package.
    """
    found = []
    for name in names:
        try:
            lines = requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        found += [finding for line in lines if (finding := _misfit(name, Requirement(line))) is not None]
    yield from found or [Finding("versions", "ok", f"the requirements of {', '.join(names)} are met")]


def _misfit(name: str, needed: Requirement) -> Finding | None:
    if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
        return None
    advice = f"pip install '{needed.name}{needed.specifier}'"
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return Finding("versions", "missing", f"{name} needs {needed.name}, which is not installed", advice)
    if needed.specifier.contains(version, prereleases=True):
        return None
    wanted = f"{needed.name} {needed.specifier}"
    return Finding("versions", "missing", f"{name} needs {wanted}, and {version} is installed", advice)


def _python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < MIN_PYTHON:
        return Finding("Python", "missing", text, "raydetect needs Python 3.11 or newer.")
    return Finding("Python", "ok", f"{text} ({sys.executable})")


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}")


def _first_of(topic: str, names: Sequence[str], purpose: str) -> Finding:
    for name in names:
        try:
            return Finding(topic, "ok", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Finding(topic, "note", "not installed", f"Optional: it {purpose}. pip install {names[0]}")


def _cuda() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        return Finding("CUDA", "missing", f"torch cannot be loaded ({reason})", "Install torch again.")
    if torch.cuda.is_available():
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}))
        found = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU: {names}"
        return Finding("CUDA", "ok", found, "Set resources.gpus_per_worker: 1 in job files.")
    if shutil.which("nvidia-smi") is None:
        return Finding("CUDA", "ok", "no GPU; jobs run on the CPU")
    why = "a build for the CPU alone" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    advice = "Install a torch that fits the driver that `nvidia-smi` names; until then jobs run on the CPU."
    return Finding("CUDA", "note", f"a driver is installed, and torch ({why}) sees no GPU", advice)
