"""The DCT scale of JPEGs belongs to the artifact: fits record it, and whatever scores with the artifact follows it."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from raydetect import create_ensemble, create_model
from raydetect.artifacts.fleet import member_uri, write_fleet
from raydetect.artifacts.record import read_record
from raydetect.cli.main import main
from raydetect.config import CalibrateSpec, EvaluateSpec, parse_job
from raydetect.config.validation import apply_overrides
from raydetect.errors import ArtifactError, SpecError
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.run import run_cell
from raydetect.images import decode
from raydetect.images.decode import Pixels, decode_windows
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.records import Member
from raydetect.storage import Storage, join_uri
from raydetect.views.windows import Input
from tests.builders.archives import pack
from tests.builders.images import defect_image, normal_image
from tests.local.test_local import FIT, fit, rows, run

PLACE = ""  # a folder of this module's tests
SIZE = (301, 270)  # decoded at 1/2 for an input of 64 px
SCALES = ("full", "at_least_2x")


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def pictures(start: int, count: int, category: str = "cap") -> list[tuple[str, bytes]]:
    return [(f"{category}/{i:03d}.jpg", jpeg(normal_image(i))) for i in range(start, start + count)]


def fit_with(name: str, *overrides: str) -> dict[str, Any]:
    """Fits `PLACE/name` and returns its record."""
    uri = f"{PLACE}/{name}"
    here = [f"source.uri={PLACE}/normal", f"artifact={uri}", "calibration.holdout_ratio=0.5"]
    fit(*here, "detector.params.layers=[layer1, layer2]", *overrides)
    return dict(read_record(uri, Storage()).body)


def scored(name: str, *overrides: str) -> list[dict[str, Any]]:
    """The rows of a scoring job with `PLACE/name`, without what names the artifact."""
    sink = f"sink.uri={PLACE}/results-{name}-{len(overrides)}"
    source = [f"source.uri={PLACE}/mixed", "source.pattern={category}/{name}.jpg", "source.mask_pattern=null"]
    found = rows(run(*source, f"artifact={PLACE}/{name}", sink, "sink.heatmaps=none", *overrides)[0])
    return [{k: v for k, v in row.items() if k != "artifact"} for row in found]


@pytest.fixture(scope="module", autouse=True)
def _archives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.PLACE", f"file://{tmp_path_factory.mktemp('jpegs')}")
        pack(f"{PLACE}/normal", ".tar", pictures(0, 20), 2)
        mixed = pictures(100, 6) + [(f"cap/x{i}.jpg", jpeg(defect_image(i, "blob")[0])) for i in range(3)]
        pack(f"{PLACE}/mixed", ".tar", mixed, 2)
        pack(f"{PLACE}/more", ".tar", pictures(300, 9), 1)
        for scale in SCALES:
            fit_with(scale, f"preprocess.jpeg_scale={scale}")
        yield


class Decoded:
    """Notes the rules with which images are decoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rules: set[Preprocess] = set()
        patch.setattr(decode, "decode_windows", self._decode_windows)

    def _decode_windows(
        self, member: Member, rules: DecodeRules, preprocess: Preprocess, pool: Executor | None = None
    ) -> Iterator[Input | Pixels]:
        self.rules.add(preprocess)
        return decode_windows(member, rules, preprocess, pool)


def test_new_fits_reduce_and_record_it_and_full_turns_it_off() -> None:
    fast, full = (read_record(f"{PLACE}/{scale}", Storage()) for scale in reversed(SCALES))
    default = fit_with("default")
    assert default["preprocess"] == fast.body["preprocess"] == {"jpeg_scale": "at_least_2x"}
    assert default["tensors"] == fast.body["tensors"] and default["calibration"] == fast.body["calibration"]
    assert full.body["preprocess"] == {"jpeg_scale": "full"} and full.body["format_version"] == 2
    assert full.body["tensors"] != fast.body["tensors"]
    assert fast.preprocess == Preprocess((64, 64), "at_least_2x") and full.preprocess == Preprocess((64, 64))
    assert full.calibration.scores == pytest.approx(fast.calibration.scores, rel=0.15)


@pytest.mark.parametrize("scale", SCALES)
def test_a_fit_and_its_scores_decode_alike(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Decoded(monkeypatch)
    found = scored(scale, f"source.uri={PLACE}/normal", "batch_size=16")
    assert {row["status"] for row in found} == {"ok"} and seen.rules == {Preprocess((64, 64), scale)}  # type: ignore[arg-type]
    assert {(row["width"], row["height"]) for row in found} == {SIZE}
    held_out = read_record(f"{PLACE}/{scale}", Storage()).calibration.scores
    assert len(held_out) == 10
    scores = np.array(sorted(row["image_score"] for row in found))
    nearest = np.abs(scores[:, None] - np.array(held_out)).min(0)
    assert nearest.max() <= 1e-6 * max(held_out)  # the held-out images score as they did in the fit


def test_rows_differ_slightly_and_facts_of_the_file_do_not() -> None:
    full, fast = (scored(scale) for scale in SCALES)
    differences = [abs(a["image_score"] / b["image_score"] - 1) for a, b in zip(full, fast, strict=True)]
    assert np.median(differences) < 0.1 and max(differences) < 0.3, "the coresets differ by a few patches"
    for a, b in zip(full, fast, strict=True):
        assert {k: a[k] for k in ("key", "width", "height", "sha256", "status", "note")} == {
            k: b[k] for k in ("key", "width", "height", "sha256", "status", "note")
        }
        assert a["brightness"] == pytest.approx(b["brightness"], abs=1e-3) and a["brightness"] != b["brightness"]


def rewrite(name: str, source: str, **changes: Any) -> None:
    """Copies an artifact with other entries in its record; None removes one."""
    storage, body = Storage(), dict(read_record(f"{PLACE}/{source}", Storage()).body)
    file = body["tensors"]["file"]
    storage.write(join_uri(PLACE, name, file), storage.read(join_uri(PLACE, source, file)))
    changed = {key: value for key, value in {**body, **changes}.items() if value is not None}
    storage.write(join_uri(PLACE, name, "artifact.json"), json.dumps(changed).encode())


def test_an_artifact_without_the_rule_decodes_in_full() -> None:
    rewrite("old", "full", preprocess=None, format_version=1)
    assert read_record(f"{PLACE}/old", Storage()).preprocess.jpeg_scale == "full"
    assert scored("old") == scored("full")
    loaded = create_model.load(f"{PLACE}/old")
    loaded.save(f"{PLACE}/old-again")
    assert scored("old-again") == scored("full")


@pytest.mark.parametrize(
    "entry",
    [{"jpeg_scale": "at_least_4x"}, {"jpeg_scale": None}, {"jpeg_scale": 2}, {"png_scale": "full"}, [], "full"],
    ids=str,
)
def test_an_unknown_rule_in_a_record_is_refused(entry: Any) -> None:
    rewrite("strange", "full", preprocess=entry)
    with pytest.raises(ArtifactError, match=r"artifact\.json: is damaged or foreign \(preprocess.*Fit again\."):
        read_record(f"{PLACE}/strange", Storage())
    with pytest.raises(ArtifactError, match="preprocess"):
        run(f"artifact={PLACE}/strange")


def test_an_unknown_rule_in_a_job_is_refused() -> None:
    values = apply_overrides(FIT, ["preprocess.jpeg_scale=half"])
    with pytest.raises(SpecError, match=r"preprocess\.jpeg_scale: should be 'at_least_2x' or 'full'"):
        parse_job(values, "job")
    with pytest.raises(SpecError, match=r"jpeg_scale: should be 'at_least_2x' or 'full'"):
        create_model("patchcore", preset="smoke").fit(
            np.zeros((4, 64, 64, 3), np.uint8),
            jpeg_scale="half",  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("scale", SCALES)
def test_models_in_python_decode_as_jobs_do(scale: str, tmp_path: Path) -> None:
    folder = tmp_path / "normal"
    (folder / "cap").mkdir(parents=True)
    for name, data in pictures(0, 20):
        (folder / name).write_bytes(data)
    params = {**FIT["detector"]["params"], "layers": ("layer1", "layer2")}
    paths = sorted(str(path) for path in folder.rglob("*.jpg"))
    model = create_model("patchcore", **params).configure(threads=1)
    model.fit(paths, holdout_ratio=0.5, jpeg_scale=scale)  # type: ignore[arg-type]
    model.save(f"{PLACE}/python-{scale}")
    record = read_record(f"{PLACE}/python-{scale}", Storage())
    assert record.preprocess == Preprocess((64, 64), scale)  # type: ignore[arg-type]
    expected = [row["image_score"] for row in scored(f"python-{scale}", f"source.uri={folder}", "batch_size=16")]
    for asked in (model, create_model.load(f"{PLACE}/python-{scale}").configure(threads=1)):
        assert asked.predict_proba(paths).tolist() == pytest.approx(expected, rel=1e-6)
        assert asked.predict_anomaly_map(paths[:1]).shape == (1, *SIZE[::-1])  # type: ignore[union-attr]
    opened = model.predict_proba([Image.open(path) for path in paths])  # pixels, so there is no scale to choose
    assert (opened.tolist() == pytest.approx(expected, rel=1e-6)) == (scale == "full")


def test_an_ensemble_has_one_rule(tmp_path: Path) -> None:
    (tmp_path / "cap").mkdir()
    paths = [tmp_path / name for name, _ in pictures(0, 8)]
    for path, (_, data) in zip(paths, pictures(0, 8), strict=True):
        path.write_bytes(data)
    settings = {"weights": "random", "image_size": (64, 64), "layers": ("layer1",)}
    both = create_ensemble(
        [create_model("patchcore", **settings), create_model("patchcore", n_neighbors=1, **settings)]
    )
    both.fit([str(path) for path in paths], holdout_ratio=0.5).save(f"{PLACE}/both")
    assert read_record(f"{PLACE}/both", Storage()).preprocess == Preprocess((64, 64), "at_least_2x")


def test_every_detector_of_a_fleet_has_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {}
    for category, scale in zip(("caps", "lids"), SCALES, strict=True):
        uri = member_uri(f"{PLACE}/fleet", category)
        rewrite(uri.removeprefix(f"{PLACE}/"), scale)
        members[category] = read_record(uri, Storage()).digest
    write_fleet(f"{PLACE}/fleet", Storage(), members, {})
    pack(f"{PLACE}/both", ".tar", pictures(100, 4, "caps") + pictures(100, 4, "lids"), 1)
    seen = Decoded(monkeypatch)
    found = scored("fleet", f"source.uri={PLACE}/both")
    assert seen.rules == {Preprocess((64, 64), scale) for scale in SCALES}  # type: ignore[arg-type]
    for scale in SCALES:
        category = "caps" if scale == "full" else "lids"
        alone = {row["sha256"]: row["image_score"] for row in scored(scale, "chunk_images=8")}
        own = {row["sha256"]: row["image_score"] for row in found if row["category"] == category}
        assert len(own) == 4 and all(score == pytest.approx(alone[key], rel=1e-6) for key, score in own.items())


@pytest.mark.parametrize("scale", SCALES)
def test_a_new_calibration_keeps_the_rule(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Decoded(monkeypatch)
    values = {"source": {"uri": f"{PLACE}/more"}, "artifact": f"{PLACE}/{scale}", "output": f"{PLACE}/new-{scale}"}
    spec = parse_job({"kind": "calibrate", **values}, "job")
    assert isinstance(spec, CalibrateSpec)
    jobs.calibrate(spec, lambda *_: None)
    record = read_record(f"{PLACE}/new-{scale}", Storage())
    assert seen.rules == {record.preprocess} == {Preprocess((64, 64), scale)}  # type: ignore[arg-type]
    scores = sorted(row["image_score"] for row in scored(f"new-{scale}", f"source.uri={PLACE}/more", "batch_size=16"))
    assert record.calibration.scores == pytest.approx(scores, rel=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_an_extension_decodes_as_its_artifact(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, more = Decoded(monkeypatch), [f"source.uri={PLACE}/more", f"extend={PLACE}/{scale}"]
    body = fit_with(f"extended-{scale}", *more)
    assert seen.rules == {Preprocess((64, 64), scale)} and body["preprocess"] == {"jpeg_scale": scale}  # type: ignore[arg-type]
    other = SCALES[1 - SCALES.index(scale)]
    with pytest.raises(SpecError, match=f"jpeg_scale = {other}: .* decoded with {scale}, .* Remove the setting"):
        fit_with("never", *more, f"preprocess.jpeg_scale={other}")
    assert fit_with("stated", *more, f"preprocess.jpeg_scale={scale}")["tensors"] == body["tensors"]


def test_the_check_of_a_fit_refuses_an_extension_with_another_rule(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/normal", ".tar", pictures(0, 8), 1)
    here = [f"source.uri={tmp_path}/normal", f"artifact={tmp_path}/new"]
    jobs.fit(parse_job(apply_overrides(FIT, [*here, f"artifact={tmp_path}/old"]), "job"), lambda *_: None)  # type: ignore[arg-type]
    job = tmp_path / "fit.yaml"
    job.write_text(json.dumps(apply_overrides(FIT, [*here, f"extend={tmp_path}/old"])))
    assert CliRunner().invoke(main, ["check", str(job)]).exit_code == 0
    ended = CliRunner().invoke(main, ["check", str(job), "--set", "preprocess.jpeg_scale=full"])
    assert ended.exit_code == 2 and "preprocess.jpeg_scale = full: " in ended.output, ended.output


@pytest.mark.parametrize("scale", SCALES)
def test_an_evaluation_fits_and_scores_by_its_rule(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, image in [(f"train/good/{i}", normal_image(i)) for i in range(8)] + [
        ("test/good/0", normal_image(50)),
        ("test/good/1", normal_image(51)),
        ("test/blob/0", defect_image(0, "blob")[0]),
    ]:
        path = tmp_path / "cap" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image))
    values = {
        "kind": "evaluate",
        "data": {"uri": str(tmp_path), "layout": "mvtec_ad"},
        "output": f"{PLACE}/board-{scale}",
        "detectors": [{"name": "patchcore", "params": FIT["detector"]["params"]}],
        "holdout_ratio": 0.4,
        "replicates": 0,
        "preprocess": {"jpeg_scale": scale},
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, EvaluateSpec)
    plan = plan_evaluation(spec)
    seen = Decoded(monkeypatch)
    run_cell(plan, plan.cells[0], lambda *_: None)
    assert seen.rules == {Preprocess((64, 64), scale)}  # type: ignore[arg-type]
