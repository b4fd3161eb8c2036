"""Parameters in Python: what scikit-learn expects of them, and every refusal of one that would do nothing."""

import copy
import pickle
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import joblib
import numpy as np
import pytest
from sklearn.base import clone

from raydetect import Estimator, create_ensemble, create_model, list_models
from raydetect.config import DetectorSpec, FitSpec, MemberSpec, parse_job
from raydetect.detectors._base import UsedIf
from raydetect.detectors._describe import spec_of_record
from raydetect.detectors._registry import build_detector, build_from, detector_class, unused_params
from raydetect.errors import SpecError
from raydetect.python_api.models import ELSEWHERE
from tests.builders.images import normal_image

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 8) -> np.ndarray:
    return np.stack([normal_image(i, 64) for i in range(count)])


def model(**params: Any) -> Estimator:
    return create_model("patchcore", preset="smoke", weights="random", **params)


def conditions() -> list[tuple[str, str, UsedIf]]:
    found = []
    for name in list_models():
        for field, hint in get_type_hints(detector_class(name).Params, include_extras=True).items():
            found += [(name, field, extra) for extra in get_args(hint)[1:] if isinstance(extra, UsedIf)]
    return found


# of the other parameter: a value with which the first one is used, and one with which it is not
SETTINGS: dict[str, tuple[Any, Any]] = {
    "head": ("flow", "difference"),
    "train_difference": (True, False),
    "level": ("patch", "image"),
    "augment_type": ("3way", ""),
    "epochs": (None, 3),
    "texture_ratio": (0.5, 0),
    "backbone": ("resnet18", None),
    "projector": (True, False),
    "ssot_weight": (1.0, 0),
    "k_shot": (2, 0),
}
STATED: dict[str, Any] = {"k_neighbors": 3, "train_difference": False, "textures": "memory://textures"}


@pytest.mark.parametrize(("name", "field", "condition"), conditions(), ids=lambda value: str(value)[:20])
def test_a_stated_parameter_without_an_effect_is_refused(name: str, field: str, condition: UsedIf) -> None:
    used, unused = SETTINGS[condition.other]
    if condition.other == "augment_type":
        used, unused = condition.values[-1], "scar" if "normal" in condition.values else "normal"
    if condition.values == ("difference",):
        used, unused = unused, used
    others = {}
    if name == "pyramidflow":  # its default is a backbone
        used, unused = (None, "resnet18") if condition.values == (None,) else (used, unused)
        others = {"backbone": None if field == "weights" else "resnet18"}
    value = STATED.get(field, getattr(build_detector(name, {}).params, field))
    other = others or ({condition.other: unused} if unused is not None else {})
    with pytest.raises(
        SpecError, match=rf"^detector {name}: {field} has no effect with {condition.other}: .*Remove it"
    ):
        create_model(name, **{**other, field: value})
    member = MemberSpec(name=name, params={**other, field: value})
    with pytest.raises(SpecError, match="has no effect"):
        build_from(DetectorSpec(ensemble=(member,)), 0)
    stated = {} if used is None and not others else {condition.other: used}
    accepted = create_model(name, **{**stated, field: value})
    assert field in accepted.get_params()
    silent = build_detector(name, other).params
    assert condition.holds(silent) is False and unused_params(silent)[field] == condition
    assert field not in create_model(name, **other).get_params()


def test_conditions_name_parameters() -> None:
    assert len(conditions()) >= 25
    for name, _, condition in conditions():
        assert condition.other in {field.name for field in fields(detector_class(name).Params)}


def test_refusals_say_what_to_do() -> None:
    for call, message in (
        (
            lambda: create_model("differnet", train_difference=True, epochs=1),
            "detector differnet: epochs has no effect with head: difference. Remove it, or set head: flow.",
        ),
        (
            lambda: create_model("riad", layers=("layer1",)),
            "detector riad: layers has no effect with backbone: none. Remove it, or set backbone.",
        ),
        (
            lambda: create_model("memseg", texture_ratio=0, textures="x"),
            "detector memseg: textures has no effect with texture_ratio: 0.0. Remove it, or set another texture_ratio.",
        ),
    ):
        with pytest.raises(SpecError) as error:
            call()
        assert str(error.value) == message
    assert create_model("differnet", head="flow", k_neighbors=None).get_params()["head"] == "flow"


def test_records_state_all_parameters_and_can_be_loaded() -> None:
    record = {"detector": "riad", "params": {**as_record("riad"), "layers": ["layer1"]}}
    assert "layers" not in spec_of_record(record).params
    assert Estimator(spec_of_record(record)).get_params()["epochs"] == 300
    whole = {"detector": "ensemble", "params": {"members": [{"name": "riad", "params": record["params"]}]}}
    whole["params"]["weights"] = [1.0]  # type: ignore[index]
    assert "layers" not in spec_of_record(whole).ensemble[0].params


def as_record(name: str) -> dict[str, Any]:
    params = build_detector(name, {}).params
    return {field.name: getattr(params, field.name) for field in fields(params)}


@pytest.mark.parametrize("name", list_models())
def test_one_number_is_a_square_in_python_and_in_job_files(name: str) -> None:
    side = 240
    if name in ("memseg", "pyramidflow", "reverse_distillation_pp"):
        side = 256
    if name == "aprilgan":
        side = 252
    assert create_model(name, image_size=side).get_params()["image_size"] == (side, side)
    detector = {"name": name, "params": {"image_size": side}}
    job = parse_job({"kind": "fit", "source": {"uri": "x"}, "artifact": "y", "detector": detector}, "fit")
    assert isinstance(job, FitSpec) and build_from(job.detector, 0).params.image_size == (side, side)
    for wrong in (True, 25.5, "256", (256,), (1, 2, 3)):
        with pytest.raises(SpecError, match="image_size"):
            create_model(name, image_size=wrong)


@pytest.mark.parametrize("given", sorted(ELSEWHERE))
def test_settings_of_a_run_are_refused_with_where_they_go(given: str) -> None:
    with pytest.raises(
        SpecError, match=rf"create_model: {given} is no parameter of patchcore\. Give it to \w+.*{given}"
    ):
        create_model("patchcore", **{given: 1})
    assert create_model("stfpm", batch_size=4).get_params()["batch_size"] == 4  # its own, of the training


def test_a_misspelt_backbone_is_refused_at_once() -> None:
    said = r"backbone 'resnet81' is unknown to torchvision and timm\. Did you mean 'resnet18'\? .*list all names\.$"
    for call in (
        lambda: create_model("patchcore", backbone="resnet81"),
        lambda: create_ensemble([create_model("stfpm", backbone="resnet81"), "patchcore"]),
        lambda: create_model("patchcore").set_params(backbone="resnet81"),
    ):
        with pytest.raises(SpecError, match=said) as error:
            call()
        assert len(str(error.value)) < 200
    assert create_model("patchcore", backbone="wide_resnet50").get_params()["backbone"] == "wide_resnet50"
    assert create_model("patchcore", backbone="timm/resnet18d", layers=("layer2",)).seed == 0
    assert create_model("riad").get_params()["backbone"] is None


def test_set_params_changes_what_is_given_and_needs_another_fit() -> None:
    found = model().fit(images(), progress=False)
    before = found.predict_proba(images(2))
    assert found.set_params() is found.set_params(**found.get_params()) is found
    assert found.set_params(n_neighbors=found.get_params()["n_neighbors"], image_size=[64, 64]) is found
    assert (found.predict_proba(images(2)) == before).all()  # nothing changed, so the fit is kept
    for wrong, message in (
        ({"n_neighbours": 3}, "Did you mean 'n_neighbors'"),
        ({"n_neighbors": 0}, "n_neighbors"),
        ({"seed": -1}, "seed: is -1"),
        ({"preset": "papre"}, "preset"),
        ({"name": "stfpm"}, r"set_params: the model is a patchcore\. Call create_model\('stfpm'\)"),
    ):
        with pytest.raises(SpecError, match=message):
            found.set_params(**wrong)
    assert (found.predict_proba(images(2)) == before).all()
    with pytest.raises(ValueError, match="is not fitted"):
        found.set_params(n_neighbors=2, seed=3).predict(images(1))
    assert found.get_params()["n_neighbors"] == 2 and found.seed == 3 and found.get_params()["preset"] == "smoke"
    assert found.get_params(deep=False) == found.get_params(deep=True)

    flow = create_model("differnet", n_flows=3, epochs=7)
    assert repr(flow.set_params(head="difference", k_neighbors=3)).endswith("k_neighbors=3, train_difference=True)")
    assert "n_flows" not in flow.spec.params and "epochs" not in flow.spec.params
    with pytest.raises(SpecError, match="epochs has no effect"):
        flow.set_params(epochs=2)


def test_a_clone_is_unfitted_and_equal() -> None:
    found = model(n_neighbors=3).configure(threads=1, batch_size=4).fit(images(), progress=False)
    twin = clone(found)
    assert isinstance(twin, Estimator) and twin is not found
    assert twin.get_params() == found.get_params() and twin.settings == found.settings and repr(twin) == repr(found)
    with pytest.raises(ValueError, match="is not fitted"):
        twin.predict(images(1))
    assert (twin.fit(images(), progress=False).predict_proba(images(2)) == found.predict_proba(images(2))).all()
    both = create_ensemble([model(), model(n_neighbors=2)], weights=[2, 1], seed=4)
    assert repr(clone(both)) == repr(both)
    with pytest.raises(SpecError, match="an ensemble is made of its members"):
        both.set_params(seed=1)
    assert both.set_params() is both


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_has_a_fit_of_its_own(duplicate: Any) -> None:
    both = create_ensemble([model(), create_model("stfpm", preset="smoke", weights="random", epochs=1)])
    for found in (model(search="faiss"), both):
        found.fit(images(12), holdout_ratio=0.5, progress=False)
        scores = found.predict_proba(images(3))
        twin = duplicate(found)
        assert (twin.predict_proba(images(3)) == scores).all() and twin.threshold(0.5) == found.threshold(0.5)
        assert twin.save("memory://same", replace=True) == found.save("memory://same", replace=True)
        twin.fit(images(9), holdout_ratio=0.5, progress=False)
        assert (found.predict_proba(images(3)) == scores).all()
    assert repr(duplicate(model())) == repr(model())


def test_a_pickle_is_refused_and_says_what_to_do(tmp_path: Any) -> None:
    said = r"patchcore: a model cannot be pickled\. Call save\(uri\), and create_model\.load\(uri\)"
    for found in (model(), model().fit(images(), progress=False)):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=said):
                pickle.dumps(found, protocol)
        with pytest.raises(TypeError, match=said):
            joblib.dump(found, tmp_path / "model")
