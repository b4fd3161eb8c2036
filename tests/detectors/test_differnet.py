"""DifferNet against autograd's Jacobian, loops, differences of both ends of a nudge and brute force; on real images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from raydetect import create_model
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.networks.flows import log_likelihood
from raydetect.blocks.networks.image_flow import deep_subnet
from raydetect.blocks.seeding import keyed_generator, keyed_unit
from raydetect.config import DetectorSpec
from raydetect.config.validation import to_plain
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector, build_from
from raydetect.detectors.differnet import DifferNet
from raydetect.errors import SpecError
from tests.builders.bottle import bottles_of, gain_by_training
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch
from tests.reference import reference

TINY = {"weights": "random", "backbone": "resnet18", "layers": ["layer2"], "image_size": [32, 32], "num_scales": 2}
FLOW = {**TINY, "n_flows": 2, "hidden_dims": 16, "test_transforms": 4, "train_transforms": 3}
DIFFERENCE = {
    "weights": "random",
    "backbone": "resnet18",
    "layers": ["layer1", "layer2"],
    "image_size": [32, 32],
    "head": "difference",
    "k_neighbors": 3,
    "smoothing_sigma": 0,
}


def built(params: dict[str, object], **more: object) -> DifferNet:
    detector = build_detector("differnet", {**params, **more})
    assert isinstance(detector, DifferNet)
    detector.load_weights()
    return detector


def batch(count: int, epoch: int = 0) -> Batch:
    images, keys = as_batch([normal_image(i, 32) for i in range(count)]), [f"image-{i}" for i in range(count)]
    return Batch(images, keys, epoch=epoch)


def ready(**more: object) -> DifferNet:
    """With a flow that is moved away from where it begins."""
    detector = built(FLOW, **more)
    detector.begin_training(4)
    with torch.no_grad():
        for number, value in enumerate(detector.networks["head"].parameters()):
            value += 0.05 * torch.randn(value.shape, generator=keyed_generator(number))
    detector.end_training()
    return detector


def plain_features(detector: DifferNet, picture_HWC: np.ndarray) -> Tensor:
    """Mean features of the picture and of every second pixel of it."""
    backbone, found = detector.networks["backbone"], []
    for step in (1, 2):
        image = torch.from_numpy(picture_HWC[::step, ::step].copy()).permute(2, 0, 1)[None]
        found.append(backbone(image)[0][0].flatten(1).mean(1))
    return torch.cat(found)


def test_the_likelihood_is_the_change_of_variables_by_autograds_jacobian() -> None:
    detector = built(FLOW, n_flows=3)
    detector.begin_training(4)
    flow = detector.networks["head"].double()
    x = torch.randn(1, 256, dtype=torch.float64)
    z, log_det = flow(x)
    jacobian = torch.autograd.functional.jacobian(lambda flat: flow(flat[None])[0][0], x[0])
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-7)
    assert abs(log_det.item()) > 0.1
    torch.testing.assert_close(flow.inverse(z), x)
    assert [type(part).__name__ for part in deep_subnet(16, 4, 6)] == ["Linear", "ReLU"] * 3 + ["Linear"]


def test_a_step_sees_features_of_pillows_rotations_keyed_by_image_epoch_and_number() -> None:
    detector, images = built(FLOW), batch(2, epoch=5)
    (features,) = detector.training_pieces(images)
    assert features.shape == (3 * 2, 2 * 128)
    for number in range(3):
        for i, key in enumerate(images.keys):
            degrees = 180 * (2 * keyed_unit(0, "angle", key, 5, number) - 1)
            turned = Image.fromarray(images.images_BCHW[i].permute(1, 2, 0).numpy()).rotate(degrees)
            expected = plain_features(detector, np.asarray(turned))
            torch.testing.assert_close(features[2 * number + i], expected, rtol=0.02, atol=0.02)
    halves = [detector.training_pieces(Batch(images.images_BCHW[[i]], [images.keys[i]], epoch=5))[0] for i in range(2)]
    torch.testing.assert_close(torch.stack(halves, 1).flatten(0, 1), features)
    assert not torch.equal(detector.training_pieces(batch(2, epoch=6))[0], features)
    (still,) = built(FLOW, max_degrees=0).training_pieces(images)
    torch.testing.assert_close(still[:2], still[2:4])


def test_the_loss_is_the_negative_log_likelihood_per_dim_and_falls() -> None:
    detector = built(FLOW, learning_rate=2e-3)
    plan = detector.begin_training(4)
    (piece,) = detector.training_pieces(batch(4))
    expected = -log_likelihood(*detector.networks["head"](piece)).mean() / 256 - 0.5 * math.log(2 * math.pi)
    losses = []
    for _ in range(30):
        loss = detector.training_loss(piece)
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_the_score_is_the_mean_over_even_rotations_of_the_latent_likelihood() -> None:
    detector = ready()
    picture = defect_image(1, "blob", 32)[0]
    found = detector.score(as_batch([picture])).image_score_B.item()
    expected = []
    for degrees in (-180, -90, 0, 90):
        turned = np.asarray(Image.fromarray(picture).rotate(degrees))
        z = detector.networks["head"](plain_features(detector, turned)[None])[0][0]
        expected.append(-torch.distributions.Normal(0.0, 1.0).log_prob(z).mean().item())
    assert found == pytest.approx(np.mean(expected), rel=1e-3)


def test_the_map_is_the_squared_mean_size_of_the_smoothed_gradient() -> None:
    detector = ready(test_transforms=1, smoothing_sigma=2.0)
    image = as_batch([defect_image(1, "blob", 32)[0]])
    backbone = detector.networks["backbone"]

    def likelihood(normal: Tensor) -> Tensor:
        scaled = [normal, F.interpolate(normal, scale_factor=0.5, mode="nearest")]
        features = torch.cat([backbone.features(part)[0].mean((2, 3)) for part in scaled], 1)
        return log_likelihood(*detector.networks["head"](features))[0]

    normal = backbone.normalised(image).contiguous()
    (gradient,) = torch.autograd.grad(likelihood(normal.requires_grad_()), normal)
    nudge = 1e-2 * gradient.sign() * torch.rand(normal.shape, generator=keyed_generator(0))
    with torch.no_grad():
        rise = likelihood(normal + nudge) - likelihood(normal - nudge)
    assert (gradient * nudge).sum().item() == pytest.approx(rise.item() / 2, rel=0.05)
    smoothed = gaussian_filter(gradient[0].double().numpy(), (0, 2, 2))
    expected = np.abs(smoothed).mean(0) ** 2
    with torch.inference_mode():
        found = detector.score(image).anomaly_map_BHW[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3 * expected.max())


def test_gradients_are_turned_back_to_where_they_come_from() -> None:
    """A quarter turn moves pixels onto pixels, so the map of a turned image is the turned map."""
    detector = ready(test_transforms=4, smoothing_sigma=1.0)
    image = as_batch([defect_image(1, "blob", 32)[0]])
    plain, quarter = (detector.score(each) for each in (image, torch.rot90(image, 1, (2, 3))))
    turned = torch.rot90(plain.anomaly_map_BHW, 1, (1, 2))
    torch.testing.assert_close(quarter.anomaly_map_BHW, turned, rtol=1e-2, atol=1e-3 * float(turned.max()))
    torch.testing.assert_close(quarter.image_score_B, plain.image_score_B, rtol=1e-4, atol=0)


def collected(**more: object) -> DifferNet:
    detector, images = built(DIFFERENCE, **more), batch(6)
    state = FitState()
    with torch.inference_mode():
        state.add(images.keys, detector.collect(images))
    detector.finish(state, lambda *_: None)
    return detector


def test_without_training_the_score_is_the_mean_distance_to_k_patches_by_brute_force() -> None:
    detector = collected(train_difference=False, coreset_sampling_ratio=0.5)
    assert detector.phases == ("collect",)
    image = as_batch([defect_image(1, "blob", 32)[0]])
    with torch.inference_mode():
        patches = detector.collect(Batch(image, ["x"]))["embeddings"][0]
    distance = np.sort(reference.nearest_rows(patches.numpy(), detector.tensors()["bank"].numpy())[0], 1)
    grid = torch.from_numpy(distance[:, :3].mean(1).reshape(1, 1, 8, 8))
    expected = F.interpolate(grid, (32, 32), mode="bilinear")[0, 0]
    scores = detector.score(image)
    np.testing.assert_allclose(scores.anomaly_map_BHW[0].numpy(), expected.numpy(), rtol=1e-4)
    assert scores.image_score_B.item() == scores.anomaly_map_BHW.max().item()


def test_a_step_leaves_an_images_own_patches_out_and_is_shared_by_workers() -> None:
    detector = collected(coreset_sampling_ratio=1.0)
    assert detector.coreset is not None
    images, bank = batch(6), detector._normal().bank
    with torch.inference_mode():
        rows = detector.collect(images)["embeddings"].double()
    for i in (0, 4):
        own = torch.tensor([key == images.keys[i] for key in detector.coreset.keys_M])
        assert own.sum() == 64
        mine, others = (torch.cdist(rows[i], bank[part].double()).amin(1) for part in (own, ~own))
        assert mine.max() < 1e-4 * others.mean()
    whole = detector.training_pieces(images)[0]
    halves = [detector.training_pieces(Batch(images.images_BCHW[i::2], images.keys[i::2]))[0] for i in range(2)]
    assert len(whole.values_ND) == sum(len(half.values_ND) for half in halves)
    normal = whole.values_ND[whole.simulated_N == 0]
    assert normal.mean(1).min() > 1e-3 * whole.values_ND.mean()
    detector.begin_training(6)
    losses = [detector.training_loss(piece).item() for piece in (whole, *halves)]
    assert losses[0] == pytest.approx(sum(losses[1:]) / 2, rel=1e-4)


def test_the_trained_network_beats_any_constant_and_scores_differences_to_k_patches() -> None:
    detector = collected(difference_rate=0.1)
    plan = detector.begin_training(6)
    losses = []
    for epoch in range(30):
        loss = detector.training_loss(detector.training_pieces(batch(6, epoch))[0])
        plan.optimizer.zero_grad()
        loss.backward()
        plan.optimizer.step()
        losses.append(loss.item())
    detector.end_training()
    assert np.mean(losses[-10:]) < 0.85 * math.log(2)
    image, bank = as_batch([defect_image(1, "blob", 32)[0]]), detector.tensors()["bank"]
    with torch.inference_mode():
        patches = detector.collect(Batch(image, ["x"]))["embeddings"][0]
    nearest = torch.cdist(patches.double(), bank.double()).argsort(1)[:, :3]
    differences = torch.stack([(patches[n] - bank[nearest[n]]).abs().mean(0) for n in range(64)])
    logits = detector.networks["head"](differences).view(1, 1, 8, 8)
    expected = F.interpolate(logits, (32, 32), mode="bilinear")[0, 0]
    np.testing.assert_allclose(detector.score(image).anomaly_map_BHW[0].numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert detector.facts()["coreset"]["rows"] == round(6 * 64 * 0.1)


def words(**stated: object) -> DifferNet.Params:
    params = build_detector("differnet", stated).params
    assert isinstance(params, DifferNet.Params)
    return params


def test_the_head_follows_from_what_is_stated_and_settles_what_is_not() -> None:
    with pytest.raises(SpecError, match=r"k_neighbors has no effect with head: flow\. Remove it, or set head: differ"):
        build_from(DetectorSpec(name="differnet", params={"head": "flow", "k_neighbors": 5}), 0)
    for stated in ({"head": "difference"}, {"k_neighbors": 5, "train_difference": True}, {"k_neighbors": 5}):
        params = words(backbone="wide_resnet50", **stated)
        assert (params.head, params.k_neighbors, params.train_difference) == ("difference", 5, True)
        assert params.layers == ("layer2", "layer3")
    untrained = words(train_difference=False)
    assert (untrained.head, untrained.layers) == ("difference", ("features.5", "features.12"))
    usual = words()
    assert (usual.head, usual.layers, usual.backbone) == ("flow", ("features",), "alexnet")
    assert (usual.k_neighbors, usual.train_difference) == (None, None)
    for params in (usual, untrained, words(backbone="resnet18", k_neighbors=7)):
        assert words(**to_plain(params)) == params  # as a record has it
    assert build_detector("differnet", {"k_neighbors": 5}).phases == ("collect", "train")
    assert build_detector("differnet", {}).phases == ("train",) == DifferNet.phases


def test_images_that_are_too_small_for_a_scale_are_refused_before_a_fit_and_in_scoring() -> None:
    small = {"weights": "random", "n_flows": 1, "hidden_dims": 8, "test_transforms": 1}
    with pytest.raises(SpecError, match=r"alexnet does not take images of 32 x 32 px, which are 64 x 64 px at scale 2"):
        built(small, image_size=[64, 64])
    detector = built(small, image_size=[128, 128], num_scales=2)
    detector.begin_training(1)
    detector.end_training()
    assert torch.isfinite(detector.score(torch.zeros(1, 3, 128, 128, dtype=torch.uint8)).image_score_B).all()
    with pytest.raises(SpecError, match="32 x 40 px at scale"):
        detector.score(torch.zeros(1, 3, 32, 40, dtype=torch.uint8))


def test_the_call_that_people_know_fits_and_scores() -> None:
    images = np.stack([normal_image(i, 32) for i in range(8)])
    model = create_model(
        "differnet", backbone="wide_resnet50", k_neighbors=5, train_difference=True, weights="random",
        image_size=(32, 32), layers=("layer1",), difference_epochs=2,
    )  # fmt: skip
    model.fit(images, holdout_ratio=0.25)
    assert model.predict_proba(images).shape == (8,) and model.predict_anomaly_map(images).shape == (8, 32, 32)


REAL = {"backbone": "resnet18", "image_size": [96, 96]}


@pytest.mark.parametrize(
    ("params", "image_floor", "pixel_floor"),
    [
        (
            {
                **{"layers": ["layer3"], "epochs": 6, "batch_size": 4, "learning_rate": 1e-3, "hidden_dims": 256},
                **{"n_flows": 4, "train_transforms": 1, "test_transforms": 4},
            },
            0.7,  # chance is 0.5; 318 steps of the 192 passes that the flow is trained for
            0.5,
        ),
        ({"head": "difference", "difference_epochs": 2, "coreset_sampling_ratio": 0.02}, 0.9, 0.9),
    ],
    ids=["flow", "difference"],
)
def test_it_finds_the_broken_bottles(
    params: dict[str, object], image_floor: float, pixel_floor: float, real_data: Path, real_weights: Path
) -> None:
    """Small images and few epochs, in batches of 4 for enough steps of the flow; every second test image."""
    detector = built({**REAL, "weights": str(real_weights), **params})
    gain = gain_by_training(detector, *bottles_of(real_data, 96))
    assert gain.losses[-1] < gain.losses[0]
    assert gain.reaches(image=image_floor, pixel=pixel_floor)
    if "head" not in params:  # the difference begins as the plain distance, which finds as much
        assert gain.at_least(image=0.3, pixel=0.03)
