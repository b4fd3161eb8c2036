"""Versions that fit together and those that do not."""

from importlib import metadata

from raydetect.doctor.packages import _python, misfits, package_findings


def test_the_environment_of_the_tests_is_whole() -> None:
    found = {finding.topic: finding for finding in package_findings()}
    assert {finding.state for finding in found.values()} <= {"ok", "note"}
    assert found["torch"].found == metadata.version("torch")
    assert "requirements of raydetect" in found["versions"].found


def test_each_requirement_that_is_not_met_is_named_with_what_to_install() -> None:
    lines = ["torch==1.0", "numpy>=1", "no-such-package>=2", "ghost; extra == 'more'", "ghost; python_version < '3'"]
    found = list(misfits(["torchvision"], lambda name: lines))
    assert [(finding.state, finding.found) for finding in found] == [
        ("missing", f"torchvision needs torch ==1.0, and {metadata.version('torch')} is installed"),
        ("missing", "torchvision needs no-such-package, which is not installed"),
    ]
    assert [finding.advice for finding in found] == ["pip install 'torch==1.0'", "pip install 'no-such-package>=2'"]


def test_an_old_python_is_refused() -> None:
    assert _python((3, 10, 4)).state == "missing" and _python((3, 11, 0)).state == "ok"
