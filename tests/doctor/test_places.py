"""Places to read and write: nothing is left behind, and what is wrong is said without secrets."""

from pathlib import Path
from typing import Any

import pytest

from raydetect.config import StorageOptions
from raydetect.doctor.places import place_findings
from raydetect.errors import StorageError
from raydetect.storage import Storage


def test_a_folder_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.tar").write_bytes(b"x" * 10)
    uris = [str(tmp_path / "there"), str(tmp_path / "new" / "results"), str(tmp_path / "a.tar")]
    there, new, file = place_findings(uris, StorageOptions())
    assert [finding.state for finding in (there, new, file)] == ["ok"] * 3
    assert "64 KiB written in " in there.found and "deleted in" in there.found and "exist" not in there.found
    assert new.found.endswith("does not exist yet and can be created")
    assert "a file; 10 bytes read in " in file.found
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "there"]


def test_a_bucket_is_written_and_a_missing_one_is_said(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = object_store.storage.options
    found, missing = place_findings([object_store.uri("x"), "s3://no-such-bucket-here/x"], options)
    assert found.state == "ok" and "64 KiB written in " in found.found
    assert not list(object_store.storage.glob(object_store.uri("*")))
    assert missing.state == "missing" and "no-such-bucket-here" in missing.found and missing.advice
    shown = found.found + missing.found + missing.advice
    assert options.secret.get_secret_value() not in shown


def test_a_place_that_can_only_be_read_is_good_for_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Storage, uri: str, data: bytes) -> None:
        raise StorageError(f"{uri}: access is denied.")

    monkeypatch.setattr(Storage, "write", refuse)
    (found,) = place_findings([str(tmp_path)], StorageOptions())
    assert found.state == "note" and "cannot be written" in found.found and "source" in found.advice


def test_an_endpoint_that_does_not_answer_is_missing_without_its_keys() -> None:
    options = StorageOptions(endpoint_url="http://127.0.0.1:9", key="k", secret="hush-hush")  # type: ignore[arg-type]
    (found,) = place_findings(["s3://a/b"], options)
    assert found.state == "missing" and "cannot be reached" in found.found and "hush" not in found.found + found.advice
