"""PatchCore against slow float64 code."""

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.search.search import ShardedSearch, split_bank
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.patchcore import PatchCore
from raydetect.errors import ArtifactError, SpecError
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch
from tests.reference import embedding, reference

PARAMS = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "coreset_sampling_ratio": 0.2}


def fitted(**params: object) -> PatchCore:
    detector = build_detector("patchcore", {**PARAMS, **params})
    assert isinstance(detector, PatchCore)
    detector.load_weights()
    images = as_batch([normal_image(i, 64) for i in range(12)])
    with torch.inference_mode():
        state, names = FitState(), [f"{i:02d}" for i in range(12)]
        state.add(names, detector.collect(Batch(images, names)))
        detector.finish(state, lambda *_: None)
    return detector


@pytest.mark.parametrize("n_neighbors", [1, 3, 9])
def test_scores_and_maps_are_equation_7_in_float64(n_neighbors: int) -> None:
    detector = fitted(n_neighbors=n_neighbors, smoothing_sigma=0)
    images = as_batch([normal_image(900, 64), defect_image(1, "blob", 64)[0], defect_image(2, "scratch", 64)[0]])
    scores = detector.score(images)
    assert detector.search is not None
    bank = detector.search.bank().double().numpy()
    with torch.inference_mode():
        embeddings = detector._embed(images).double().numpy()
    for i, grid in enumerate(embeddings):
        distance, index = reference.nearest_rows(grid.reshape(-1, grid.shape[-1]), bank)
        best = distance.min(1)
        worst = int(best.argmax())
        around = np.sqrt(((bank - bank[index[worst]]) ** 2).sum(1)).argsort(kind="stable")[:n_neighbors]
        expected = best[worst]
        if n_neighbors > 1:
            expected = reference.reweighted(best[worst], [distance[worst, row] for row in around])
        assert float(scores.image_score_B[i]) == pytest.approx(expected, rel=1e-3)
        coarse = torch.from_numpy(best.reshape(8, 8))[None, None]
        upsampled = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(scores.anomaly_map_BHW[i].numpy(), upsampled, rtol=1e-3, atol=1e-5)


def test_the_map_is_smoothed_as_scipy_does() -> None:
    images = as_batch([defect_image(1, "blob", 64)[0]])
    plain = fitted(smoothing_sigma=0).score(images).anomaly_map_BHW[0].numpy()
    smooth = fitted(smoothing_sigma=3).score(images).anomaly_map_BHW[0].numpy()
    np.testing.assert_allclose(smooth, gaussian_filter(plain.astype(np.float64), 3, mode="reflect"), rtol=1e-3)


def test_a_bank_of_pooled_embeddings_scores_as_slow_code_on_them() -> None:
    dims = 50
    detector = fitted(embedding_dims=dims, n_neighbors=1)
    assert detector.backbone is not None and detector.tensors()["bank"].shape == (round(12 * 64 * 0.2), dims)
    images = as_batch([normal_image(900, 64), defect_image(1, "blob", 64)[0]])
    with torch.inference_mode():
        levels = [level.numpy() for level in detector.backbone(images)]
    rows = embedding.pooled_patch_embeddings(levels, dims).reshape(2, -1, dims)
    bank = detector.tensors()["bank"].double().numpy()
    want = [reference.nearest_rows(patches, bank)[0].min(1).max() for patches in rows]
    np.testing.assert_allclose(detector.score(images).image_score_B.numpy(), want, rtol=1e-3)
    paper = build_detector("patchcore", {"backbone": "resnet18"}, preset="paper").params
    assert isinstance(paper, PatchCore.Params) and paper.embedding_dims == 1024


def test_a_training_image_is_normal_when_the_bank_holds_everything() -> None:
    detector = fitted(coreset_sampling_ratio=1.0, smoothing_sigma=0)
    scores = detector.score(as_batch([normal_image(i, 64) for i in range(12)]))
    assert scores.image_score_B.abs().max() < 1e-3


def test_the_bank_has_the_stated_share_and_bound() -> None:
    assert fitted().tensors()["bank"].shape == (round(12 * 64 * 0.2), 384)
    assert fitted(max_bank_vectors=17).tensors()["bank"].shape == (17, 384)


@pytest.mark.parametrize("search", ["bfloat16", "faiss"])
def test_every_exact_search_gives_the_same_scores(search: str) -> None:
    images = as_batch([normal_image(900, 64), defect_image(1, "blob", 64)[0]])
    expected, found = fitted().score(images), fitted(search=search).score(images)
    assert torch.equal(found.image_score_B, expected.image_score_B)
    assert torch.equal(found.anomaly_map_BHW, expected.anomaly_map_BHW)
    assert fitted(search=search).facts()["search"] == {"kind": search}


def test_ivfpq_tells_its_recall_and_scores_the_same_when_loaded() -> None:
    detector = fitted(search="ivfpq", coreset_sampling_ratio=0.9)
    message = detector.facts()["search"]
    assert message["kind"] == "ivfpq" and message["patches"] == 12 * 64 - round(12 * 64 * 0.9)
    assert 0.3 < message["recall_at_1"] <= 1.0
    other = build_detector("patchcore", {**PARAMS, "search": "ivfpq", "coreset_sampling_ratio": 0.9})
    other.load_tensors(detector.tensors())
    images = as_batch([normal_image(900, 64), defect_image(1, "blob", 64)[0]])
    for a, b in zip(detector.score(images).anomaly_map_BHW, other.score(images).anomaly_map_BHW, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArtifactError, match="no tensor 'bank_index'"):
        other.load_tensors({name: value for name, value in detector.tensors().items() if name != "bank_index"})


def test_ivfpq_that_left_nothing_out_claims_no_recall() -> None:
    detector = fitted(search="ivfpq", coreset_sampling_ratio=1.0)
    assert detector.facts()["search"] == {"kind": "ivfpq"}


def test_a_fit_that_needs_faiss_misses_it_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SpecError, match=r"raydetect\[cpu\]"):
        build_detector("patchcore", {**PARAMS, "search": "faiss"}).load_weights()


def test_with_its_bank_elsewhere_it_scores_the_same_and_holds_no_bank() -> None:
    detector = fitted()
    tensors = detector.tensors()
    pieces = [detector.piece_search(tensors["bank"][a:b]) for a, b in split_bank(len(tensors["bank"]), 3)]
    other = build_detector("patchcore", PARAMS)
    other.load_beside({name: value for name, value in tensors.items() if name != "bank"}, ShardedSearch(pieces))
    images = as_batch([normal_image(900, 64), defect_image(1, "blob", 64)[0]])
    expected, found = detector.score(images), other.score(images)
    assert torch.equal(found.image_score_B, expected.image_score_B)
    assert torch.equal(found.anomaly_map_BHW, expected.anomaly_map_BHW)
