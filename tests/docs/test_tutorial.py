"""The commands of the tutorial run as they stand there, and so do the examples that read results."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.builders.documents import blocks

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
EXIT_CODE = re.compile(r"#.*exit code (\d)")


def command(line: str) -> tuple[list[str], int]:
    """The words of a line, with this Python, and the exit code that it announces."""
    code = EXIT_CODE.search(line)
    words = shlex.split(line, comments=True)
    python = {"python": [sys.executable], "raydetect": [sys.executable, "-m", "raydetect"]}
    return [*python.get(words[0], words[:1]), *words[1:]], int(code.group(1)) if code else 0


@pytest.fixture(scope="module")
def worked_through(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the tutorial was worked through, and what its commands wrote."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name, text in re.findall(r"`([\w-]+\.yaml)`:\n\n```yaml\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    written = []
    for block in blocks(TUTORIAL):
        for line in block.splitlines():
            arguments, code = command(line)
            ended = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
            assert ended.returncode == code, f"{line}\n{ended.stdout}\n{ended.stderr}"
            written.append(ended.stdout)
    return folder, written


def test_the_tutorial_runs(worked_through: tuple[Path, list[str]]) -> None:
    folder, written = worked_through
    assert len(written) >= 10 and (folder / "report.html").is_file() and (folder / "rows.csv").is_file()
    manifest = Ledger(f"file://{folder}/results/2026-11-28", Storage()).manifest()
    assert manifest is not None and (manifest["rows"], manifest["flagged"]) == (60, 12)


def test_the_tutorial_shows_what_commands_write(worked_through: tuple[Path, list[str]]) -> None:
    everything = "\n".join(worked_through[1])
    shown = blocks(TUTORIAL, "text")[:2]
    lines = [line for block in shown for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line.partition(" file://")[0] in everything, line


def test_examples_that_read_results_run(
    worked_through: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(worked_through[0] / "results" / "2026-11-28", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fsspec.config.conf", {})
    examples = blocks((ROOT / "docs/how-to/reading-results.md").read_text(), "python")
    names: dict[str, object] = {}
    ran = [example for example in examples if "polars" not in example and "spark" not in example]
    for example in ran:
        exec(compile(example, "reading-results.md", "exec"), names)
    assert len(ran) == 4 and names["done"] == [(60, 12)]
    assert names["png"][:4] == b"\x89PNG" and names["flagged"] == []
