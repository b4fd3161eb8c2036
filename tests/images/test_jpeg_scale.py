"""The DCT scale of JPEGs: the rule, the pixels, the orientation, what stays in stored px, and memory."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from raydetect.images import opening
from raydetect.images.decode import Pixels, decode_image, decode_member
from raydetect.images.jpeg import has_dct
from raydetect.images.masks.decoding import decode_mask
from raydetect.images.memory_budget import BYTES_PER_PIXEL
from raydetect.images.opening import DecodeRules, loaded_image
from raydetect.images.preprocess import Preprocess, reduced
from raydetect.records import Member
from tests.builders.images import normal_image

RULES, AS_STORED = DecodeRules(10**8, True), DecodeRules(10**8, False)
INPUT = Preprocess((256, 256), "at_least_2x")


def jpeg(size: tuple[int, int], mode: str = "RGB", orientation: int = 1, **options: object) -> bytes:
    """A smooth picture with edges and some grain, (width, height) as stored."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture = Image.fromarray(normal_image(0, 256)).resize(size, Image.Resampling.BICUBIC)
    picture.convert(mode).save(buffer, "JPEG", exif=exif, **options)
    return buffer.getvalue()


def decoded(data: bytes, preprocess: Preprocess, rules: DecodeRules = RULES) -> Pixels:
    found = decode_member(Member("k", "", data=data), rules, preprocess)
    assert found.status == "ok", found.error
    return found


def distance(first: Pixels, second: Pixels) -> tuple[float, int]:
    """(mean, largest) difference in levels of 255."""
    assert first.only_input is not None and second.only_input is not None
    levels = np.abs(first.only_input.astype(int) - second.only_input)
    return float(levels.mean()), int(levels.max())


@pytest.mark.parametrize(
    ("stored", "image_size", "orientation", "expected"),
    [
        ((4000, 3000), (256, 256), 1, 4),  # 1000 x 750 px: at 1/8 the height would be 375 < 512
        ((4096, 4096), (256, 256), 1, 8),
        ((4095, 4096), (256, 256), 1, 8),  # rounded up to 512 px
        ((4088, 4096), (256, 256), 1, 4),  # 511 px
        ((4000, 3000), (512, 512), 1, 2),
        ((1024, 1024), (256, 256), 1, 2),
        ((1022, 1024), (256, 256), 1, 1),
        ((640, 480), (256, 256), 1, 1),
        ((100_000, 511), (256, 256), 1, 1),
        ((8000, 1024), (256, 1000), 1, 2),
        ((8000, 1024), (64, 1000), 1, 4),
        ((1024, 8000), (64, 1000), 1, 1),
        ((1024, 8000), (64, 1000), 6, 4),  # upright it is 8000 x 1024
        ((8000, 1024), (64, 1000), 8, 1),
        ((1024, 8000), (64, 1000), 3, 1),
    ],
)
def test_the_scale_is_the_smallest_that_leaves_twice_the_input(
    stored: tuple[int, int], image_size: tuple[int, int], orientation: int, expected: int
) -> None:
    assert Preprocess(image_size, "at_least_2x").reduction(stored, orientation) == expected
    assert Preprocess(image_size, "full").reduction(stored, orientation) == 1
    assert Preprocess(image_size).reduction(stored, orientation) == 1


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 900), st.integers(1, 900), st.integers(1, 8))
@example(1725, 9, 1, 108, 1)  # 1725 * (108 / 1725) is more than 108
def test_the_rule_equals_its_definition(width: int, height: int, rows: int, columns: int, orientation: int) -> None:
    upright = (height, width) if orientation >= 5 else (width, height)
    allowed = [n for n in (1, 2, 4, 8) if -(-upright[0] // n) >= 2 * columns and -(-upright[1] // n) >= 2 * rows]
    found = Preprocess((rows, columns), "at_least_2x").reduction((width, height), orientation)
    assert found == max(allowed, default=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95},
        {"subsampling": 0},
        {"subsampling": 1},  # for CMYK not supported by TurboJPEG
        {"progressive": True},
        {"restart_marker_blocks": 5},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_every_kind_of_jpeg_is_reduced_as_by_pillow(mode: str, options: dict[str, object], reduction: int) -> None:
    data = jpeg((517, 403), mode, **options)
    width, height = reduced((517, 403), reduction)
    with Image.open(io.BytesIO(data)) as opened:
        opened.draft(None, (517 // reduction, 403 // reduction))
        expected = np.asarray(opened.convert("RGB"))
    with loaded_image(data, RULES, Preprocess((height // 2, width // 2), "at_least_2x")) as loaded:
        assert (loaded.reduction, loaded.picture.size, loaded.size) == (reduction, (width, height), (517, 403))
        assert (np.asarray(loaded.rgb()) == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_pixels_are_those_of_a_full_decode_within_two_levels(orientation: int, options: dict[str, object]) -> None:
    data = jpeg((2003, 1301), orientation=orientation, **options)
    for image_size in ((256, 256), (96, 200), (140, 80)):
        for rules in (RULES, AS_STORED):
            full = decoded(data, Preprocess(image_size, "full"), rules)
            fast = decoded(data, Preprocess(image_size, "at_least_2x"), rules)
            mean, most = distance(full, fast)
            assert 0 < mean < 0.3 and most <= 2, (image_size, mean, most)
            assert (fast.width, fast.height, fast.orientation) == (full.width, full.height, full.orientation)
            assert fast.stored_size == (2003, 1301)
            assert fast.brightness == pytest.approx(full.brightness, abs=0.001)
            assert fast.sharpness == pytest.approx(full.sharpness, rel=0.05)


def test_a_last_column_and_row_that_lie_partly_outside_do_not_shift_the_image() -> None:
    across = np.broadcast_to(np.linspace(0, 255, 521)[None, :, None], (265, 521, 3))  # 66 and 34 px at 1/8
    shifts = []
    for orientation in range(1, 9):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(across.astype(np.uint8)).save(buffer, "JPEG", quality=98, exif=exif)
        size = (32, 16) if orientation >= 5 else (16, 32)
        full, fast = (decoded(buffer.getvalue(), Preprocess(size, scale)) for scale in ("full", "at_least_2x"))
        assert full.only_input is not None and fast.only_input is not None
        shifts.append(abs(float((full.only_input.astype(float) - fast.only_input).mean())))
        assert distance(full, fast)[1] <= 2
    assert max(shifts) < 0.7  # a shift by 7 stored px would be 3.4 levels


def test_the_decoder_reduces_what_the_rule_says() -> None:
    for orientation, rules, expected in ((1, RULES, 1), (6, RULES, 4), (6, AS_STORED, 1)):
        tall = jpeg((600, 2400), orientation=orientation)
        with loaded_image(tall, rules, Preprocess((75, 300), "at_least_2x")) as loaded:
            assert loaded.reduction == expected
    with loaded_image(jpeg((2048, 2048)), RULES, INPUT) as loaded:
        assert (loaded.reduction, loaded.picture.size) == (4, (512, 512))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF"])
def test_only_jpegs_are_reduced(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(normal_image(0, 300)).save(buffer, kind)
    found = [decoded(buffer.getvalue(), Preprocess((32, 32), scale)) for scale in ("full", "at_least_2x")]
    assert distance(*found) == (0, 0) and found[0].facts() == found[1].facts()


def test_a_small_jpeg_is_decoded_in_full() -> None:
    data = jpeg((1023, 1022))
    assert distance(decoded(data, INPUT), decoded(data, Preprocess((256, 256), "full"))) == (0, 0)


def test_overlays_and_masks_stay_in_stored_px() -> None:
    data = jpeg((1201, 903), orientation=6)
    assert decode_image(data, RULES).size == (903, 1201)
    expected = decode_image(data, RULES)
    expected.thumbnail((400, 400))
    assert decode_image(data, RULES, 400).tobytes() == expected.tobytes()
    mask, buffer = np.zeros((903, 1201), np.uint8), io.BytesIO()
    mask[:100, :50] = 255
    Image.fromarray(mask).save(buffer, "PNG")
    image = decoded(data, Preprocess((64, 64), "at_least_2x"))
    found_HW = decode_mask(buffer.getvalue(), image, RULES)  # turned like its image, whose stored size it has
    assert found_HW.shape == (image.height, image.width) == (1201, 903)
    assert found_HW.sum() == 5000 and found_HW[:50, -100:].all()


def test_the_limit_of_pixels_counts_stored_ones() -> None:
    data = jpeg((1200, 1000))
    found = decode_member(Member("k", "", data=data), DecodeRules(1_199_999, True), Preprocess((32, 32), "at_least_2x"))
    assert found.status == "too_many_pixels" and "1200 x 1000 px" in found.error


def test_a_reduced_jpeg_reserves_the_pixels_that_its_decoder_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved, reserve = [], opening.PIXEL_BUDGET.reserve
    monkeypatch.setattr(opening.PIXEL_BUDGET, "reserve", lambda n, limit: (reserved.append(n), reserve(n, limit))[1])
    for data in (jpeg((4000, 3000)), jpeg((4000, 3000), progressive=True)):
        decoded(data, INPUT)
    assert reserved == [1000 * 750 + 32 * 4000, 4000 * 3000]


MEASURE = """
import json, sys
from pathlib import Path
from raydetect.images.decode import decode_member
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

small, *names = json.loads(sys.stdin.read())
rules, preprocess = DecodeRules(10**8, True), Preprocess((256, 256), "at_least_2x")
decode_member(Member("k", "u", Path(small).read_bytes()), rules, preprocess)
for name in names:
    data = Path(name).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    assert decode_member(Member("k", "u", data), rules, preprocess).status == "ok"
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="measures peak memory by /proc/self/clear_refs, which only Linux has",
)
def test_a_reduced_jpeg_takes_no_more_memory_than_it_reserves(tmp_path: object) -> None:
    size, names = (4000, 3000), []
    kinds = [jpeg((1100, 1100)), jpeg(size, subsampling=0), jpeg(size, "CMYK"), jpeg(size, "RGB", 6), jpeg(size, "L")]
    for number, data in enumerate([*kinds, jpeg(size, progressive=True, subsampling=0)]):
        names.append(f"{tmp_path}/{number}")
        with open(names[-1], "wb") as file:
            file.write(data)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(names), capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    *baseline, progressive = map(int, done.stdout.split())
    margin = 6 << 20  # bands, Python and the allocator, as in `test_space`
    assert max(baseline) <= BYTES_PER_PIXEL * (1000 * 750 + 32 * 4000) + margin
    assert progressive <= BYTES_PER_PIXEL * 4000 * 3000


def test_a_jpeg_without_frequencies_is_not_reduced() -> None:
    data = jpeg((64, 64))
    frame = data.index(b"\xff\xc0")
    assert has_dct(data) and has_dct(jpeg((64, 64), progressive=True))
    for marker, expected in ((0xC1, True), (0xC3, False), (0xC7, False), (0xC9, True), (0xCB, False)):
        assert has_dct(data[: frame + 1] + bytes([marker]) + data[frame + 2 :]) == expected
    assert not has_dct(data[:frame]) and not has_dct(b"")
