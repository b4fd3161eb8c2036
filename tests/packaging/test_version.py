"""`raydetect --version`: the versions of what matters, read without importing it."""

import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from raydetect import __version__
from raydetect.cli.main import main


def test_version_names_the_packages_and_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = metadata.version

    def without_torch(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", without_torch)
    written = CliRunner().invoke(main, ["--version"])
    assert written.exit_code == 0
    first, second = written.output.splitlines()
    assert first == f"raydetect {__version__}"
    assert second == f"Python {sys.version.split()[0]}, torch not installed, Ray {found('ray')}"


def test_version_does_not_import_torch_or_ray() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; from raydetect.cli.main import main; main()"
    written = subprocess.run([sys.executable, "-c", code, "--version"], check=True, capture_output=True, text=True)
    assert metadata.version("torch") in written.stdout
