"""RegAD: its networks, loss, views and distances against slow code, its pairs, and learning on real images."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from raydetect.blocks.augment.support_views import NUM_VIEWS, support_views
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.coresets.position_gaussians import REGULARISATION, PositionGaussians
from raydetect.blocks.networks.registration import (
    Registered,
    RegistrationTrunk,
    SpatialTransformer,
    inverse,
    registration_loss,
    transformed,
)
from raydetect.detectors._base import Batch, Known
from raydetect.detectors._registry import build_detector
from raydetect.detectors.regad import TRUNK, RegAD
from raydetect.errors import SpecError
from tests.builders.images import normal_image
from tests.contracts.cases import as_batch

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE_PX = 32


def build(**params: object) -> RegAD:
    detector = build_detector("regad", {"weights": "random", "image_size": SIZE_PX, **params}, preset="smoke")
    assert isinstance(detector, RegAD)
    return detector


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reflected(position: float, size: int) -> float:
    """A position after reflections at the outer edges of the first and the last pixel, within their centres."""
    period = 2 * size
    position = (position + 0.5) % period
    return min(max((period - position if position > size else position) - 0.5, 0.0), size - 1.0)


def sampled_slowly(image_CHW: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
    """Each output pixel is read at the matrix times its position, bilinearly, position by position."""
    _, height, width = image_CHW.shape
    found = np.zeros_like(image_CHW)
    for row in range(height):
        for column in range(width):
            place = np.array([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1, 1.0])
            across, down = matrix_23 @ place
            x = reflected(((across + 1) * width - 1) / 2, width)
            y = reflected(((down + 1) * height - 1) / 2, height)
            left, upper = math.floor(x), math.floor(y)
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                share = (1 - abs(y - upper - dy)) * (1 - abs(x - left - dx))
                if 0 <= upper + dy < height and 0 <= left + dx < width:
                    found[:, row, column] += share * image_CHW[:, upper + dy, left + dx]
    return found


def test_published_defaults() -> None:
    params = build_detector("regad", {}).params
    assert isinstance(params, RegAD.Params)
    assert params == RegAD.Params(
        image_size=(224, 224), backbone="resnet18", weights="imagenet", k_shot=2, epochs=50, batch_size=32,
        learning_rate=1e-4, momentum=0.9, smoothing_sigma=4.0,
    )  # fmt: skip
    assert NUM_VIEWS == 22 and REGULARISATION == 0.01


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_a_spatial_transformer_samples_by_its_matrix(grid: tuple[int, int]) -> None:
    torch.manual_seed(1)
    transformer = SpatialTransformer(5, grid).eval()
    features = random(2, 5, *grid)
    same, theta = transformer(features)
    torch.testing.assert_close(same, features, rtol=1e-5, atol=1e-5)  # it begins as the identity
    assert torch.equal(theta, torch.eye(2).expand(2, 2, 2))
    last = transformer.fully_connected[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.normal_(last.weight, std=0.1)
    moved, theta = transformer(features)
    hidden = transformer.fully_connected(transformer.convolutions(features).flatten(1))
    for i, (angle, across, down) in enumerate(hidden.tolist()):
        matrix = np.array([
            [math.cos(angle) * across, -math.sin(angle), 0.0],
            [math.sin(angle), math.cos(angle) * down, 0.0],
        ])  # fmt: skip
        np.testing.assert_allclose(theta[i].detach().numpy(), matrix[:, :2], rtol=1e-5, atol=1e-6)
        slow = sampled_slowly(features[i].double().numpy(), matrix)
        np.testing.assert_allclose(moved[i].detach().numpy(), slow, rtol=1e-4, atol=1e-5)
        assert not np.allclose(slow, features[i].numpy(), atol=0.05)


def test_its_fully_connected_layer_follows_the_size_of_the_images() -> None:
    for size, cells in (((224, 224), (14 * 14, 7 * 7, 4 * 4)), ((64, 96), (4 * 6, 2 * 3, 1 * 2))):
        trunk = RegistrationTrunk("resnet18", size)
        widths = [part.fully_connected[0].in_features for part in trunk.transformers]
        assert widths == [16 * count for count in cells]
    levels, thetas = trunk.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 16, 24), (128, 8, 12), (256, 4, 6)]
    assert [tuple(theta.shape) for theta in thetas] == [(1, 2, 2)] * 3


@given(st.floats(-1, 1), st.floats(0.5, 2), st.floats(0.5, 2))
@settings(deadline=None)
def test_inverses(angle: float, across: float, down: float) -> None:
    theta = torch.tensor(
        [[math.cos(angle) * across, -math.sin(angle)], [math.sin(angle), math.cos(angle) * down]], dtype=torch.float64
    )
    torch.testing.assert_close(inverse(theta[None])[0] @ theta, torch.eye(2, dtype=torch.float64))


def test_levels_are_mapped_back_by_their_own_matrix_first() -> None:
    """A deeper level has been through its own transformer and those before; the inverses are applied the other way."""
    smooth = torch.from_numpy(ndimage.gaussian_filter(random(3, 24, 24).numpy(), (0, 4, 4)))[None]
    angles = (0.2, -0.35, 0.15)
    thetas = [torch.tensor([[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]]) for a in angles]
    levels, seen = [], smooth
    for theta in thetas:
        seen = transformed(seen, theta)
        levels.append(seen)
    for level in Registered(levels, thetas).mapped_back():
        inner = (level - smooth)[..., 7:-7, 7:-7].abs().max()  # the corners were reflected
        assert float(inner) < 0.1 * float(smooth.abs().max())
    first = Registered(levels, thetas).mapped_back()[1]
    expected = transformed(transformed(levels[1], inverse(thetas[1])), inverse(thetas[0]))
    assert torch.equal(first, expected)


def test_views_are_those_of_the_paper() -> None:
    image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(2))
    views = support_views(image)
    assert views.shape == (22, 3, 12, 12) and torch.equal(views[0], image)
    whole = image.double().numpy()
    expected = [whole, whole[:, :, ::-1], *(np.rot90(whole, turns, (1, 2)) for turns in (1, 2, 3))]
    expected.append(np.repeat(np.tensordot([0.299, 0.587, 0.114], whole, 1)[None], 3, 0))
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        sine, cosine = math.sin(step * math.pi / 16), math.cos(step * math.pi / 16)
        expected.append(sampled_slowly(whole, np.array([[cosine, -sine, 0], [sine, cosine, 0]])))
    for size in (0.1, 0.2):
        for x, y in ((size, size), (size, -size), (-size, size), (-size, -size)):
            expected.append(sampled_slowly(whole, np.array([[1, 0, x], [0, 1, y]])))
    apart = [[np.abs(view.numpy() - other).max() for other in expected] for view in views]
    nearest = np.argmin(apart, 1)
    assert sorted(nearest) == list(range(22)) and np.min(apart, 1).max() < 1e-5


def test_the_loss_is_a_mean_over_positions_and_stops_gradients() -> None:
    z1, z2, p1, p2 = (random(2, 6, 3, 4, seed=i).double().requires_grad_() for i in range(4))
    loss = registration_loss((z1, z2), (p1, p2))
    cosines = [
        float((p[b, :, y, x] @ z[b, :, y, x] / (p[b, :, y, x].norm() * z[b, :, y, x].norm())).detach())
        for p, z in ((p1, z2), (p2, z1))
        for b in range(2)
        for y in range(3)
        for x in range(4)
    ]
    assert float(loss.detach()) == pytest.approx(-np.mean(cosines), rel=1e-12)
    loss.backward()
    assert z1.grad is None and z2.grad is None and p1.grad is not None and p2.grad is not None
    torch.autograd.gradcheck(
        lambda p: registration_loss((z1.detach(), z2.detach()), (p, p2.detach())), (p1.detach().requires_grad_(),)
    )


def test_the_gradient_of_a_step_does_not_flow_through_the_other_image() -> None:
    """With the other encoding as a constant, the encoder's gradient is the same."""
    detector = build()
    detector.load_weights()
    plan = detector.begin_training(2)
    images = as_batch([normal_image(i, SIZE_PX) for i in range(4)])
    detector.training_loss(Batch(images, list("abcd"))).backward()
    stopped = [value.grad.clone() for value in plan.module.parameters() if value.grad is not None]
    plan.module.zero_grad()
    trunk, heads = detector.networks[TRUNK], detector._heads
    encoded = [heads["encoder"](trunk(part / 255.0)[0][-1]) for part in (images[0::2], images[1::2])]
    predicted = [heads["predictor"](z) for z in encoded]
    constants = [z.detach().clone() for z in encoded]
    total = [F.cosine_similarity(p, z, dim=1).mean() for p, z in zip(predicted, constants[::-1], strict=True)]
    (-(total[0] + total[1]) / 2).backward()
    for mine, value in zip(stopped, plan.module.parameters(), strict=True):
        torch.testing.assert_close(mine, value.grad, rtol=1e-3, atol=1e-5 * float(mine.abs().max()) + 1e-9)


@pytest.mark.parametrize("count", [5, 44])
def test_distances_are_those_of_the_dense_inverse(count: int) -> None:
    grids, widths = [(8, 4), (4, 2), (2, 1)], (6, 10, 20)
    levels = [random(count, h * w, c, seed=h).double() for (h, w), c in zip(grids, widths, strict=True)]
    images = [random(3, c, h, w, seed=10 + h) * 2 for (h, w), c in zip(grids, widths, strict=True)]
    found = PositionGaussians.fit([level.float() for level in levels], grids).distance(images)
    assert found.shape == (3, 8, 4)
    for row in range(8):
        for column in range(4):
            cells = [row * 4 + column, row // 2 * 2 + column // 2, row // 4]
            examples = torch.cat([level[:, cell] for level, cell in zip(levels, cells, strict=True)], 1)
            covariance = torch.cov(examples.T) + 0.01 * torch.eye(36, dtype=torch.float64)
            for i in range(3):
                place = [images[n][i, :, row // 2**n, column // 2**n].double() for n in range(3)]
                delta = torch.cat(place) - examples.mean(0)
                expected = torch.sqrt(delta @ torch.linalg.inv(covariance) @ delta)
                assert float(found[i, row, column]) == pytest.approx(float(expected), rel=2e-5)


def test_distances_do_not_cancel_where_examples_vary_most() -> None:
    """Examples of size 1,000: |x|^2 / 0.01 is 1e10 times the squared distance, and float32 has 7 digits."""
    examples = random(9, 1, 30).double() * 1000
    image = (examples[0, 0] * 0.6 + examples[1, 0] * 0.4).float()
    found = PositionGaussians.fit([examples.float()], [(1, 1)]).distance([image.view(1, -1, 1, 1)])
    covariance = torch.cov(examples[:, 0].T) + 0.01 * torch.eye(30, dtype=torch.float64)
    delta = image.double() - examples[:, 0].mean(0)
    assert float(found) == pytest.approx(float(torch.sqrt(delta @ torch.linalg.inv(covariance) @ delta)), rel=1e-2)


def test_a_whole_score_against_slow_code() -> None:
    detector = build(k_shot=2, smoothing_sigma=1.5)
    detector.load_weights()
    detector.begin_training(2)
    for part in detector.networks[TRUNK].transformers:  # type: ignore[union-attr]
        torch.nn.init.normal_(part.fully_connected[-1].weight, std=0.05)  # type: ignore[union-attr]
    detector.end_training()
    supports, queries = (as_batch([normal_image(i, SIZE_PX) for i in part]) for part in (range(2), range(5, 7)))
    state = FitState()
    with torch.inference_mode():
        state.add(["a", "b"], detector.collect(Batch(supports, ["a", "b"])))
        detector.finish(state, lambda *_: None)
        found = detector.score(queries)
        views = torch.cat([support_views(image / 255.0) for image in supports])
        examples, images = (whole_features(detector, pixels) for pixels in (views, queries / 255.0))
    distance = np.zeros((2, 8, 8))
    for row in range(8):
        for column in range(8):
            here = examples[:, :, row, column]
            inverted = torch.linalg.inv(torch.cov(here.T) + 0.01 * torch.eye(448, dtype=torch.float64))
            for i in range(2):
                delta = images[i, :, row, column] - here.mean(0)
                distance[i, row, column] = math.sqrt(float(delta @ inverted @ delta))
    large = F.interpolate(torch.from_numpy(distance)[:, None], size=(SIZE_PX, SIZE_PX), mode="bilinear")[:, 0].numpy()
    expected = np.stack([ndimage.gaussian_filter(each, 1.5) for each in large])
    np.testing.assert_allclose(found.anomaly_map_BHW.numpy(), expected, rtol=1e-3)
    np.testing.assert_allclose(found.image_score_B.numpy(), expected.max((1, 2)), rtol=1e-3)


def whole_features(detector: RegAD, pixels_BCHW: Tensor) -> Tensor:
    """All levels at every position of the finest, (B, 448, h, w), float64."""
    levels = Registered(*detector.networks[TRUNK](pixels_BCHW)).mapped_back()
    return torch.cat([F.interpolate(level.double(), size=(8, 8), mode="nearest") for level in levels], 1)


def test_pairs_are_of_one_category_and_every_image_is_a_query_once() -> None:
    detector = build(batch_size=4)
    detector.load_weights()
    plan = detector.begin_training(20)
    known = {f"{name}{i}": Known(0, name) for name, count in (("a", 11), ("b", 3), ("c", 2)) for i in range(count)}
    assert plan.batches is not None and plan.images_per_item == 2 and plan.batch_size == 8
    partners: dict[str, set[str]] = {}
    orders = []
    for epoch in range(30):
        batches = plan.batches(known, epoch)
        assert batches == plan.batches(dict(reversed(known.items())), epoch)
        assert sorted(len(batch) for batch in batches) == [4, 6, 6, 8, 8]
        assert all(len({key[0] for key in batch}) == 1 for batch in batches)
        pairs = [(batch[i], batch[i + 1]) for batch in batches for i in range(0, len(batch), 2)]
        assert Counter(query for query, _ in pairs) == dict.fromkeys(known, 1)
        for query, support in pairs:
            assert query != support
            partners.setdefault(query, set()).add(support)
        orders.append([batch[0][0] for batch in batches])
    assert len({tuple(order) for order in orders}) > 5
    assert partners["b0"] == {"b1", "b2"} and len(partners["a0"]) >= 8
    with pytest.raises(SpecError, match="category 'd' of the auxiliary images has one image, and pairs need two"):
        plan.batches({**known, "d0": Known(0, "d")}, 0)


def test_the_rate_falls_from_epoch_to_epoch() -> None:
    detector = build(epochs=10)
    detector.load_weights()
    plan = detector.begin_training(4)
    assert [plan.rate(done) for done in (0, 0.9, 5, 5.99)] == pytest.approx([1, 1, 0.5, 0.5])
    assert 0 < plan.rate(9.5) < 0.03
    assert plan.optimizer.defaults["momentum"] == 0.9 and plan.optimizer.defaults["weight_decay"] == 0


def test_images_are_not_normalised_and_all_of_the_trunk_is_trained() -> None:
    detector = build(learning_rate=1, image_size=64)
    detector.load_weights()
    plan = detector.begin_training(4)
    seen: list[Tensor] = []
    detector.networks[TRUNK].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = as_batch([normal_image(i, 64) for i in range(4)])
    before = {name: value.clone() for name, value in plan.module.named_parameters()}
    for _ in range(2):  # the last layers of the transformers begin with zeros and hide the gradient of those before
        plan.optimizer.zero_grad()
        detector.training_loss(Batch(images, list("abcd"))).backward()
        assert all(value.grad is not None for value in plan.module.parameters())
        plan.optimizer.step()
    assert torch.equal(seen[0], images[0::2] / 255.0) and torch.equal(seen[1], images[1::2] / 255.0)
    assert {name for name, value in plan.module.named_parameters() if torch.equal(value, before[name])} == set()
