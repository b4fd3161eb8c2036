"""The command line: exit codes, one-sentence answers, help without torch or Ray, completion."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from raydetect.cli import comparison
from raydetect.cli.main import main
from raydetect.detectors._registry import list_models
from raydetect.errors import StorageError
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.builders.archives import mixed_files, normal_files, pack, tar_bytes
from tests.builders.images import normal_image
from tests.builders.ledgers import rewrite_record
from tests.whole_jobs.runs import COMMAND

FIT: dict[str, Any] = {
    "kind": "fit",
    "detector": {
        "name": "patchcore",
        "params": {
            "backbone": "resnet18",
            "weights": "random",
            "image_size": [64, 64],
            "coreset_sampling_ratio": 0.05,
        },
    },
    "calibration": {"holdout_ratio": 0.4},
}


class Place:
    """A folder with job files, images and an artifact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pack(f"file://{folder}/normal", ".tar", normal_files(25), 2)
        pack(f"file://{folder}/mixed", ".tar", mixed_files(4, 1), 2)
        self.fit = self.job("fit", FIT | {"source": {"uri": f"{folder}/normal"}, "artifact": f"{folder}/artifact"})
        self.score = self.job("score", self.score_job())

    def score_job(self, **changes: Any) -> dict[str, Any]:
        return {
            "kind": "score",
            "source": {"uri": f"{self.folder}/mixed", "pattern": "{category}/test/{defect}/{name}.png"},
            "artifact": f"{self.folder}/artifact",
            "sink": {"uri": f"{self.folder}/results"},
            "flag": {"alpha": 0.1},
            **changes,
        }

    def job(self, name: str, values: dict[str, Any]) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("cli"))
    ended = call("fit", made.fit, "--local")
    assert ended.exit_code == 0, ended.output
    assert "Fitted patchcore on 15 images" in ended.output and "Note: random weights" in ended.output
    assert f"Artifact: file://{made.folder}/artifact" in ended.output
    return made


def test_help_is_instant_and_loads_neither_torch_nor_ray() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "from raydetect.cli.main import main; main(['--help'])"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert not loaded & {"torch", "ray", "pyarrow", "numpy", "pydantic", "fsspec"}
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([COMMAND, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5
    for word in (
        "check",
        "detectors",
        "export",
        "fit",
        "plan",
        "report",
        "score",
        "serve",
        "status",
        "submit",
        "verify",
    ):
        assert f"  {word} " in ended.stdout


def test_shell_completion_works() -> None:
    environment = {**os.environ, "_RAYDETECT_COMPLETE": "bash_complete", "COMP_WORDS": "raydetect s", "COMP_CWORD": "1"}
    ended = subprocess.run([COMMAND], capture_output=True, text=True, env=environment)
    assert [line.partition(",")[2] for line in ended.stdout.split()] == ["score", "serve", "status", "submit"]


def test_detectors_are_listed_with_defaults_and_doc_lines() -> None:
    listed = call("detectors").output
    sizes = {"devnet": [448, 448], "differnet": [448, 448], "uniad": [224, 224], "regad": [224, 224]}
    sizes |= {"aprilgan": [518, 518], "winclip": [0, 0], "pyramidflow": [0, 0]}  # one that depends on the backbone
    for name in list_models():
        assert any(line.startswith(name) for line in listed.splitlines())
        described = call("detectors", name).output
        assert any(word in described for word in ("arXiv:", "doi:", "https://openaccess.thecvf.com/"))
        assert f"image_size: tuple[int, int] = {sizes.get(name, [256, 256])}" in described
    assert "coreset_sampling_ratio: float = 0.1" in call("detectors", "patchcore").output
    wrong = call("detectors", "patchcor")
    assert wrong.exit_code == 2 and "Did you mean 'patchcore'?" in wrong.output


def test_waiting_threads_leave_their_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    call("detectors")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    call("detectors")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_detectors_are_compared_by_machine_with_their_settings() -> None:
    lines = call("detectors", "--compare").output.splitlines()
    table, published = lines[: lines.index("Published:")], lines[lines.index("Published:") + 1 :]
    assert max(map(len, lines)) <= 80
    assert sorted(line.split(" ")[0] for line in table if line.split(" ")[0] in list_models()) == list(list_models())
    assert [line.partition(":")[0].strip() for line in published if line[2:3].strip()] == list(list_models())
    stored = json.loads((Path(comparison.__file__).parents[1] / "detectors" / "measured.json").read_text())
    assert set(stored["detectors"]) <= set(list_models())
    machine = ""
    for line in table:
        machine = line if line.endswith(": make reproduce") or line == comparison.NOT_MEASURED else machine
        figures = stored["detectors"].get(line.split(" ")[0])
        if figures:
            assert machine == f"{stored['data']}, {figures['machine']}: make reproduce"
            assert f"{figures['image_auroc']:.3f}" in line
        elif line in list_models():
            assert machine == comparison.NOT_MEASURED
    text = " ".join(" ".join(table).split())
    assert "ours: 256 px, resnet18, 100 % of the training, 188 of 209 images" in text  # stfpm
    assert "ours: 128 px (448), resnet18, 10 % of the training" in text and "8 labelled defects" in text  # devnet
    refused = call("detectors", "patchcore", "--compare")
    assert refused.exit_code == 2 and "Omit the name" in refused.output


def test_what_differs_from_the_defaults_is_beside_a_figure() -> None:
    measured = {"images": {"fitted": 9, "normal": 10, "defects": 0}, "tuned": True}
    settings = {"image_size": [64, 128], "epochs": 5, "sub_epochs": 2, "layers": ["layer1"], "clamp": 1.9}
    assert comparison.settings_text("cflow", {"settings": settings, **measured}) == (
        "64 x 128 px (256), wide_resnet50_2, 5 % of the training, layers layer1 (layer2+layer3+layer4), "
        "9 of 10 images, settings chosen after another run on the same test images"
    )


def test_a_score_job_from_check_to_status(place: Place) -> None:
    assert "ready to score" in call("check", place.score).output
    before = call("plan", place.score, "--workers", "1,3", "--price", "2").output
    assert "Shards     2 left of 2" in before and "images/s and worker" in before
    ended = call("score", place.score, "--local")
    assert ended.exit_code == 0 and "Scored 7 images in 2 shards (7 ok)." in ended.output
    assert "Image AUROC over 7 labelled images" in ended.output
    assert f"Rows: file://{place.folder}/results/scores" in ended.output
    again = call("score", place.score, "--local")
    assert again.exit_code == 0 and "2 of 2 shards are committed already" in again.output
    status = call("status", f"{place.folder}/results")
    assert "finished" in status.output and "2 of 2 committed" in status.output
    assert yaml.safe_load(call("status", f"{place.folder}/results", "--json").output)["rows"] == 7
    assert "Nothing is left to score: all 2 shards are committed." in call("plan", place.score).output
    changed = call("score", place.score, "--local", "--set", "flag.alpha=0.2")
    assert changed.exit_code == 2 and "flag.alpha: 0.1 -> 0.2" in changed.output


def test_a_store_that_fails_after_the_manifest_is_one_line_and_exit_code_1(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(ledger: Ledger) -> None:
        raise StorageError(f"{ledger.uri}: cannot read it.")

    assert call("score", place.score, "--local").exit_code == 0
    monkeypatch.setattr("raydetect.sinks.run_progress.labelled_auroc", failing)
    ended = call("score", place.score, "--local")
    assert ended.exit_code == 1 and ended.stderr.endswith("/results: cannot read it.\n"), ended.output
    monkeypatch.undo()
    assert "Image AUROC" in call("score", place.score, "--local").output


@pytest.mark.parametrize("command", ["check", "plan", "status"])
def test_what_only_reads_records_loads_neither_torch_nor_ray(place: Place, command: str) -> None:
    assert call("score", place.score, "--local").exit_code == 0
    words = [command, str(place.folder / "results") if command == "status" else str(place.score)]
    code = f"""
import sys
from raydetect.cli.main import main
main({words!r}, standalone_mode=False)
loaded = sorted({{'torch', 'ray', 'scipy.stats', 'pandas'}} & set(sys.modules))
print('loaded:', loaded)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "loaded: []", ended.stdout + ended.stderr


def test_every_mistake_is_named_before_anything_runs(place: Place) -> None:
    folder = place.folder
    fit = FIT | {"source": {"uri": f"{folder}/normal"}, "artifact": "x"}
    no_weights = {"name": "stfpm", "params": {"weights": "/no/file.safetensors"}}
    nothing = place.score_job(source={"uri": f"{folder}/nowhere"}, artifact=f"{folder}/none")
    misspelt = place.score_job(sink={"uri": f"{folder}/r", "heatmap": "all"})
    cases: list[tuple[dict[str, Any], list[str]]] = [
        (misspelt, ["sink.heatmap: unknown key", "'heatmaps'"]),
        (place.score_job(chunk_images="many"), ["chunk_images"]),
        (nothing, ["nothing is there", "no artifact"]),
        (place.score_job(flag={"alpha": 0.001}), ["at least 999 held-out"]),
        (place.score_job(source={"uri": f"{folder}/../x"}), ["nothing is there"]),
        (place.score_job(source={"uri": "s3://b/../x"}), ["`..` is not allowed"]),
        (fit | {"precision": "float16"}, ["precision: should be 'float32' or 'bfloat16'"]),
        (fit | {"detector": {"name": "patchcoer"}}, ["'patchcore'"]),
        (fit | {"detector": no_weights}, ["/no/file.safetensors", "weights: random"]),
    ]
    for values, messages in cases:
        ended = call("check", place.job("wrong", values))
        assert ended.exit_code == 2, ended.output
        for message in messages:
            assert message in ended.output
    assert call("check", f"{folder}/no.yaml").exit_code == 2
    assert "Run `raydetect fit" in call("score", place.fit).output
    assert call("plan", place.score, "--workers", "1,x").exit_code == 2


def test_an_artifact_of_a_newer_format_is_refused(place: Place, tmp_path: Path) -> None:
    record = (place.folder / "artifact" / "artifact.json").read_text()
    (tmp_path / "artifact.json").write_text(record.replace('"format_version": 2', '"format_version": 7'))
    ended = call("score", place.score, "--local", "--set", f"artifact={tmp_path}")
    assert ended.exit_code == 2 and "has format 7" in ended.output and "Update raydetect" in ended.output


def test_too_many_bad_rows_end_with_exit_code_3_and_all_rows(place: Place, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("widget/test/good/a.png", b""), *normal_files(1)]))
    options = ["--set", f"source={{uri: {tmp_path}}}", "--set", f"sink.uri={tmp_path}/results", "--local"]
    ended = call("score", place.score, *options)
    assert ended.exit_code == 3 and "1 of 2 rows" in ended.output and "1 empty" in ended.output
    assert (tmp_path / "results" / "manifest.json").exists()
    stopped = call(
        "score", place.score, *options, "--set", f"sink.uri={tmp_path}/other", "--set", "source.on_bad_member=fail"
    )
    assert stopped.exit_code == 1 and "zero bytes" in stopped.output


def test_notes_are_said_at_the_end_and_in_the_status(place: Place, tmp_path: Path) -> None:
    (tmp_path / "noted").mkdir()
    picture = Image.fromarray(normal_image(1))
    picture.save(tmp_path / "noted" / "a.tif", save_all=True, append_images=[picture])
    picture.save(tmp_path / "noted" / "b.png", exif=b"Exif\0\0no TIFF header")
    overrides = (f"source={{uri: {tmp_path}/noted}}", f"sink.uri={tmp_path}/out")
    ended = call("score", place.score, "--local", *(part for override in overrides for part in ("--set", override)))
    assert ended.exit_code == 0 and "Notes: 1 exif_ignored, 1 pages_not_read.\n" in ended.output
    assert "Notes      1 exif_ignored, 1 pages_not_read\n" in call("status", f"{tmp_path}/out").output


def test_a_run_whose_archive_grew_says_so_and_goes_on(place: Place, tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/mixed", ".tar", mixed_files(2, 0), 2)
    options = ["--local", "--set", f"source.uri={tmp_path}/mixed", "--set", f"sink.uri={tmp_path}/results"]
    assert call("score", place.score, *options).exit_code == 0
    (tmp_path / "mixed" / "part-9.tar").write_bytes(tar_bytes(mixed_files(3, 0)))
    assert "Shards     1 left of 3" in call("plan", place.score, *options[1:]).output
    ended = call("score", place.score, *options)
    assert ended.exit_code == 0 and "Scored 5 images in 3 shards (5 ok)." in ended.stdout
    assert "it had 2 shards and has 3 now, 1 more. The 2 committed ones are unchanged" in ended.stderr
    assert "archive has changed" not in call("score", place.score, *options).output


def test_unreadable_images_are_tried_again_on_demand(place: Place, tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/mixed", ".tar", mixed_files(6, 0), 3)
    options = ["--local", "--set", f"source.uri={tmp_path}/mixed", "--set", f"sink.uri={tmp_path}/results"]
    assert call("score", place.score, *options).exit_code == 0
    none = call("score", place.score, *options, "--retry", "unreadable")
    assert none.exit_code == 0 and "No committed shard contains a row with status unreadable." in none.stderr
    assert "3 of 3 shards are committed already" in none.stderr
    ledger = Ledger(f"file://{tmp_path}/results", Storage())
    times = {receipt.shard: receipt.committed_unix for receipt in ledger.receipts()}
    rewrite_record(ledger, 1, lambda body: body.update(statuses={"ok": 1, "unreadable": 1}))
    again = call("score", place.score, *options)  # without the flag they stay as they are
    assert again.exit_code == 3 and "1 unreadable" in again.output
    retried = call("score", place.score, *options, "--retry", "unreadable")
    assert retried.exit_code == 0 and "Scored 6 images in 3 shards (6 ok)." in retried.stdout, retried.output
    assert "Retrying 1 rows with status unreadable: rescoring 1 shards." in retried.stderr
    assert "2 of 3 shards are committed already" in retried.stderr
    anew = {receipt.shard for receipt in ledger.receipts() if receipt.committed_unix != times[receipt.shard]}
    assert anew == {1}


def test_an_outage_is_no_mistake_of_the_job_and_a_wrong_path_is(place: Place, tmp_path: Path) -> None:
    """Exit code 1 says start it again, 2 says mend the job file."""
    down = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "hush-hush"}
    source = place.job("down", place.score_job(source={"uri": "s3://away/x", "storage": down}))
    artifact = place.job("downer", place.score_job(artifact="s3://away/artifact", storage=down))
    for command, job in (("check", source), ("score", source), ("plan", artifact)):
        ended = call(command, job, *(["--local"] if command == "score" else []))
        assert ended.exit_code == 1 and "cannot be reached" in ended.output, ended.output
        assert "hush" not in ended.output
    ended = call("status", "s3://away/results", "--endpoint-url", "http://127.0.0.1:9")
    assert ended.exit_code == 1 and ("cannot be reached" in ended.output or "credentials" in ended.output)
    missing = {"source": {"uri": f"{tmp_path}/nowhere"}}, {"artifact": f"{tmp_path}/nowhere"}
    for change in missing:
        job = place.job("missing", place.score_job(**change))
        for command in ("check", "plan", "score"):
            ended = call(command, job, *(["--local"] if command == "score" else []))
            assert ended.exit_code == 2 and "nowhere" in ended.output, ended.output
    mixed = place.score_job(source={"uri": "s3://away/x", "storage": down}, artifact=f"{tmp_path}/nowhere")
    ended = call("check", place.job("mixed", mixed))
    assert ended.exit_code == 2 and "cannot be reached" in ended.output and "no artifact" in ended.output


def test_a_file_that_vanished_after_planning_is_no_mistake_of_the_job(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydetect.planning import plan

    pack(f"file://{tmp_path}/mixed", ".tar", mixed_files(2, 0), 2)
    planned = plan.plan_score

    def then_gone(*arguments: Any, **named: Any) -> Any:
        made = planned(*arguments, **named)
        (tmp_path / "mixed" / "part-1.tar").unlink()
        return made

    monkeypatch.setattr(plan, "plan_score", then_gone)
    overrides = [f"source={{uri: {tmp_path}/mixed}}", f"sink.uri={tmp_path}/results"]
    ended = call("score", place.score, "--local", *(w for override in overrides for w in ("--set", override)))
    assert ended.exit_code == 3 and "1 of 2 rows and 1 of 2 shards are bad (1 unreadable)" in ended.output, ended.output


def test_status_of_nothing_says_so(tmp_path: Path) -> None:
    ended = call("status", str(tmp_path))
    assert ended.exit_code == 2
    assert "holds no run.json" in ended.output


def test_no_command_prints_a_traceback_or_a_secret(place: Place) -> None:
    secret = "hush-hush-secret"
    values = place.score_job(storage={"key": "k", "secret": secret}, sink={"uri": "s3://x/y"}, nonsense=1)
    for command in ("check", "score", "plan"):
        ended = call(command, place.job("secret", values))
        assert ended.exit_code == 2 and secret not in ended.output and "Traceback" not in ended.output


def test_what_labels_were_read_as_is_said_by_check_and_fit(place: Place, tmp_path: Path) -> None:
    """Classes in alphabetical order, as Hugging Face numbers them: the normal ones are not number 0."""
    images = [data for _, data in normal_files(12)]
    table = pa.table({"image": pa.array(images, pa.binary()), "label": [0] * 8 + [1] * 3 + [-1]})
    features = {"label": {"names": ["broken", "good"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "notes.txt").write_text("x")
    job = place.job("classes", FIT | {"source": {"uri": f"{tmp_path}/in"}, "artifact": f"{tmp_path}/artifact"})
    reading = "label: 0 = good (3), 1 = broken (8), none (1)\n"
    checked, fitted = call("check", job), call("fit", job, "--local")
    assert checked.exit_code == fitted.exit_code == 0
    for ended in (checked, fitted):
        assert reading in ended.stdout and "1 other_suffix (notes.txt)" in ended.stdout
    assert "8 labelled anomalous left out" in fitted.stdout
    assert "Note: only 3 of 11 labelled images are normal." in fitted.stdout
    assert "source.normal_names" in fitted.stdout
    inverted = call("fit", job, "--local", "--replace", "--set", "source.normal_names=[nothing]")
    assert inverted.exit_code == 0 and "label:" not in inverted.stdout  # no class is normal, so no label is read


@pytest.mark.parametrize("command", ["fit", "score", "audit"])
def test_a_source_without_an_image_is_exit_code_2_with_what_is_there(
    place: Place, tmp_path: Path, command: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes([("notes.txt", b"x"), ("._a.png", b"x")]))
    settings = FIT | {"artifact": f"{tmp_path}/artifact"} if command == "fit" else place.score_job(kind=command)
    settings = settings | {"source": {"uri": f"{tmp_path}/in"}}
    if command != "fit":
        settings["sink"] = {"uri": f"{tmp_path}/out"}
    ended = call(command, place.job("empty", settings), "--local")
    assert ended.exit_code == 2, ended.output
    assert "1 hidden (._a.png), 1 other_suffix (notes.txt)" in ended.output


def test_a_damaged_shard_that_was_uploaded_again_is_scored_on_demand(place: Place, tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/mixed", ".tar", mixed_files(6, 0), 3)
    broken = tmp_path / "mixed" / "part-1.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    options = ["--local", "--set", f"source={{uri: {tmp_path}/mixed}}", "--set", f"sink.uri={tmp_path}/results"]
    first = call("score", place.score, *options)
    assert first.exit_code == 3 and "1 bad_shard" in first.output
    broken.write_bytes(whole)
    refused = call("score", place.score, *options)
    assert refused.exit_code == 2 and "00001 has other content now" in refused.output
    again = call("score", place.score, *options, "--retry", "bad_shard")
    assert again.exit_code == 0 and "Scored 6 images in 3 shards (6 ok)." in again.stdout, again.output
    assert "all intact" in call("verify", f"{tmp_path}/results").output


def test_check_says_in_a_sentence_what_is_damaged_or_useless(place: Place, tmp_path: Path) -> None:
    def checked(name: str, data: bytes, kind: str = "score") -> Result:
        (tmp_path / name).mkdir()
        suffix = ".parquet" if name == "columns" else ".tar"
        (tmp_path / name / f"a{suffix}").write_bytes(data)
        settings = (
            place.score_job(sink={"uri": f"{tmp_path}/out"})
            if kind == "score"
            else FIT | {"artifact": f"{tmp_path}/artifact"}
        )
        return call("check", place.job("checked", settings | {"source": {"uri": f"{tmp_path}/{name}"}}))

    damaged = checked("damaged", tar_bytes(mixed_files(2, 0))[:2000])
    assert damaged.exit_code == 0 and "ready to score" in damaged.output
    empty = checked("empty", tar_bytes([("x.json", b"{}")]))
    assert empty.exit_code == 2 and "has no images; left out: 1 sidecar_without_image" in empty.output
    labels = [("0.png", normal_files(1)[0][1]), ("0.cls", b"1")]
    anomalous = checked("anomalous", tar_bytes(labels), "fit")
    assert anomalous.exit_code == 2 and "has no normal images (label: 1 = 1 (1))" in anomalous.output
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": pa.array([b"x"]), "b": pa.array([b"x"])}), buffer)
    columns = checked("columns", buffer.getvalue())
    assert columns.exit_code == 2 and "2 columns may have encoded images" in columns.output


def test_a_fit_refuses_to_lose_a_shard_and_names_what_was_bad(place: Place, tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/in", ".tar", normal_files(20), 1)
    (tmp_path / "in" / "b.tar").write_bytes(b"junk" * 500)
    job = place.job("lost", FIT | {"source": {"uri": f"{tmp_path}/in"}, "artifact": f"{tmp_path}/artifact"})
    ended = call("fit", job, "--local")
    assert ended.exit_code == 3 and "1 of 2 shards" in ended.output and "b.tar: broken after" in ended.output
    allowed = call("fit", job, "--local", "--set", "max_bad_fraction=0.5")
    assert allowed.exit_code == 0 and "Bad: file://" in allowed.output and "b.tar: broken after" in allowed.output
