"""The precision of the networks is a parameter of the fit: its artifact names it, and whatever scores follows it."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from raydetect import create_ensemble, create_model
from raydetect.artifacts.record import RECORD, read_record
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.precision import in_float32, run_network
from raydetect.check import find_problems
from raydetect.config import CalibrateSpec, Precision, parse_job
from raydetect.config.validation import apply_overrides
from raydetect.errors import ArtifactError, SpecError
from raydetect.local import jobs
from raydetect.storage import Storage, join_uri
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.images import encode, normal_image
from tests.local.test_local import FIT, fit, rows, run, spec_of

PLACE = "memory://precision"
PRECISIONS: tuple[Precision, Precision] = ("float32", "bfloat16")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _archives() -> Iterator[None]:
    pack(f"{PLACE}/normal", ".tar", normal_files(20), 2)
    pack(f"{PLACE}/others", ".tar", [(f"cap/{i:03d}.png", encode(normal_image(500 + i))) for i in range(12)], 1)
    pack(f"{PLACE}/mixed", ".tar", mixed_files(6, 3), 2)
    yield


def fit_with(name: str, *overrides: str) -> dict[str, Any]:
    """Fits `PLACE/name` and returns its record."""
    uri = f"{PLACE}/{name}"
    fit(f"source.uri={PLACE}/normal", f"artifact={uri}", "calibration.holdout_ratio=0.5", *overrides)
    return dict(read_record(uri, Storage()).body)


def scored(name: str, source: str = "mixed", *overrides: str) -> list[float]:
    """Image scores of a scoring job with `PLACE/name`, in the order of keys."""
    sink = f"sink.uri={PLACE}/results-{name}-{source}-{len(overrides)}"
    pattern = ["source.pattern=null", "source.mask_pattern=null"] if source != "mixed" else []
    plan, _ = run(f"source.uri={PLACE}/{source}", f"artifact={PLACE}/{name}", sink, *pattern, *overrides)
    return [row["image_score"] for row in rows(plan)]


def rewrite(name: str, **changes: Any) -> None:
    """Changes parameters in the record of `PLACE/name`; None removes one."""
    record_uri = join_uri(f"{PLACE}/{name}", RECORD)
    body = json.loads(Storage().read(record_uri))
    params = {key: value for key, value in {**body["params"], **changes}.items() if value is not None}
    Storage().write(record_uri, json.dumps({**body, "params": params}).encode())


def test_the_artifact_names_its_precision_and_scoring_follows_it() -> None:
    whole, half = fit_with("float32"), fit_with("bfloat16", "precision=bfloat16")
    assert (whole["params"]["precision"], half["params"]["precision"]) == PRECISIONS
    assert fit_with("by-params", "detector.params.precision=bfloat16")["tensors"] == half["tensors"]
    scores = {name: scored(name) for name in PRECISIONS}
    assert scores["bfloat16"] != scores["float32"]
    np.testing.assert_allclose(scores["bfloat16"], scores["float32"], rtol=0.25)  # the coreset differs too


def test_calibration_and_scoring_use_the_same_numbers() -> None:
    held_out = fit_with("held-out", "precision=bfloat16")["calibration"]["scores"]
    found = scored("held-out", "normal", "batch_size=16")
    assert set(held_out) <= set(found)


def test_rows_do_not_depend_on_chunks() -> None:
    fit_with("chunks", "precision=bfloat16")
    assert scored("chunks", "mixed", "chunk_images=3") == scored("chunks", "mixed", "chunk_images=7", "batch_size=4")


def test_a_new_calibration_keeps_the_precision() -> None:
    fit_with("old", "precision=bfloat16")
    values = {"source": {"uri": f"{PLACE}/others"}, "artifact": f"{PLACE}/old", "output": f"{PLACE}/recalibrated"}
    spec = parse_job({"kind": "calibrate", **values}, "job")
    assert isinstance(spec, CalibrateSpec)
    jobs.calibrate(spec, lambda *_: None)
    body = read_record(f"{PLACE}/recalibrated", Storage()).body
    assert body["params"]["precision"] == "bfloat16"
    assert body["calibration"]["scores"] == sorted(scored("old", "others", "batch_size=16"))


def test_artifacts_that_state_none_are_float32_and_can_be_extended() -> None:
    fit_with("older")
    before = scored("older")
    rewrite("older", precision=None)
    assert load_artifact(f"{PLACE}/older", Storage()).detector.params.precision == "float32"
    assert scored("older", "mixed", "chunk_images=5") == before
    more = f"extend={PLACE}/older"
    assert fit_with("extended", more)["params"]["precision"] == "float32"
    with pytest.raises(
        SpecError, match=r'older: was fitted with other settings \(params\.precision: "float32" -> "bfl'
    ):
        fit_with("never", more, "precision=bfloat16")


def test_an_extension_of_a_bfloat16_fit_states_it() -> None:
    fit_with("half", "precision=bfloat16")
    assert fit_with("more", f"extend={PLACE}/half", "precision=bfloat16")["params"]["precision"] == "bfloat16"
    with pytest.raises(SpecError, match=r'params\.precision: "bfloat16" -> "float32"'):
        fit_with("never", f"extend={PLACE}/half")


def test_an_unknown_precision_is_refused() -> None:
    message = r"precision: should be 'float32' or 'bfloat16'"
    with pytest.raises(SpecError, match=message):
        parse_job(apply_overrides(FIT, ["precision=float16"]), "job")
    with pytest.raises(SpecError, match=message):
        create_model("patchcore", precision="half")
    fit_with("strange")
    rewrite("strange", precision="float8")
    with pytest.raises(ArtifactError, match=message):
        load_artifact(f"{PLACE}/strange", Storage())


def test_contradicting_precisions_are_refused() -> None:
    stated = ["precision=float32", "detector.params.precision=bfloat16"]
    with pytest.raises(SpecError, match="precision float32 contradicts precision bfloat16 in the params of patchcore"):
        parse_job(apply_overrides(FIT, stated), "job")
    spec_of(FIT, "precision=bfloat16", "detector.params.precision=bfloat16")


@pytest.mark.parametrize("stated", [("float32", "float32"), ("float32", "bfloat16")])
def test_members_of_an_ensemble_have_their_own_precision(stated: tuple[Precision, Precision]) -> None:
    words = {"weights": "random", "image_size": (48, 48), "layers": ("layer1",), "backbone": "resnet18"}
    members = [create_model("patchcore", precision=p, seed=0, **words) for p in stated]
    images = np.stack([normal_image(i, 48) for i in range(12)])
    create_ensemble(members).fit(images, holdout_ratio=0.5).save(f"{PLACE}/ensemble")
    params = read_record(f"{PLACE}/ensemble", Storage()).body["params"]
    assert tuple(member["params"]["precision"] for member in params["members"]) == stated
    assert params["precision"] == max(stated, key=PRECISIONS.index)
    detector = load_artifact(f"{PLACE}/ensemble", Storage()).detector
    assert [member.params.precision for member in detector.members] == list(stated)  # type: ignore[attr-defined]


def test_a_job_sets_the_precision_of_all_members() -> None:
    members = [{"name": "patchcore"}, {"name": "stfpm", "params": {"precision": "bfloat16"}}]
    values = {**FIT, "detector": {"ensemble": members}, "source": {"uri": f"{PLACE}/normal"}}
    spec = spec_of(values, "precision=bfloat16")
    assert [member.params["precision"] for member in spec.detector.members] == ["bfloat16"] * 2
    with pytest.raises(SpecError, match="contradicts precision bfloat16 in the params of stfpm"):
        spec_of(values, "precision=float32")
    words = "detector={name: patchcore, params: {weights: random}}"
    assert find_problems(spec_of(FIT, f"source.uri={PLACE}/normal", words, "precision=bfloat16")) == []


def test_models_in_python_are_those_of_jobs() -> None:
    images = np.stack([normal_image(i) for i in range(12)])
    half = create_model("patchcore", **{**FIT["detector"]["params"], "precision": "bfloat16"})
    assert "precision='bfloat16'" in repr(half)
    half.fit(images, holdout_ratio=0.5).save(f"{PLACE}/python")
    loaded = create_model.load(f"{PLACE}/python")
    assert loaded.get_params()["precision"] == "bfloat16"
    assert np.array_equal(loaded.predict_proba(images), half.predict_proba(images))


def test_only_the_network_is_rounded() -> None:
    images_BCHW = torch.from_numpy(normal_image(0, 64)).permute(2, 0, 1)[None]
    whole, half = (Backbone("resnet18", ("layer1", "layer2"), 0, precision=p).freeze() for p in PRECISIONS)
    pairs = list(zip(whole(images_BCHW), half(images_BCHW), strict=True))
    for exact, rounded in pairs:
        assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    assert not torch.is_autocast_enabled("cpu")


def test_a_part_of_a_network_stays_float32() -> None:
    layer, rows_ND = torch.nn.Linear(64, 8), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = layer(rows_ND)
    part = run_network(lambda x: in_float32(layer, x), rows_ND, precision="bfloat16", device=CPU)
    whole = run_network(layer, rows_ND, precision="bfloat16", device=CPU)
    assert torch.equal(part, expected) and not torch.equal(whole, expected)
    assert whole.dtype == torch.float32 and torch.equal(whole, whole.bfloat16().float())
    pair = run_network(lambda x: (layer(x), [x]), rows_ND, precision="bfloat16", device=CPU)
    assert torch.equal(pair[0], whole) and torch.equal(pair[1][0], rows_ND)
