"""Masks of auxiliary images: where they lie on the input, where they come from, and what is refused."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raydetect.archives.base import chunk_members
from raydetect.archives.open import open_archive
from raydetect.artifacts.fit_preprocess import FitRules
from raydetect.artifacts.store import load_artifact
from raydetect.blocks.coresets.group import Group
from raydetect.config import FitSpec, parse_job
from raydetect.errors import RaydetectError, SpecError
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.images import read_images
from raydetect.images.masks.reading import MaskError
from raydetect.local import jobs
from raydetect.records import Chunk
from raydetect.storage import Storage, join_uri
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.auxiliary import MASKED
from tests.builders.group import together
from tests.builders.images import DEFECTS, defect_image, encode, normal_image

SIZE = 64
WIDE = (48, 96)  # height, width
BOX = (12, 36, 40, 80)  # upper, lower, left, right
OTHER = "memory://other"
PARAMS = {"image_size": [SIZE, SIZE], "epochs": 1, "prompts_normal": ["good"], "prompts_anomalous": ["broken"]}


def spec_of(artifact: str = "artifact", auxiliary: Mapping[str, Any] | None = None, **changes: Any) -> FitSpec:
    values: dict[str, Any] = {
        "kind": "fit",
        "source": {"uri": "memory://masks/normal"},
        "auxiliary": {"uri": OTHER, **MASKED} if auxiliary is None else {"uri": OTHER, **auxiliary},
        "detector": {"name": "aprilgan", "preset": "smoke", "params": PARAMS},
        "artifact": f"memory://masks/{artifact}",
        "resources": {"cpus_per_worker": 1},
        **changes,
    }
    spec = parse_job(values, "job")
    assert isinstance(spec, FitSpec)
    return spec


def chunks_of(spec: FitSpec) -> list[Chunk]:
    assert spec.auxiliary is not None
    archive = open_archive(spec.auxiliary, Storage())
    return [chunk for s in archive.shards() for chunk in chunk_members(s, archive.read(s), 2, 1 << 30)]


def cached(spec: FitSpec) -> ImageCache:
    """The auxiliary images as one worker reads them."""
    assert spec.auxiliary is not None
    cache, _ = read_images(chunks_of(spec), spec.auxiliary, FitRules(spec), 1, lambda _: None, Storage())
    return cache


def masks_of(cache: ImageCache) -> dict[str, np.ndarray]:
    """Masks by the end of the keys, as a training gets them."""
    keys = list(cache.images)
    batch = cache.batch(keys, torch.device("cpu"))
    assert batch.masks_BHW is not None and batch.masks_BHW.dtype == torch.bool
    assert torch.equal(batch.images_BCHW, torch.from_numpy(cache.pixels(keys)).permute(0, 3, 1, 2))
    return {key.rpartition("#")[2]: mask.numpy() for key, mask in zip(keys, batch.masks_BHW, strict=True)}


def wide_pair() -> list[tuple[str, bytes]]:
    """A picture whose white rectangle is its defect, its mask, and a picture without."""
    marked = np.zeros(WIDE, np.uint8)
    marked[BOX[0] : BOX[1], BOX[2] : BOX[3]] = 255
    return [
        ("nut/test/hole/0.png", encode(np.repeat(marked[..., None], 3, 2))),
        ("nut/ground_truth/hole/0_mask.png", encode(marked)),
        ("nut/test/good/1.png", encode(np.full((*WIDE, 3), 255, np.uint8))),
    ]


@pytest.mark.parametrize(
    "view",
    [
        {},
        {"resize": "pad"},
        {"resize": "short_side"},
        {"resize": "short_side", "size": [80, 80], "crop": [SIZE, SIZE]},
    ],
    ids=["stretch", "pad", "short_side", "crop"],
)
def test_a_mask_lies_where_its_defect_is_in_every_view(view: dict[str, Any]) -> None:
    pack(OTHER, "", wide_pair(), 1)
    spec = spec_of(view=view)
    cache = cached(spec)
    marked, normal = (cache.pixels([key])[0] for key in sorted(cache.images, key=lambda key: "good" in key))
    masks = {name.rpartition("test/")[2]: mask for name, mask in masks_of(cache).items()}
    white = marked.min(2) > 127  # the padding is darker
    differing = masks["hole/0.png"] != white
    assert white.sum() > 300 and differing.sum() < 0.25 * np.sqrt(white.sum()) * 4  # less than half a pixel of border
    assert not masks["good/1.png"].any() and (normal == 255).any()


def sidecars() -> list[tuple[str, bytes]]:
    """The images of `mixed_files`, each with a label file, and the defective ones with a mask, beside them."""
    files = []
    for number, kind in enumerate(DEFECTS):
        image, mask = defect_image(0, kind)
        files += [(f"{number}.png", encode(image)), (f"{number}.mask.png", encode(mask)), (f"{number}.cls", b"1")]
    for number in (3, 4):
        files += [(f"{number}.png", encode(normal_image(50_000 + number - 3))), (f"{number}.cls", b"0")]
    return files


def table() -> bytes:
    """A Parquet file with images, labels and masks."""
    rows = [(encode(defect_image(0, kind)[0]), 1, encode(defect_image(0, kind)[1])) for kind in DEFECTS]
    rows += [(encode(normal_image(50_000 + i)), 0, None) for i in range(2)]
    images, labels, masks = zip(*rows, strict=True)
    buffer = io.BytesIO()
    columns = {"image": pa.array(images, pa.binary()), "label": labels, "mask": pa.array(masks, pa.binary())}
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def test_masks_by_pattern_sidecar_and_column_are_the_same() -> None:
    expected = [defect_image(0, kind)[1] for kind in DEFECTS]
    small = [np.asarray(Image.fromarray(mask).resize((SIZE, SIZE), Image.Resampling.NEAREST)) for mask in expected]
    found = []
    for folder, suffix, files, settings in (
        ("loose", "", mixed_files(2, 1), MASKED),
        ("zip", ".zip", mixed_files(2, 1), MASKED),
        ("tar", ".tar", sidecars(), {}),
    ):
        pack(f"{OTHER}/{folder}", suffix, files, 1)
        found.append(masks_of(cached(spec_of(auxiliary={"uri": f"{OTHER}/{folder}", **settings}))))
    Storage().write(f"{OTHER}/table/0.parquet", table())
    found.append(masks_of(cached(spec_of(auxiliary={"uri": f"{OTHER}/table"}))))
    for masks in found:
        defects = [mask for mask in masks.values() if mask.any()]
        assert len(masks) == 5 and len(defects) == 3
        for mask in small:
            assert min(int((mask != other).sum()) for other in defects) <= 0.15 * mask.sum()
    first = sorted(mask.tobytes() for mask in found[0].values())
    assert all(sorted(mask.tobytes() for mask in masks.values()) == first for masks in found[1:])


def refusal(spec: FitSpec) -> str:
    with pytest.raises(RaydetectError) as error:
        jobs.fit(spec, lambda *_: None)
    assert isinstance(error.value, MaskError | SpecError)
    (line,) = str(error.value).splitlines()
    return line


def test_what_cannot_be_learnt_from_is_refused_in_one_sentence() -> None:
    pack("memory://masks/normal", "", normal_files(8), 1)
    files = dict(mixed_files(2, 1))
    lacking = "widget/ground_truth/blob/0000_mask.png"
    pack(OTHER, "", [(name, data) for name, data in files.items() if name != lacking], 1)
    line = refusal(spec_of())
    assert "widget/test/blob/0000.png: " in line and "mask" in line and line.endswith(".")
    assert "is anomalous and has no mask. Add one, name it by mask_pattern" in refusal(
        spec_of(auxiliary={"pattern": MASKED["pattern"]})
    )
    Storage().write(join_uri(OTHER, lacking), encode(np.zeros((10, 10), bool)))
    assert "is 96 x 96 px and its mask 10 x 10. Provide a mask of the image's size." in refusal(spec_of())
    assert "no image is labelled anomalous" in refusal(spec_of(auxiliary={"uri": f"{OTHER}/widget/test/good"}))
    missing = parse_job({**_plain(), "auxiliary": None}, "job")
    assert isinstance(missing, FitSpec)
    assert "auxiliary: aprilgan learns from normal and anomalous images of another data set" in refusal(missing)
    assert "learns from masks of whole pictures. Remove tile" in refusal(spec_of(view={"tile": {"overlap": 8}}))
    other = {**_plain(), "detector": {"name": "patchcore", "params": {"weights": "random"}}}
    unused = parse_job(other, "job")
    assert isinstance(unused, FitSpec)
    assert "auxiliary: patchcore learns from the images of source alone. Remove it." in refusal(unused)


def _plain() -> dict[str, Any]:
    return {
        "kind": "fit",
        "source": {"uri": "memory://masks/normal"},
        "auxiliary": {"uri": OTHER, **MASKED},
        "detector": {"name": "aprilgan", "preset": "smoke", "params": PARAMS},
        "artifact": "memory://masks/refused",
    }


def test_two_workers_share_images_with_their_masks() -> None:
    pack(OTHER, "", mixed_files(4, 2), 1)
    spec = spec_of()
    assert spec.auxiliary is not None
    alone, chunks, source = masks_of(cached(spec)), chunks_of(spec), spec.auxiliary

    def work(group: Group) -> dict[str, np.ndarray]:
        mine = chunks[group.rank :: group.size]
        cache, _ = read_images(mine, source, FitRules(spec), 1, lambda _: None, Storage())
        cache.share_all(group)
        return masks_of(cache)

    for masks in together(2, work):
        assert masks.keys() == alone.keys() and any(mask.any() for mask in masks.values())
        assert all(np.array_equal(masks[key], alone[key]) for key in alone)


def test_masks_change_what_is_learnt() -> None:
    pack("memory://masks/normal", "", normal_files(8), 1)
    files = mixed_files(4, 2)
    pack(OTHER, "", files, 1)
    jobs.fit(spec_of("right"), lambda *_: None)
    inverted = [
        (name, encode(~np.asarray(Image.open(io.BytesIO(data))).astype(bool)) if "_mask" in name else data)
        for name, data in files
    ]
    pack(OTHER, "", inverted, 1)
    jobs.fit(spec_of("inverted"), lambda *_: None)
    right, wrong = (load_artifact(f"memory://masks/{n}", Storage()).detector.tensors() for n in ("right", "inverted"))
    assert not torch.equal(right["adapters.0.weight"], wrong["adapters.0.weight"])
    assert torch.equal(right["image.pixel_mean"], wrong["image.pixel_mean"])
