"""Paths mean what they say: a whole job in folders, files and buckets whose names hold every letter that is special."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.cli.main import main
from raydetect.storage import Storage, join_uri
from tests.builders.archives import mixed_files, normal_files, parquet_bytes, tar_bytes, zip_bytes
from tests.builders.images import encode, normal_image
from tests.objectstore import ObjectStore

ODD = "out [line 4] 50% #1 a*b? \u00fc"


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def job(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def lay_out(root: str, storage: Storage) -> int:
    """Every format below one folder; returns how many images there are."""
    files = [(f"m[0]/{name.replace('/', ' #')}", data) for name, data in mixed_files(3, 1, masks=False)]
    for suffix, packer in ((".tar", tar_bytes), (".zip", zip_bytes), (".parquet", parquet_bytes)):
        storage.write(join_uri(root, f"day #1 [a]{suffix}"), packer(files))
    for name, data in files:
        storage.write(join_uri(root, "loose", name), data)
    return 4 * len(files)


def whole_job(root: str, storage: Storage, words: dict[str, Any], tmp_path: Path) -> None:
    storage_options = {"storage": words} if words else {}
    for name, data in normal_files(40):
        storage.write(join_uri(root, "normal", name.rpartition("/")[2]), data)
    images = lay_out(join_uri(root, ODD, "in"), storage)
    params = {"weights": "random", "image_size": [64, 64], "layers": ["layer1"], "coreset_sampling_ratio": 0.01}
    fit = job(
        tmp_path / "fit.yaml",
        kind="fit",
        source={"uri": join_uri(root, "normal")},
        detector={"name": "patchcore", "params": params},
        artifact=join_uri(root, ODD, "artifact"),
        calibration={"holdout_ratio": 0.5},
        **storage_options,
    )
    assert call("fit", fit, "--local").exit_code == 0
    sink = join_uri(root, f"{ODD} results")
    score = job(
        tmp_path / "score.yaml",
        kind="score",
        source={"uri": join_uri(root, ODD, "in")},
        artifact=join_uri(root, ODD, "artifact"),
        sink={"uri": sink, "heatmaps": "all", "style": "map"},
        flag={"alpha": 0.1},
        **storage_options,
    )
    assert "ready to score" in call("check", score).output
    ended = call("score", score, "--local")
    assert ended.exit_code == 0 and f"Scored {images} images" in ended.stdout, ended.output
    storage.delete(join_uri(sink, "manifest.json"))
    storage.delete(join_uri(sink, "ledger", "00002.json"))
    again = call("score", score, "--local")
    assert again.exit_code == 0 and "3 of 4 shards are committed already" in again.stderr
    rows = [
        row
        for file in storage.list(join_uri(sink, "scores"))
        for row in pq.ParquetFile(fsspec.open(file.uri, **storage.fsspec_options(file.uri)).open()).read().to_pylist()
    ]
    assert len(rows) == len({row["key"] for row in rows}) == images
    for row in rows:
        for uri in (row["image_uri"], row["heatmap_uri"]):
            scheme = uri.partition("::")[2].partition("://")[0]
            options = {scheme: storage.fsspec_options(sink)} if scheme else storage.fsspec_options(sink)
            with fsspec.open(uri, **options) as handle:
                assert handle.read()
    reach = ["--endpoint-url", words["endpoint_url"]] if words else []
    assert "finished" in call("status", sink, *reach).output
    assert "all intact" in call("verify", sink, *reach).output
    report = tmp_path / "report.html"
    assert call("report", sink, "-o", str(report), *reach).exit_code == 0
    assert "No image" not in report.read_text() and "No heatmap" not in report.read_text()
    for kind, name in (("csv", "rows.csv"), ("folder", "files"), ("coco", "coco.json")):
        assert call("export", sink, "--as", kind, "-o", str(tmp_path / name), *reach).exit_code == 0
    assert len(json.loads((tmp_path / "coco.json").read_text())["images"]) == images


def test_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / ODD).mkdir()
    whole_job(f"file://{tmp_path}/{ODD}", Storage(), {}, tmp_path)


def test_in_a_bucket(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    settings = {"endpoint_url": object_store.endpoint_url, "key": object_store.key, "secret": object_store.secret}
    whole_job(object_store.uri(ODD), object_store.storage, {**settings, "region": "us-east-1"}, tmp_path)


def test_a_glob_that_names_folders_means_all_below_them(tmp_path: Path) -> None:
    from raydetect.archives.open import open_archive
    from raydetect.config import SourceSpec

    for name in ("2026-11-21", "2026-11-22", "run [1]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encode(normal_image(0)))

    def keys(uri: str) -> list[str]:
        archive = open_archive(SourceSpec(uri=uri), Storage())
        return [m.key.partition("#")[2] for shard in archive.shards() for m in archive.read(shard)]

    assert keys(f"{tmp_path}/2026-11-*") == ["2026-11-21/a.png", "2026-11-22/a.png"]
    assert keys(f"{tmp_path}/run [1]") == ["a.png"]
    assert keys(f"{tmp_path}/*/a.png") == ["2026-11-21/a.png", "2026-11-22/a.png", "run [1]/a.png"]
