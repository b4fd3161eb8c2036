"""Memory of decoding is bounded by the source's max_pixels, and bands do not change pixels."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from raydetect.errors import MemberError, StorageError
from raydetect.images import opening
from raydetect.images import resize as bands
from raydetect.images.bit_depth import GreyDepth
from raydetect.images.decode import TINY_BYTES, DecodePool, Pixels, decode_image, decode_member, decode_stream
from raydetect.images.memory_budget import BYTES_PER_PIXEL, MIN_PIXELS, PixelBudget
from raydetect.images.opening import DecodeRules
from raydetect.images.orientation import TURNS
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member
from raydetect.sinks import heatmaps

RULES = DecodeRules(10**6, True)
BAND_BYTES = 4 << 20  # memory for converting a band of rows, independent of the size of the picture
# Kinds of files: how Pillow writes them, and the maximum bytes per pixel of decoder and picture.
PEAKS = {
    "bilevel PNG": ("1", "PNG", {}, 2),
    "grey PNG": ("L", "PNG", {}, 2),
    "grey and alpha PNG": ("LA", "PNG", {}, 5),
    "palette PNG": ("P", "PNG", {}, 5),
    "colour PNG": ("RGB", "PNG", {}, 5),
    "colour and alpha PNG": ("RGBA", "PNG", {}, 8),
    "16-bit PNG": ("I;16", "PNG", {}, 3),
    "16-bit PGM": ("I;16", "PPM", {}, 6),
    "16-bit TIFF": ("I;16", "TIFF", {}, 3),
    "16-bit TIFF in one strip": ("I;16", "TIFF", {"compression": "tiff_deflate", "strip_size": 1 << 30}, 4),
    "colour TIFF in one strip": ("RGB", "TIFF", {"compression": "tiff_deflate", "strip_size": 1 << 30}, 7),
    "CMYK TIFF": ("CMYK", "TIFF", {"compression": "tiff_lzw"}, 8),
    "float TIFF": ("F", "TIFF", {}, 5),
    "grey JPEG": ("L", "JPEG", {}, 2),
    "colour JPEG": ("RGB", "JPEG", {}, 5),
    "CMYK JPEG": ("CMYK", "JPEG", {}, 8),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}, 10),
    "progressive CMYK JPEG": ("CMYK", "JPEG", {"progressive": True}, 12),
    "turned JPEG": ("RGB", "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0"}, 8),
    "GIF": ("P", "GIF", {}, 5),
    "BMP": ("RGB", "BMP", {}, 5),
    "WebP": ("RGB", "WEBP", {"lossless": True, "quality": 0, "method": 0}, 16),
    "WebP with alpha": ("RGBA", "WEBP", {"method": 0}, 16),
    "AVIF": ("RGBA", "AVIF", {"speed": 10, "subsampling": "4:4:4"}, 12),
}  # fmt: skip
SIZE = (2400, 2000)

MEASURE = """
import base64, json, sys
from pathlib import Path
from raydetect.records import Member
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.images.decode import decode_member

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

rules, small = DecodeRules(10**8, True), base64.b64decode(sys.argv[1])
decode_member(Member("k", "u", small), rules, Preprocess((32, 32)))
for name in json.loads(sys.stdin.read()):
    data = Path(name).read_bytes()
    decode_member(Member("k", "u", data[:200]), rules, Preprocess((32, 32)))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    found = decode_member(Member("k", "u", data), rules, Preprocess((32, 32)))
    print(json.dumps([found.status, status("VmHWM") - before]))
"""


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain_picture(mode: str, size: tuple[int, int] = SIZE) -> Image.Image:
    ramp_HW = np.tile((np.arange(size[0]) % 251).astype(np.uint8), (size[1], 1))
    if mode == "I;16":
        return Image.fromarray(ramp_HW.astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(ramp_HW.astype(np.float32))
    picture = Image.fromarray(ramp_HW).convert("RGB")
    return picture if mode == "RGB" else picture.convert(mode)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="measures peak memory by /proc/self/clear_refs, which only Linux has",
)
def test_no_format_takes_more_memory_than_stated(tmp_path: object) -> None:
    names = []
    for number, (mode, kind, options, _) in enumerate(PEAKS.values()):
        names.append(f"{tmp_path}/{number}")
        with open(names[-1], "wb") as file:
            file.write(encoded(plain_picture(mode), kind, **options))
    # return freed memory at once, so that each peak is of one image
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    small = "iVBORw0KGgo="
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small], input=json.dumps(names), capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    pixels = SIZE[0] * SIZE[1]
    for (name, (mode, _, _, stated)), line in zip(PEAKS.items(), done.stdout.splitlines(), strict=True):
        status, peak = json.loads(line)
        assert status == ("unsupported_mode" if mode == "F" else "ok"), name
        assert peak <= stated * pixels + BAND_BYTES, f"{name}: {(peak - BAND_BYTES) / pixels:.1f} bytes per pixel"
        assert stated <= BYTES_PER_PIXEL


def slow_rgb(picture: Image.Image, depth: GreyDepth) -> Image.Image:
    """Converts the whole picture at once; 16-bit grey by the formula."""
    if not picture.mode.startswith("I"):
        return picture.convert("RGBA").convert("RGB") if picture.mode in ("PA", "La") else picture.convert("RGB")
    white = (1 << depth.bits) - 1
    values_HW = np.minimum(np.asarray(picture).astype(np.int64), white)
    values_HW = white - values_HW if depth.inverted else values_HW
    return Image.fromarray(np.floor(values_HW * 255 / white + 0.5).astype(np.uint8)).convert("RGB")


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I")),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 8),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.integers(1, 300),
    st.builds(GreyDepth, st.sampled_from((12, 16)), st.booleans()),
)
def test_bands_give_the_pixels_of_the_whole_picture(
    mode: str, width: int, height: int, orientation: int, size: tuple[int, int], band: int, depth: GreyDepth
) -> None:
    values = np.random.default_rng(width * 41 + height).integers(0, 256, (height, width, 4)).astype(np.uint8)
    if mode.startswith("I"):
        wide_HW = values[..., :2].copy().view(np.uint16)[..., 0]
        picture = Image.fromarray(wide_HW if mode == "I;16" else wide_HW.astype(np.int32))
    elif mode == "LAB":
        picture = Image.frombytes("LAB", (width, height), values[..., :3].tobytes())
    else:
        picture = Image.fromarray(values, "RGBA")
        picture = picture.convert("P").convert("PA") if mode == "PA" else picture.convert("RGB").convert(mode)
    expected = slow_rgb(picture, depth)
    expected = expected.transpose(TURNS[orientation]) if orientation > 1 else expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND_PIXELS", band)
        assert (np.asarray(bands.to_rgb(picture, depth, orientation)) == np.asarray(expected)).all()
        upright = bands.upright(picture, depth, orientation, expected.size, picture.size)
    resized = upright.cut((0, 0, *expected.size), size).convert("RGB")
    assert (np.asarray(resized) == np.asarray(expected.resize(size, Image.Resampling.BILINEAR))).all()


def test_values_beyond_sixteen_bits_are_found_in_any_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BAND_PIXELS", 8)
    values_HW = np.zeros((40, 8), np.int32)
    values_HW[33, 5] = 65536
    with pytest.raises(MemberError, match="32-bit"):
        bands.to_rgb(Image.fromarray(values_HW), GreyDepth(), 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF", "GIF", "JPEG"])
def test_a_shrunk_image_equals_that_of_the_whole_picture(kind: str) -> None:
    data = encoded(plain_picture("RGB", (70, 50)), kind)
    expected = decode_image(data, RULES)
    expected.thumbnail((20, 20))
    assert decode_image(data, RULES, 20).tobytes() == expected.tobytes()


class Decoders:
    """Threads that reserve pixels: how many they hold, and in which order."""

    def __init__(self) -> None:
        self.budget, self.held, self.peak, self.order = PixelBudget(), 0, 0, list[int]()
        self._lock = threading.Lock()

    def start(self, pixels: int, release: threading.Event, max_pixels: int = MIN_PIXELS) -> threading.Thread:
        def run() -> None:
            with self.budget.reserve(pixels, max_pixels):
                with self._lock:
                    self.order.append(pixels)
                    self.held += pixels
                    self.peak = max(self.peak, self.held)
                release.wait(10)
                with self._lock:
                    self.held -= pixels

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.02)  # it waits or has reserved
        return thread


def test_reservations_are_granted_in_order_of_arrival() -> None:
    decoders, release, half = Decoders(), threading.Event(), MIN_PIXELS // 2
    sizes = [half + 1, half + 2, 1, 2, 3]  # the small ones would fit before the second, but wait behind it
    threads = [decoders.start(size, release) for size in sizes]
    assert decoders.order == sizes[:1]
    release.set()
    for thread in threads:
        thread.join(10)
    assert decoders.order[:2] == sizes[:2] and sorted(decoders.order) == sorted(sizes)
    assert decoders.peak <= MIN_PIXELS


def test_an_image_larger_than_the_budget_is_decoded_alone() -> None:
    decoders, release = Decoders(), threading.Event()
    huge = 3 * MIN_PIXELS
    threads = [decoders.start(size, release) for size in (5, huge, 7, huge, 9)]
    assert decoders.order == [5]
    release.set()
    for thread in threads:
        thread.join(10)
    assert decoders.order == [5, huge, 7, huge, 9] and decoders.peak == huge


def test_a_larger_limit_admits_more() -> None:
    decoders, release = Decoders(), threading.Event()
    threads = [decoders.start(MIN_PIXELS, release, 2 * MIN_PIXELS) for _ in range(3)]
    assert len(decoders.order) == 2
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(decoders.order) == 3


def test_an_interrupted_thread_leaves_the_queue() -> None:
    budget = PixelBudget()

    def broken_wait(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget._changed, "wait_for", broken_wait)
        with pytest.raises(KeyboardInterrupt), budget.reserve(1, 1):
            pass
    with budget.reserve(MIN_PIXELS, 1):
        pass


def test_threads_decode_no_more_pixels_at_a_time_than_the_source_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydetect.images.memory_budget.MIN_PIXELS", 0)
    held, peak, lock = 0, 0, threading.Lock()
    load = opening._loaded

    def slow(opened: opening._Opened, rules: DecodeRules) -> opening.Loaded:
        nonlocal held, peak
        with lock:
            held += opened.pixels
            peak = max(peak, held)
        time.sleep(0.005)
        try:
            return load(opened, rules)
        finally:
            with lock:
                held -= opened.pixels

    monkeypatch.setattr(opening, "_loaded", slow)
    members = [
        Member(f"k{i}", "u", encoded(plain_picture("L", (20 + i, 30)), "PNG") + bytes(TINY_BYTES)) for i in range(24)
    ]
    rules = DecodeRules(2000, True)
    with DecodePool(8) as pool:
        found = [p for p in decode_stream(members, rules, Preprocess((8, 8)), pool) if isinstance(p, Pixels)]
    assert [item.width for item in found] == [20 + i for i in range(24)]
    assert 1300 < peak <= 2000  # more than one at a time, none of them refused


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG", "AVIF"])
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_only_the_source_limits_the_number_of_pixels(
    kind: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow itself refuses twice as many
    data = encoded(plain_picture("RGB", (40, 30)), kind, **options)
    over = decode_member(Member("k", "u", data), DecodeRules(1199, True), Preprocess((8, 8)))
    assert over.status == "too_many_pixels" and "more than source.max_pixels = 1,199" in over.error
    assert decode_member(Member("k", "u", data), DecodeRules(1200, True), Preprocess((8, 8))).status == "ok"


def test_pillows_limit_is_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(plain_picture("RGB", (40, 30)), "PNG")
    for limit, max_pixels, expected in ((None, 2000, None), (5000, 2000, 5000), (100, 2000, 2000)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        decode_image(data, DecodeRules(max_pixels, True))
        assert expected == Image.MAX_IMAGE_PIXELS


def test_a_header_with_far_too_many_pixels_is_refused() -> None:
    header = b"RIFF" + struct.pack("<I", 26) + b"WEBPVP8L" + struct.pack("<IBI", 14, 0x2F, 0x3FFF << 14 | 0x3FFF)
    png = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 1 << 20, 1 << 20, 8, 2, 0, 0, 0)
    png += struct.pack(">I", zlib.crc32(png[12:])) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    for data in (header.ljust(34, b"\0"), png):
        found = decode_member(Member("k", "u", data), RULES, Preprocess((8, 8)))
        assert found.status == "too_many_pixels" and "source.max_pixels" in found.error


def test_a_tile_larger_than_its_image_counts() -> None:
    tags = [(256, 4, 40), (257, 4, 30), (258, 3, 8), (259, 3, 8), (262, 3, 1), (322, 4, 4096), (323, 4, 4096)]
    tags += [(324, 4, 8), (325, 4, 0)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    found = decode_member(Member("k", "u", data), DecodeRules(10**7, True), Preprocess((8, 8)))
    assert found.status == "too_many_pixels" and "tile of 4096 x 4096 px" in found.error


def test_a_line_of_pixels_is_not_widened_before_it_is_shrunk() -> None:
    code = (
        "import resource\n"
        "from PIL import Image\n"
        "from raydetect.images import bit_depth, resize\n"
        "size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "size_px = (1, 1 << 20)\n"
        "upright = resize.upright(Image.new('L', size_px), bit_depth.FULL_DEPTH, 1, size_px, size_px)\n"
        "upright.cut((0, 0, *size_px), (256, 256)).convert('RGB')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) << 10 < 100 << 20  # widened to 256 px first, it would take 256 MiB


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
def test_a_png_with_too_large_texts_is_read_without_them(after: bool) -> None:
    picture, texts = plain_picture("RGB", (40, 30)), PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", " " * (2 << 20), zip=True)
    texts.add_text("workflow", " " * (2 << 20), zip=True)
    data = encoded(picture, "PNG", pnginfo=texts)
    if after:
        start, end = data.index(b"iTXt") - 4, data.index(b"IDAT") - 4
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    found = decode_member(Member("k", "u", data), RULES, Preprocess((30, 40)))
    assert found.status == "ok" and found.notes == ("exif_ignored",)
    assert (found.only_input == np.asarray(picture)).all()


def test_an_overlay_is_the_same_for_bands_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    image_HW3, map_HW = random.integers(0, 256, (37, 23, 3)).astype(np.uint8), random.random((9, 7)).astype(np.float32)
    whole = heatmaps.overlay_png(image_HW3, map_HW, 0.0, 2.0)
    monkeypatch.setattr(heatmaps, "BAND_PIXELS", 50)
    assert heatmaps.overlay_png(image_HW3, map_HW, 0.0, 2.0) == whole


def test_a_heatmap_with_too_many_pixels_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmaps, "MAX_PIXELS", 1199)
    with pytest.raises(StorageError, match="40 x 30 px"):
        heatmaps.read_map_png(encoded(plain_picture("I;16", (40, 30)), "PNG"), 0.0, 1.0)
