"""Vision transformers as backbones against timm itself; where pretrained weights come from, and what is refused."""

import hashlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from sklearn.metrics import roc_auc_score

from raydetect.blocks.backbones.backbone import Backbone
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.detectors import _weights
from raydetect.detectors._base import Batch, Detector
from raydetect.detectors._registry import build_detector
from raydetect.detectors._weights import hub_file, load_backbone, url_file
from raydetect.errors import ArtifactError, SpecError
from tests.contracts import cases

IMAGES = torch.randint(0, 256, (3, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TINY, TINY_REPO = "test_vit", "timm/test_vit.r160_in1k"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


def whole(name: str, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """timm's own model of any image size with the tensors of a backbone; those above its cut keep random ones."""
    model = timm.create_model(name, pretrained=False, dynamic_img_size=True).eval()
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert set(unknown) == {"pixel_mean", "pixel_std"}
    return model


@pytest.mark.parametrize(
    ("name", "patch", "mean", "std"),
    [
        (TINY, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("test_vit3", 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("vit_small_patch14_dinov2.lvd142m", 14, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("vit_small_patch16_dinov3", 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("vit_small_patch14_reg4_dinov2", 14, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_a_transformer_gives_what_timm_gives_at_any_multiple_of_its_patch(
    name: str, patch: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    backbone = Backbone(name, ("blocks.3", "blocks.1"), 0).freeze()
    images = torch.nn.functional.interpolate(IMAGES.float(), (3 * patch, 5 * patch)).byte()
    with torch.inference_mode():
        found = backbone(images)
        normal = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        expected = whole(name, backbone.weights()).forward_intermediates(
            normal, indices=[1, 3], intermediates_only=True
        )
    assert [tuple(level.shape[2:]) for level in found] == [(3, 5), (3, 5)]
    for level, theirs in zip(found, expected[::-1], strict=True):
        torch.testing.assert_close(level, theirs, rtol=1e-4, atol=1e-4)


def test_the_trunk_of_a_transformer_is_cut_and_keeps_timms_names() -> None:
    names = Backbone(TINY, ("blocks.1",), 0).weights().keys()
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1"}
    assert not any(name.startswith(("norm.", "head.")) for name in names)
    own = timm.create_model(TINY).state_dict().keys()
    assert set(names) - {"pixel_mean", "pixel_std"} <= set(own)


def test_the_order_of_layers_is_the_users() -> None:
    for name, layers in ((TINY, ("blocks.2", "blocks.0")), ("timm/resnet18", ("layer3", "layer1"))):
        with torch.inference_mode():
            turned = Backbone(name, layers, 0).freeze()(IMAGES)
            straight = Backbone(name, layers[::-1], 0).freeze()(IMAGES)
        assert all(torch.equal(a, b) for a, b in zip(turned, straight[::-1], strict=True))
        assert not torch.equal(turned[0].mean(), turned[1].mean())


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is() -> None:
    backbone = Backbone("vit_small_patch14_dinov2", ("blocks.0",), 0).freeze()
    with pytest.raises(SpecError, match=r"14 x 14 px, and 256 x 256 px .* image_size to \[252, 252\]"):
        backbone(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))


def test_a_network_of_one_size_says_so() -> None:
    backbone = Backbone("mixer_s32_224", ("blocks.0",), 0).freeze()
    with pytest.raises(SpecError, match="does not take images of 256 x 256 px"):
        backbone(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))


def test_other_networks_of_timm_give_maps_and_load_by_timms_names() -> None:
    for name, layers in (
        ("test_efficientnet", ("blocks.1", "blocks.2")),
        ("swin_tiny_patch4_window7_224", ("layers.0",)),
    ):
        backbone = Backbone(name, layers, 0).freeze()
        other = Backbone(name, layers, 1)
        other.load({"head.weight": torch.zeros(3), **backbone.weights()}, "file")
        with torch.inference_mode():
            found, again = backbone(IMAGES[:1, :, :32, :64]), other.freeze()(IMAGES[:1, :, :32, :64])
        assert all(level.shape[3] == 2 * level.shape[2] and level.shape[1] > level.shape[3] for level in found)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_layers_of_convolutional_networks_are_refused_with_advice() -> None:
    with pytest.raises(SpecError, match=r"no layer 'layer2'.* blocks\.0 to blocks\.11.*\[blocks\.5, blocks\.8\]"):
        Backbone("vit_small_patch14_dinov2.lvd142m", ("layer2", "layer3"), 0)
    with pytest.raises(SpecError, match=r"torchvision's transformers .*vit_base_patch16_224"):
        Backbone("vit_b_16", ("encoder",), 0)
    with pytest.raises(SpecError, match="vit_small_patch14_dinov2"):
        Backbone("vit_smal_patch14_dinov2", ("blocks.0",), 0)
    with pytest.raises(SpecError, match="lvd999"):
        Backbone("vit_small_patch14_dinov2.lvd999", ("blocks.0",), 0)


def test_an_artifact_keeps_the_mean_and_std_it_was_fitted_with() -> None:
    kept = Backbone(TINY, ("blocks.0",), 0)
    changed = {
        **kept.weights(),
        "pixel_mean": torch.tensor([0.1, 0.2, 0.3]),
        "pixel_std": torch.tensor([0.4, 0.5, 0.6]),
    }
    other = Backbone(TINY, ("blocks.0",), 1)
    other.load(changed, "the artifact")
    black = other.normalised(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(black, torch.tensor([-0.25, -0.4, -0.5]))
    assert other.digest() != kept.digest()
    other.load({n: v for n, v in kept.weights().items() if "pixel" not in n}, "a file of weights")
    assert torch.equal(other.weights()["pixel_mean"], changed["pixel_mean"])


VIT = {"backbone": TINY, "weights": "random", "image_size": [64, 64], "smoothing_sigma": 2}
SMALL = {
    "patchcore": {**VIT, "layers": ["blocks.1", "blocks.3"], "coreset_sampling_ratio": 0.5},
    "spade": {**VIT, "feature_levels": ["blocks.1", "blocks.3"], "pooled_level": "blocks.5", "k_neighbors": 5},
}


@pytest.mark.parametrize("name", ["patchcore", "spade"])
def test_memory_banks_stand_on_a_transformer(name: str) -> None:
    detector = build_detector(name, SMALL[name])
    detector.load_weights()
    normal = cases.as_batch([cases.normal_image(i, 64) for i in range(24)])
    names = [str(i) for i in range(24)]
    with torch.inference_mode():
        state = FitState()
        state.add(names, detector.collect(Batch(normal, names)))
        detector.finish(state, lambda *_: None)
    images, labels, masks = cases.test_images()
    scores = cases.score(detector, images)
    assert roc_auc_score(labels, scores.image_score_B) >= 0.8
    assert roc_auc_score(masks.ravel(), scores.anomaly_map_BHW.ravel()) >= 0.85
    order = torch.arange(len(images)).flip(0)
    assert torch.equal(cases.score(detector, images[order]).anomaly_map_BHW, scores.anomaly_map_BHW[order])
    loaded: Detector = build_detector(name, SMALL[name], seed=1)
    loaded.load_tensors(detector.tensors())
    assert torch.equal(cases.score(loaded, images).anomaly_map_BHW, scores.anomaly_map_BHW)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and hosts that refuse at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def keep(caches: Path, repository: str, name: str, data: bytes, blob: str | None = None) -> Path:
    """Puts a file into the Hub's cache as a download does."""
    folder = caches / "hub" / f"models--{repository.replace('/', '--')}"
    content = folder / "blobs" / (blob or hashlib.sha256(data).hexdigest())
    path = folder / "snapshots" / "0123abcd" / name
    for made in (content, path, folder / "refs" / "main"):
        made.parent.mkdir(parents=True, exist_ok=True)
    content.write_bytes(data)
    path.symlink_to(content)
    (folder / "refs" / "main").write_text("0123abcd")
    return path


def test_weights_of_timm_come_from_the_cache_and_are_checked(caches: Path) -> None:
    model = timm.create_model(TINY)
    data = save(dict(model.state_dict()))
    keep(caches, TINY_REPO, "model.safetensors", data)
    with within(5):
        backbone, message = load_backbone(TINY, ("blocks.2",), "imagenet", 0)
    assert message == f"imagenet:timm/test_vit.r160_in1k sha256:{backbone.digest()}"
    assert torch.equal(backbone.weights()["blocks.2.mlp.fc1.weight"], model.state_dict()["blocks.2.mlp.fc1.weight"])
    path = hub_file(TINY_REPO, ["model.safetensors"])
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"is damaged, its sha256 is .*delete it.*weights: random"):
        load_backbone(TINY, ("blocks.2",), "imagenet", 0)


def test_a_file_of_timms_names_is_read_and_a_missing_tensor_named(tmp_path: Path) -> None:
    state = dict(timm.create_model(TINY).state_dict())
    save_file(state, tmp_path / "tiny.safetensors")
    torch.save(state, tmp_path / "tiny.pth")
    digests = {
        load_backbone(TINY, ("blocks.0",), str(tmp_path / n), 0)[0].digest() for n in ("tiny.safetensors", "tiny.pth")
    }
    assert len(digests) == 1
    del state["pos_embed"]
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(ArtifactError, match=r"no tensor 'pos_embed', which test_vit needs"):
        load_backbone(TINY, ("blocks.0",), str(tmp_path / "tiny.safetensors"), 0)


def test_files_of_torchvision_are_checked_by_their_names(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = caches / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    state = dict(Backbone("resnet18", ("layer1",), 5).weights())
    torch.save(state, folder / "made.pth")
    digits = hashlib.sha256((folder / "made.pth").read_bytes()).hexdigest()[:8]
    path = (folder / "made.pth").rename(folder / f"resnet18-{digits}.pth")
    assert url_file(f"https://127.0.0.1:9/models/{path.name}") == path
    monkeypatch.setattr(
        _weights.models, "get_model_weights", lambda _: [type("W", (), {"url": f"https://h/{path.name}"})]
    )
    backbone, message = load_backbone("resnet18", ("layer1",), "imagenet", 0)
    assert torch.equal(backbone.weights()["conv1.weight"], state["conv1.weight"]) and message.startswith(
        "imagenet sha256:"
    )
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="is damaged"):
        load_backbone("resnet18", ("layer1",), "imagenet", 0)


@pytest.mark.parametrize(
    "name", ["resnet18", "wide_resnet50", TINY, "timm/resnet18", "vit_small_patch14_dinov2.lvd142m"]
)
def test_offline_it_is_one_sentence_at_once(caches: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with within(2), pytest.raises(ArtifactError, match=r"not in the cache, and HF_HUB_OFFLINE is set\). Give a file"):
        _weights._imagenet(name)


def test_a_host_that_cannot_be_reached_is_one_sentence_soon(caches: Path) -> None:
    with within(2), pytest.raises(ArtifactError, match=r"127\.0\.0\.1 cannot be reached: .*Give a file"):
        _weights._imagenet(TINY)
    with within(2), pytest.raises(OSError, match=r"127\.0\.0\.1 cannot be reached"):
        url_file("https://127.0.0.1:9/resnet18-01234567.pth")
    with within(2), pytest.raises(ArtifactError, match="timm has none"):
        _weights._imagenet("test_vit4")


def test_a_training_checkpoint_and_a_data_parallel_module_are_read(tmp_path: Path) -> None:
    plain = {"a.weight": torch.ones(2), "module_a.bias": torch.zeros(1)}
    parallel = {f"module.{name}": value for name, value in plain.items()}
    for content in (plain, parallel, {"epoch": 3, "state_dict": parallel}):
        torch.save(content, tmp_path / "file.pt")
        found = _weights.read_weights(str(tmp_path / "file.pt"))
        assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    torch.save({"epoch": 3, "a": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(ArtifactError, match="is not a plain state dict of tensors"):
        _weights.read_weights(str(tmp_path / "file.pt"))


SCORING = """
import sys, torch
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
detector = build_detector("patchcore", {"backbone": "resnet18", "weights": "random", "image_size": [32, 32]})
detector.load_weights()
images, state = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), FitState()
with torch.inference_mode():
    state.add(["a", "b"], detector.collect(Batch(images, ["a", "b"])))
    detector.finish(state, lambda *_: None)
    detector.score(images)
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
"""
ASKING = """
import sys
from raydetect.blocks.backbones import vision
kept = sys.modules["torchvision.ops.roi_align"].is_compile_supported
assert "torch._dynamo" not in sys.modules
answers = [kept(device) for device in ("cpu", "cuda", "mps")]
from torch._dynamo.utils import counters, is_compile_supported
assert kept is not is_compile_supported and answers == [is_compile_supported(d) for d in ("cpu", "cuda", "mps")]
assert vision._Later(vision.COMPILER).counters is counters
"""


@pytest.mark.parametrize("code", [SCORING, ASKING], ids=["scoring", "asking"])
def test_torchvision_is_loaded_without_torchs_compiler_until_it_is_asked_for(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
