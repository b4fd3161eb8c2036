"""WinCLIP against a loop over masked windows, and against open_clip's own text tower; on random weights."""

import time
import urllib.request
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from raydetect.blocks.backbones.clip import TINY_WORDS, ImageTower, TextTower, build_clip, clip_config, load_clip
from raydetect.blocks.backbones.prompts import TEMPLATES
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.blocks.maps.windows import harmonic_mean, spread_harmonic, window_patches
from raydetect.detectors import _weights
from raydetect.detectors._base import Batch
from raydetect.detectors._registry import build_detector
from raydetect.detectors.winclip import WinCLIP
from raydetect.errors import ArtifactError, SpecError
from tests.builders.group import together
from tests.builders.images import defect_image, normal_image
from tests.contracts.cases import as_batch
from tests.reference import winclip as plain

PROMPTS = {"prompts_normal": ["a good {}"], "prompts_anomalous": ["a broken {}", "a {} with a hole"]}


def build(**params: object) -> WinCLIP:
    detector = build_detector("winclip", {**PROMPTS, **params}, preset="smoke")
    assert isinstance(detector, WinCLIP)
    detector.load_weights()
    return detector


def picture(number: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return normal_image(number, 64)[: size[0], : size[1]].copy()


def collected(detector: WinCLIP, numbers: list[int], group: Group | None = None) -> FitState:
    state = FitState(group)
    with torch.inference_mode():
        for number in numbers:
            image = picture(number, detector.params.image_size)
            state.add([f"{number:02d}"], detector.collect(Batch(as_batch([image]), [f"{number:02d}"])))
    state.agree()
    return state


def fitted(**params: object) -> WinCLIP:
    detector = build(**params)
    detector.finish(collected(detector, list(range(detector.params.k_shot))), lambda *_: None)
    return detector


def slow(detector: WinCLIP) -> plain.Reference:
    tower = detector.networks["image"]
    assert isinstance(tower, ImageTower)
    return plain.Reference(tower.visual, tower.pixel_mean, tower.pixel_std, detector.params.scales)


@pytest.mark.parametrize(
    ("k_shot", "size", "scales"),
    [(0, (64, 64), (2, 3)), (2, (64, 64), (2, 3)), (1, (40, 64), (1, 4)), (2, (32, 24), (3,))],
)
def test_scores_and_maps_are_those_of_a_loop_over_masked_windows(
    k_shot: int, size: tuple[int, int], scales: tuple[int, ...]
) -> None:
    detector = fitted(k_shot=k_shot, image_size=size, scales=scales)
    reference = slow(detector)
    assert detector.words_2D is not None
    words = detector.words_2D.double().numpy()
    tested = [picture(900, size), defect_image(1, "blob", 64)[0][: size[0], : size[1]].copy()]
    scores = detector.score(as_batch(tested))
    normal = [picture(number, size) for number in range(k_shot)]
    for i, image in enumerate(tested):
        score, grid = reference.scored(image, words, 0.07, normal)
        assert float(scores.image_score_B[i]) == pytest.approx(score, rel=1e-4)
        wide = torch.nn.functional.interpolate(torch.from_numpy(grid)[None, None], size=size, mode="bilinear")[0, 0]
        np.testing.assert_allclose(scores.anomaly_map_BHW[i].numpy(), wide.numpy(), rtol=1e-3, atol=1e-6)


def test_windows_are_embedded_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = build().networks["image"]
    assert isinstance(tower, ImageTower)
    tokens = tower.tokens(as_batch([picture(i) for i in range(5)]))
    windows = window_patches(tower.grid, 3)
    at_once = tower.embed_windows(tokens, windows)
    monkeypatch.setattr("raydetect.blocks.backbones.clip.BLOCK_TOKENS", 1)
    torch.testing.assert_close(tower.embed_windows(tokens, windows), at_once, rtol=1e-5, atol=1e-6)


def test_the_harmonic_mean_over_windows_by_hand() -> None:
    assert window_patches((3, 3), 2).tolist() == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    found = spread_harmonic(torch.tensor([[1.0, 0.5, 0.25, 0.125], [1.0, 0.0, 1.0, 1.0]]), (3, 3), 2)
    torch.testing.assert_close(found[0], torch.tensor([[1, 2 / 3, 0.5], [0.4, 4 / 15, 0.2], [0.25, 1 / 6, 0.125]]))
    assert found[1].tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1]]  # a window at no distance speaks for all it holds
    assert harmonic_mean([torch.tensor([1.0, 0.0]), torch.tensor(0.5)]).tolist() == pytest.approx([2 / 3, 0])


def test_texts_are_embedded_as_open_clip_does() -> None:
    clip = open_clip.CLIP(**TINY_WORDS).eval()
    texts = ["a photo of a flawless screw.", "a", "a jpeg corrupted photo of the damaged toothbrush."]
    with torch.no_grad():
        expected = clip.encode_text(open_clip.tokenize(texts))
        image = torch.rand(1, 3, 64, 64)
        whole = clip.encode_image(image, normalize=True)
        clip.visual.output_tokens = True
        tokens = clip.visual(image)[1]
        tower = ImageTower(clip.visual, (0, 0, 0), (1, 1, 1))
        found, patches = tower.embed(tower.tokens(image * 255))
        text = TextTower(clip).embed(texts)
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches, torch.nn.functional.normalize(tokens, dim=-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(SpecError, match="longer than 77 tokens"):
        TextTower(clip).embed(["part " * 80])


def test_words_are_the_mean_over_every_state_in_every_template() -> None:
    detector = build(prompts_normal=None, prompts_anomalous=None, class_name="metal nut")
    normal, anomalous = detector.prompts("metal nut")
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 22
    assert (len(set(normal)), len(set(anomalous))) == (7 * 22, 4 * 22)
    assert "a close-up photo of a flawless metal nut." in normal and "a photo of the large metal nut." in normal
    assert "a photo of the metal nut with flaw for visual inspection." in anomalous
    text = detector.networks["text"]
    assert isinstance(text, TextTower) and detector.words_2D is not None
    means = torch.stack([text.embed([one])[0] for one in anomalous]).double().mean(0)
    torch.testing.assert_close(detector.words_2D[1].double(), means / means.norm(), rtol=1e-4, atol=1e-6)


def test_a_class_name_can_be_said_at_any_time() -> None:
    images = as_batch([picture(900)])
    expected = fitted(k_shot=1, class_name="screw").score(images)
    plain_object = fitted(k_shot=1)
    assert not torch.equal(plain_object.score(images).image_score_B, expected.image_score_B)
    loaded = build(k_shot=1)
    loaded.load_tensors(plain_object.tensors())
    unfitted = build_detector("winclip", {**PROMPTS, "k_shot": 1}, preset="smoke")
    assert isinstance(unfitted, WinCLIP)
    unfitted.set_class_name("screw")
    unfitted.load_weights()
    unfitted.finish(collected(unfitted, [0]), lambda *_: None)
    for detector in (plain_object, loaded):
        with pytest.raises(SpecError, match="empty class name"):
            detector.set_class_name(" ")
        detector.set_class_name("screw")
    for detector in (plain_object, loaded, unfitted):
        assert detector.params.class_name == "screw"
        assert torch.equal(detector.score(images).anomaly_map_BHW, expected.anomaly_map_BHW)


def test_without_a_text_tower_the_artifact_is_smaller_and_a_class_name_refused() -> None:
    whole, small = fitted(), fitted(keep_text_tower=False)
    assert not any(name.startswith("text.") for name in small.tensors()) and len(small.tensors()) < len(whole.tensors())
    images = as_batch([picture(900)])
    loaded = build_detector("winclip", {**PROMPTS, "keep_text_tower": False}, seed=7, preset="smoke")
    loaded.load_tensors(small.tensors())
    assert torch.equal(loaded.score(images).image_score_B, whole.score(images).image_score_B)
    assert isinstance(loaded, WinCLIP)
    with pytest.raises(SpecError, match="keep_text_tower: true"):
        loaded.set_class_name("screw")
    own = fitted(prompts_normal=["fine"], prompts_anomalous=["broken"])
    with pytest.raises(SpecError, match="would change nothing"):
        own.set_class_name("screw")
    with pytest.raises(SpecError, match="would change nothing"):
        build_detector("winclip", {"prompts_normal": ["fine"], "prompts_anomalous": ["broken"], "class_name": "screw"})


def test_a_reference_image_is_at_no_distance_from_itself() -> None:
    detector = fitted(k_shot=2)
    zero = fitted(k_shot=0)
    images = as_batch([picture(0), picture(1)])
    few, words = detector.score(images), zero.score(images)
    torch.testing.assert_close(few.image_score_B, words.image_score_B / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few.anomaly_map_BHW, words.anomaly_map_BHW / 2, rtol=1e-4, atol=1e-5)
    assert detector.num_collected() == 2 and detector.facts() == {"memory": {"images": 2}}
    assert zero.num_collected() == 0 and zero.facts() == {"memory": {"images": 0}}


def test_two_workers_fit_the_same_memory_as_one() -> None:
    expected = fitted(k_shot=3).tensors()
    detectors = [build(k_shot=3) for _ in range(3)]

    def work(group: Group) -> dict[str, torch.Tensor]:
        state = collected(detectors[group.rank], ([2, 0], [1], [])[group.rank], group)
        detectors[group.rank].finish(state, lambda *_: None)
        return detectors[group.rank].tensors()

    for tensors in together(3, work):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("params", "size"),
    [
        ({}, (240, 240)),
        ({"clip_model": "ViT-B/32"}, (224, 224)),
        ({"clip_model": "ViT-B/32", "window_size": 224}, (224, 224)),
        ({"clip_model": "ViT-L-14-336"}, (336, 336)),
        ({"window_size": 224}, (224, 224)),
        ({"image_size": [240, 320]}, (240, 320)),
        ({"image_size": [224, 224], "window_size": 224}, (224, 224)),
    ],
)
def test_the_input_size_is_the_models_own_or_the_users(params: dict[str, object], size: tuple[int, int]) -> None:
    assert build_detector("winclip", params).params.image_size == size


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"window_size": 230}, r"image_size \[230, 230\] is not a multiple of 16 px, ViT-B-16-plus-240's patch"),
        ({"clip_model": "ViT-B/32", "scales": [8]}, r"larger than an image_size of \[224, 224\]"),
        ({"clip_model": "RN50"}, "not a plain CLIP with a vision transformer"),
        ({"clip_model": "ViT-B-16-SigLIP"}, r"not a plain CLIP .*timm_model_name"),
        ({"clip_model": "ViT-B/23"}, "ViT-B-32"),
        ({"prompts_normal": []}, "prompts_normal"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_built(params: dict[str, object], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        build_detector("winclip", params)


def test_every_plain_model_of_open_clip_has_a_configuration() -> None:
    assert clip_config("ViT-B-16-plus-240").patch_px == 16 and clip_config("ViT-B/32").image_size == (224, 224)
    for name in open_clip.list_models():
        try:
            config = clip_config(name)
        except SpecError as error:
            assert "not a plain CLIP" in str(error), name
            continue
        assert config.settings == open_clip.get_model_config(name), name


def test_a_file_of_weights_is_read_by_open_clips_names(tmp_path: Path) -> None:
    clip = open_clip.CLIP(**TINY_WORDS)
    place = tmp_path / "clip.safetensors"
    save_file(dict(clip.state_dict()), place)
    detector = build(weights=str(place))
    tower = detector.networks["image"]
    assert isinstance(tower, ImageTower)
    assert torch.equal(tower.visual.conv1.weight, clip.visual.conv1.weight)
    assert torch.equal(detector.networks["text"].state_dict()["clip.text_projection"], clip.text_projection)
    wide = build(weights=str(place), image_size=[48, 96]).networks["image"]
    assert isinstance(wide, ImageTower)
    expected = dict(clip.state_dict())
    open_clip.model.resize_pos_embed(expected, open_clip.CLIP(**{**TINY_WORDS, "vision_cfg": {
        **TINY_WORDS["vision_cfg"], "image_size": (48, 96)}}))  # fmt: skip
    torch.testing.assert_close(wide.visual.positional_embedding.data, expected["visual.positional_embedding"])
    assert not torch.equal(wide.visual.positional_embedding[5], clip.visual.positional_embedding[5])
    state = {name: value for name, value in clip.state_dict().items() if name != "ln_final.bias"}
    save_file(state, place)
    with pytest.raises(ArtifactError, match=r"no tensor 'ln_final\.bias'"):
        build(weights=str(place))


def test_some_weights_need_another_activation_which_the_artifact_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _weights.clip_facts("ViT-B-32", "openai")["quick_gelu"] is True
    image, text = build_clip(clip_config("tiny"), (64, 64), 3)
    state = {f"visual.{name}": value for name, value in image.visual.state_dict().items()}
    state |= dict(text.clip.state_dict())
    facts = {"quick_gelu": True, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "hf_hub": "somebody/clip/"}
    monkeypatch.setattr("raydetect.detectors._clip.clip_facts", lambda *_: facts)
    monkeypatch.setattr("raydetect.detectors._clip.clip_weights", lambda *_: state)
    detector = fitted(weights="some_tag")
    images = as_batch([picture(900)])
    usual = fitted()
    load_clip(*usual.networks.values(), state, "state")  # type: ignore[arg-type]
    assert not torch.equal(detector.score(images).image_score_B, usual.score(images).image_score_B)
    loaded = build_detector("winclip", {**PROMPTS, "weights": "some_tag"}, preset="smoke")
    loaded.load_tensors(detector.tensors())
    assert torch.equal(detector.score(images).image_score_B, loaded.score(images).image_score_B)
    tower = loaded.networks["image"]  # type: ignore[attr-defined]
    torch.testing.assert_close(tower.pixel_mean, torch.tensor([0.5, 0.4, 0.3]))


def test_a_tag_is_never_loaded_from_the_repository_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip names the repository of laion400m_e31 for laion400m_e32, and the URL of the right file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    state = {"ln_final.bias": torch.ones(2)}
    url = _weights.clip_facts("ViT-B-16-plus-240", "laion400m_e32")["url"]
    place = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    assert "laion400m_e32" in place.name and _weights.cached_clip("ViT-B-16-plus-240", "laion400m_e32") is None
    torch.save(state, place)
    assert _weights.cached_clip("ViT-B-16-plus-240", "laion400m_e32") == place
    monkeypatch.setattr(_weights, "_require_sha256", lambda path, digits: None)
    found = _weights.clip_weights("ViT-B-16-plus-240", "laion400m_e32")
    assert torch.equal(found["ln_final.bias"], state["ln_final.bias"])
    repository, _ = _weights._clip_repository(_weights.clip_facts("ViT-B-32", "openai"), "openai")
    assert repository == "timm/vit_base_patch32_clip_224.openai"


@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_cannot_be_had_are_one_sentence_soon(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    started = time.perf_counter()
    why = "HF_HUB_OFFLINE is set" if offline else r"127\.0\.0\.1 cannot be reached"
    with pytest.raises(ArtifactError, match=rf"weights laion400m_e31 of ViT-B-16-plus-240 .*{why}.*Give a file"):
        build_detector("winclip", {"weights": "laion400m_e31"}).load_weights()
    assert time.perf_counter() - started < 3
    with pytest.raises(SpecError, match=r"is neither a tag of open_clip for ViT-B-32.*laion400m_e32"):
        build_detector("winclip", {"clip_model": "ViT-B/32", "weights": "laion400m_e33"}).load_weights()


@pytest.mark.parametrize("norm_patches", [True, False])
def test_patches_are_compared_before_or_after_the_last_norm(norm_patches: bool) -> None:
    """Against what the transformer gives for the whole image."""
    detector = fitted(k_shot=2, norm_patches=norm_patches)
    tower = detector.networks["image"]
    assert isinstance(tower, ImageTower)
    image, seen = as_batch([picture(7, detector.params.image_size)]), []
    hook = tower.visual.transformer.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        whole, patches, _ = detector._embed(image)
    hook.remove()
    before = seen[-1][:, 1:]  # after the windows
    expected = tower.visual.ln_post(before) if norm_patches else before
    torch.testing.assert_close(patches, torch.nn.functional.normalize(expected, dim=-1))
    other = fitted(k_shot=2, norm_patches=not norm_patches)
    assert torch.equal(whole, other._embed(image)[0])
    assert not torch.equal(detector.score(image).anomaly_map_BHW, other.score(image).anomaly_map_BHW)
