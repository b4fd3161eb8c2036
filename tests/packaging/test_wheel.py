"""The wheel and the source archive: what is in them, and commands of an installed wheel outside the repository."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.builders.images import encode, normal_image

ROOT = Path(__file__).parents[2]
PATCHCORE = "{backbone: resnet18, weights: random, image_size: [64, 64], coreset_sampling_ratio: 0.05}"
FIT = f"""kind: fit
source: {{uri: good}}
detector: {{name: patchcore, params: {PATCHCORE}}}
artifact: models/parts
"""
SCORE = """kind: score
source: {uri: new}
artifact: models/parts
sink: {uri: results}
"""
SERVE = """kind: serve
detectors: {parts: {artifact: models/parts}}
port: 0
"""


def tracked(folder: str = "") -> set[str]:
    """The files of the repository below a folder, those included that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", folder or "."]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {path for path in listed if (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that no leftover of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("source")
    for path in tracked():
        if path.split("/")[0] in ("docs", "jobs") and not path.endswith(".py"):
            continue  # pictures, which no build reads
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((ROOT / path).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "-qq", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = folder.glob("raydetect-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel and the packages of this environment, but without its raydetect."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    executable = folder / "bin" / "python"
    install = ["install", "--no-deps", "-qq", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(executable), *install], env=outside(), check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the .pth files there are not read
    return executable


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    for name, count in (("good", 24), ("new", 6)):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(encode(normal_image(number)))
    for name, text in (("fit.yaml", FIT), ("score.yaml", SCORE), ("serve.yaml", SERVE)):
        (folder / name).write_text(text)
    return folder


def outside() -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}


def run(python: Path, folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [str(python), *words], cwd=folder, env=outside(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == tracked("raydetect")


def test_the_source_archive_has_what_a_build_reads(source: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = tmp_path.glob("raydetect-*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", *tracked("raydetect")}
    assert not [name for name in names if name.startswith(("tests/", "jobs/"))]


def test_an_installed_wheel_runs_outside_the_repository(python: Path, empty: Path) -> None:
    where = run(python, empty, "-c", "import raydetect; print(raydetect.__file__)").strip()
    assert where.startswith(str(python.parents[1])), where
    command = str(python.with_name("raydetect"))
    assert re.fullmatch(r"raydetect \S+\nPython \S+, torch \S+, Ray \S+\n", run(python, empty, command, "--version"))
    run(python, empty, command, "fit", "fit.yaml", "--local")
    run(python, empty, "-m", "raydetect", "score", "score.yaml", "--local")
    run(python, empty, command, "report", "results", "-o", "report.html")
    assert "<style>" in (empty / "report.html").read_text() and "<script" in (empty / "report.html").read_text()
    assert "patchcore" in run(python, empty, command, "detectors", "--compare")


def test_an_installed_wheel_serves_its_page(python: Path, empty: Path) -> None:
    if not (empty / "models" / "parts").exists():
        run(python, empty, "-m", "raydetect", "fit", "fit.yaml", "--local")
    words = [str(python), "-u", "-m", "raydetect", "serve", "serve.yaml", "--local"]
    with (empty / "serve.log").open("w") as log:
        process = subprocess.Popen(words, cwd=empty, env=outside(), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + (empty / "serve.log").read_text()
        with urllib.request.urlopen(address.group() + "/", timeout=30) as answer:
            assert answer.status == 200 and b"<html" in answer.read()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_installation_page_has_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(project["optional-dependencies"])
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert ", ".join(versions[:-1]) + f" and {versions[-1]}" in page
    assert project["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_the_image_of_clusters_installs_extras_that_exist(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "cluster" / name).read_text()
    install = re.search(
        r"pip install .*-c /home/ray/raydetect/constraints\.txt '/home/ray/raydetect\[([\w,]+)\]'", text
    )
    assert install and set(install.group(1).split(",")) <= set(project["optional-dependencies"])
    copied = {word for line in re.findall(r"^COPY \S+ (.*) \S+$", text, re.MULTILINE) for word in line.split()}
    assert copied >= {"constraints.txt", "pyproject.toml", project["readme"], "raydetect"}
    assert all((ROOT / name).exists() for name in copied)
