"""The check of a GPU, rehearsed on the CPU: what it prints and imports, and that each of its checks can fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.bench import gpu
from raydetect.detectors.patchcore import PatchCore

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "pyarrow", "fastapi", "boto3", "botocore", "s3fs", "scipy", "timm", "pandas", "uvicorn")
CPU = torch.device("cpu")


def test_the_rehearsal_passes_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None  # an import of it raises
from jobs.bench import gpu
code = gpu.main(["--device", "cpu", "--detectors", "patchcore", "simplenet", "winclip"])
sys.modules["open_clip"] = None
assert gpu.run("cpu", ["winclip"])["detectors"]["winclip"].keys() == {{"left_out"}}
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Packages: torch, torchvision, numpy")
    assert sum(line.startswith(("patchcore", "simplenet")) and line.endswith("ok") for line in lines) == 4
    assert any(line.startswith("winclip") and "left out: there is no package" in line for line in lines)
    assert not (ROOT / "jobs" / "bench" / "results" / "gpu.json").exists() or "gpu.json" not in done.stdout


def test_without_a_gpu_it_says_so_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "torch sees no CUDA device here; `--device cpu` rehearses the check on the CPU."
    ]


def test_every_check_can_fail() -> None:
    right = {
        "score_difference": 0.0,
        "map_difference": 0.0,
        "distances": 0.0,
        "elsewhere": [],
        "fitted_there_is_finite": True,
    }
    assert gpu.failures("stfpm", right) == []
    for name, wrong, check in (
        ("score_difference", 0.01, "scores"),
        ("map_difference", 0.01, "map"),
        ("map_difference", float("nan"), "map"),
        ("distances", 0.01, "neighbours"),
        ("elsewhere", ["aten.add.Tensor"], "one device"),
        ("fitted_there_is_finite", False, "fit on the device"),
    ):
        assert gpu.failures("stfpm", {**right, name: wrong}) == [check]


def test_another_bank_and_another_device_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = gpu.fitted("patchcore", CPU)
    other, images_BCHW = gpu.copied(reference, "patchcore", CPU), gpu.batch()
    assert isinstance(other, PatchCore)
    assert gpu.neighbours(other, reference) == {"neighbours": 768, "other_rows": 0, "distances": 0.0}
    assert gpu.elsewhere(other, images_BCHW) == []
    score = other.score

    def wandering(images_BCHW: Tensor) -> object:
        torch.ones(1).to("meta")
        return score(images_BCHW)

    monkeypatch.setattr(other, "score", wandering)
    assert gpu.elsewhere(other, images_BCHW)
    assert other.search is not None
    other.search = other._make_search(other.search.bank().flip(1).contiguous())
    found = gpu.neighbours(other, reference)
    assert found["distances"] > 0.01 and found["other_rows"] > 0
    assert gpu.difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
