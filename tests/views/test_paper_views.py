"""`preset: paper`: published parameters, and the paper's own resize and crop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from torchvision import transforms

from raydetect import SpecError, create_ensemble, create_model, list_models
from raydetect.archives.base import Member
from raydetect.artifacts.fit_preprocess import fit_preprocess
from raydetect.artifacts.store import load_artifact, read_record
from raydetect.cli.main import main
from raydetect.config import EvaluateSpec, FitSpec, parse_job
from raydetect.config.geometry.paper_views import PAPER_VIEWS
from raydetect.config.validation import to_plain
from raydetect.evaluation.cells import plan_evaluation
from raydetect.evaluation.run import cell_fit_spec, run_cell
from raydetect.images.decode import DecodeRules, decode_member
from raydetect.local import jobs
from raydetect.storage import Storage
from tests.builders.images import encode
from tests.views.test_view_jobs import data_set, picture

RESNET: dict[str, Any] = {"backbone": "resnet18", "layers": ["layer2"], "weights": "random"}
CENTRE = {"resize": "short_side", "size": [256, 256], "crop": [224, 224]}
FIT: dict[str, Any] = {"kind": "fit", "source": {"uri": "normal/"}, "artifact": "artifact"}


def of_paper(name: str, **changes: Any) -> FitSpec:
    spec = parse_job({**FIT, "detector": {"name": name, "preset": "paper"}, **changes}, "fit")
    assert isinstance(spec, FitSpec)
    return spec


@pytest.mark.parametrize("name", list_models())
def test_each_detector_has_the_view_of_its_paper(name: str) -> None:
    assert name in PAPER_VIEWS
    spec = of_paper(name)
    preprocess = fit_preprocess(spec)  # refuses a crop that is not the size of the input
    if name in ("patchcore", "simplenet", "spade"):
        assert preprocess.image_size == (224, 224)
        assert preprocess.view.recorded() == CENTRE
    elif name == "winclip":
        assert preprocess.image_size == (240, 240) and preprocess.view.recorded() == {"resize": "short_side"}
    else:
        sizes = {"differnet": 448, "devnet": 448, "uniad": 224, "regad": 224, "pyramidflow": 1024, "aprilgan": 518}
        assert preprocess.image_size[0] == sizes.get(name, 256)
        assert preprocess.view.recorded() == {}


def test_an_oblong_picture_is_cut_as_by_torchvision() -> None:
    preprocess = fit_preprocess(of_paper("patchcore"))
    pixels = np.random.default_rng(1).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.fromarray(pixels))
    found = decode_member(Member("k", "", data=encode(pixels)), DecodeRules(10**8, True), preprocess)
    assert found.only_input is not None
    assert np.abs(found.only_input.astype(int) - np.asarray(expected, dtype=int)).max() <= 1


def test_jobs_and_python_look_at_the_same(tmp_path: Path) -> None:
    for i in range(6):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    changes = {"source": {"uri": f"{tmp_path}/"}, "resources": {"cpus_per_worker": 1}, "batch_size": 8}
    by_preset = {"name": "patchcore", "preset": "paper", "params": RESNET}
    by_hand = {"name": "patchcore", "params": {**RESNET, "image_size": [224, 224], "embedding_dims": 1024}}
    for name, detector, view in (("preset", by_preset, {}), ("hand", by_hand, CENTRE)):
        spec = parse_job({**FIT, **changes, "detector": detector, "view": view, "artifact": f"{tmp_path}/{name}"}, "f")
        assert isinstance(spec, FitSpec)
        jobs.fit(spec, lambda *_: None)
    records = [read_record(f"{tmp_path}/{name}", Storage()) for name in ("preset", "hand")]
    assert records[0].body["tensors"] == records[1].body["tensors"]
    assert records[0].preprocess.view.recorded() == CENTRE
    model = create_model("patchcore", preset="paper", **RESNET).configure(batch_size=8, threads=1)
    assert (
        repr(model)
        == "create_model('patchcore', preset='paper', backbone='resnet18', layers=('layer2',), weights='random')"
    )
    model.fit(str(tmp_path / "*.png"), progress=False)
    loaded = load_artifact(f"{tmp_path}/preset", Storage())
    np.testing.assert_array_equal(
        model.predict_proba([picture(9)]),
        create_model.load(loaded.record.uri).configure(threads=1).predict_proba([picture(9)]),
    )
    maps = model.predict_anomaly_map([picture(9)])
    assert np.isnan(maps[0, 0]).all() and np.isfinite(maps[0, 40, 40])


@pytest.mark.parametrize("stated", [{"tile": {}}, {"resize": "pad"}, {"size": [64, 64], "crop": [64, 64]}])
def test_another_resize_beside_the_papers_is_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="preset: paper has a resize and crop of its own; remove"):
        of_paper("patchcore", view=stated)


def test_region_and_bands_may_be_stated_too() -> None:
    spec = of_paper("spade", view={"region": [[[0, 0], [1, 0], [1, 1]]], "range": [0, 4095]})
    assert spec.view.crop == (224, 224) and spec.view.region is not None and spec.view.range == (0, 4095)


def test_members_of_an_ensemble_agree() -> None:
    both = create_ensemble([create_model(name, preset="paper", **RESNET) for name in ("patchcore", "simplenet")])
    spec = parse_job({**FIT, "detector": to_plain(both.spec)}, "fit")
    assert isinstance(spec, FitSpec) and spec.view.crop == (224, 224)
    members = [{"name": "patchcore", "preset": "paper"}, {"name": "stfpm", "params": {"image_size": [224, 224]}}]
    with pytest.raises(SpecError, match="differently for patchcore and stfpm, and all members"):
        parse_job({**FIT, "detector": {"ensemble": members}}, "fit")


def test_an_evaluation_compares_presets(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    lines = [{"name": "patchcore", "preset": preset, "params": RESNET} for preset in ("standard", "paper")]
    values = {
        "kind": "evaluate",
        "data": {"uri": f"{tmp_path}/data", "layout": "mvtec_ad", "categories": ["bolt"]},
        "output": f"{tmp_path}/out",
        "detectors": lines,
        "replicates": 0,
        "resources": {"cpus_per_worker": 1},
    }
    spec = parse_job(values, "evaluate")
    assert isinstance(spec, EvaluateSpec)
    evaluation = plan_evaluation(spec)
    cells = evaluation.cells
    assert [cell.line.split()[:2] for cell in cells] == [["patchcore", "backbone=resnet18"], ["patchcore", "(paper)"]]
    assert [cell_fit_spec(evaluation, cell, "artifact").view.recorded() for cell in cells] == [{}, CENTRE]
    found = [run_cell(evaluation, cell, lambda *_: None) for cell in cells]
    assert all(cell["categories"]["bolt"]["images"] for cell in found)


def test_the_command_says_what_the_paper_looks_at() -> None:
    for name, text in (
        ("patchcore", "the central 224 x 224 px of the picture, whose short side is resized to 256 px"),
        ("winclip", "the centre of the picture, whose short side fills the input"),
        ("stfpm", "the whole picture, stretched to the input, as by default"),
    ):
        assert f"With preset: paper, looks at {text}." in CliRunner().invoke(main, ["detectors", name]).output
