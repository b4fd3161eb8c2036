"""Weights in caches, by the backbones of the detectors."""

from pathlib import Path

import pytest

from raydetect.detectors import _weights
from raydetect.doctor.backbones import weight_findings


def test_weights_are_named_with_their_detectors_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    url = _weights._torchvision_url("wide_resnet50_2")
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    found = {finding.found.partition(" ")[0]: finding for finding in weight_findings()}
    wide, small = found["wide_resnet50_2"], found["resnet18"]
    assert wide.state == "ok" and "patchcore" in wide.found and wide.found.endswith(str(cached))
    assert small.state == "note" and "stfpm" in small.found and "HF_HUB_OFFLINE is set" in small.found
    clip = found["ViT-B-16-plus-240"]
    assert clip.state == "note" and "laion400m_e32 (winclip): in no cache" in clip.found
    assert sum(bool(finding.advice) for finding in found.values()) == 1
