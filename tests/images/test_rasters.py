"""Rasters: windows have the pixels of the in-memory path; bands, ranges, damage, and memory."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rasterio.io import MemoryFile

from raydetect.config import SourceSpec
from raydetect.config.validation import validate
from raydetect.config.view import TileSpec, ViewSpec
from raydetect.errors import MemberError, SpecError
from raydetect.images import decode
from raydetect.images.decode import DecodePool, Pixels, decode_image, decode_member, decode_stream
from raydetect.images.masks.decoding import sampled_mask
from raydetect.images.opening import DecodeRules, loaded_image
from raydetect.images.preprocess import Preprocess
from raydetect.images.rasters import library, opening
from raydetect.images.rasters.kinds import Kind
from raydetect.images.rasters.opening import raster_for_windows
from raydetect.images.tiff import COMPRESSION, Reader
from raydetect.records import Member
from raydetect.views.view import FILL, View
from raydetect.views.windows import Input
from tests.builders.rasters import raster, turned

TILE_OFFSETS = 324
RULES = DecodeRules.of(SourceSpec(uri="memory://x"))
RANDOM = np.random.default_rng(0)
SIZE = (250, 330)  # no multiple of tiles, strips or windows
COLOUR = np.asarray(Image.fromarray(RANDOM.integers(0, 256, (50, 66, 3)).astype(np.uint8)).resize(SIZE[::-1]))
GREY = COLOUR[..., 1]
DEEP = (GREY.astype(np.uint16) << 8) + RANDOM.integers(0, 256, SIZE).astype(np.uint16)
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}
VIEWS = {
    "own size": ViewSpec(tile=TileSpec(overlap=16)),
    "reduced": ViewSpec(tile=TileSpec(overlap=16), scale=0.37),
    "enlarged": ViewSpec(tile=TileSpec(overlap=16), scale=1.7),
}


def with_tag(picture: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", tiffinfo={274: orientation}, **options)
    return buffer.getvalue()


LAYOUTS: dict[str, bytes] = {
    "strips": raster(COLOUR, photometric="RGB"),
    "tiles": raster(COLOUR, photometric="RGB", **TILED),
    "bigtiff": raster(COLOUR, photometric="RGB", BIGTIFF="YES", **TILED),
    "big-endian": raster(COLOUR, photometric="RGB", ENDIANNESS="BIG", compress="deflate"),
    "lzw": raster(COLOUR, photometric="RGB", compress="lzw", predictor=2),
    "deflate": raster(COLOUR, photometric="RGB", compress="deflate", **TILED),
    "zstd": raster(COLOUR, photometric="RGB", compress="zstd", **TILED),
    "jpeg": raster(COLOUR, photometric="RGB", compress="jpeg", **TILED),
    "planes": raster(COLOUR, photometric="RGB", interleave="band", compress="lzw", **TILED),
    "overviews": raster(COLOUR, photometric="RGB", overviews=[2, 4], **TILED),
    "alpha": raster(np.dstack([COLOUR, GREY]), photometric="RGB", alpha="UNSPECIFIED"),
    "grey": raster(GREY, compress="lzw"),
    "grey, white is zero": raster(GREY, photometric="MINISWHITE"),
    "grey of 16 bits": raster(DEEP, compress="deflate", **TILED),
    "16 bits, white is zero": raster(DEEP, photometric="MINISWHITE"),
    "16 bits, big-endian": raster(DEEP, ENDIANNESS="BIG"),
    "colour of 16 bits": raster(np.dstack([DEEP, DEEP // 2, DEEP // 3]), photometric="RGB"),
    "bilevel": with_tag(Image.fromarray(GREY > 128), compression="group4"),
    "palette": with_tag(Image.fromarray(COLOUR).quantize(64)),
    **{f"orientation {i}": with_tag(Image.fromarray(COLOUR), i, compression="tiff_lzw") for i in range(1, 9)},
    "orientation 6, grey of 16 bits": with_tag(Image.fromarray(DEEP), 6),
}


def preprocess(spec: ViewSpec, side: int = 64) -> Preprocess:
    return Preprocess((side, side), "full", View(spec))


def decoded(data: bytes, rules: Preprocess, source: DecodeRules = RULES) -> Pixels:
    return decode_member(Member("a.tif", "memory://a.tif", data), source, rules)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_windows_have_the_pixels_of_the_in_memory_path(name: str, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = preprocess(VIEWS[view])
    assert raster_for_windows(LAYOUTS[name], RULES, rules.view.spec) is not None
    by_windows = decoded(LAYOUTS[name], rules)
    monkeypatch.setattr(decode, "raster_for_windows", lambda *_: None)
    whole = decoded(LAYOUTS[name], rules)
    assert by_windows.status == whole.status == "ok", (by_windows.error, whole.error)
    assert by_windows.facts() == whole.facts() and by_windows.orientation == whole.orientation
    assert len(by_windows.inputs) == len(whole.inputs) > 1
    for ours, theirs in zip(by_windows.inputs, whole.inputs, strict=True):
        assert (ours.image_HWC == theirs.image_HWC).all(), ours.window


def test_other_pixel_formats_are_decoded_in_memory() -> None:
    spec = VIEWS["own size"]
    half_chroma = raster(COLOUR, compress="jpeg", photometric="YCBCR", **TILED)
    assert raster_for_windows(half_chroma, RULES, spec) is None
    assert raster_for_windows(half_chroma, DecodeRules(1000, True), spec) is not None  # refused otherwise
    for data in (with_tag(Image.fromarray(COLOUR).convert("CMYK")), raster(GREY.astype(np.float32)), b"II*\0", b""):
        assert raster_for_windows(data, RULES, spec) is None


def test_tiles_lift_the_limit_of_the_picture_and_keep_that_of_windows_and_blocks() -> None:
    small = DecodeRules(64 * 64 * 8, True)
    tiles, strip = (
        raster(COLOUR, photometric="RGB", **TILED),
        raster(COLOUR, photometric="RGB", compress="lzw", blockysize=250),
    )
    assert decoded(tiles, preprocess(VIEWS["own size"]), small).status == "ok"
    refused = decoded(tiles, preprocess(ViewSpec()), small)
    assert refused.status == "too_many_pixels" and "store it as a tiled TIFF" in refused.error
    refused = decoded(tiles, preprocess(ViewSpec(tile=TileSpec(overlap=16), scale=0.2)), small)
    assert refused.status == "too_many_pixels" and "a window of 326 x 250 px" in refused.error
    refused = decoded(strip, preprocess(VIEWS["own size"]), small)
    assert refused.status == "too_many_pixels" and "stored in blocks of 330 x 250 px" in refused.error


def test_threads_cut_the_same_windows() -> None:
    rules, members = preprocess(VIEWS["reduced"], 16), [Member("a.tif", "memory://a.tif", LAYOUTS["deflate"])] * 3
    with DecodePool(4) as pool:
        items = list(decode_stream(members, RULES, rules, pool))
    alone = decoded(LAYOUTS["deflate"], rules)
    shown = [item for item in items if isinstance(item, Input)]
    assert len(shown) == 3 * len(alone.inputs)
    for ours, theirs in zip(shown, alone.inputs * 3, strict=True):
        assert (ours.image_HWC == theirs.image_HWC).all()


def damaged(data: bytes) -> bytes:
    """Overwrites the start of a tile in the middle."""
    reader = Reader(data)
    offsets = reader.numbers(reader.start, TILE_OFFSETS)
    assert offsets is not None
    start = int(offsets[len(offsets) // 2])
    return data[:start] + b"\xff" * 60 + data[start + 60 :]


SPARSE = raster(np.where(np.arange(330) < 64, GREY, 0).astype(np.uint8), compress="deflate", SPARSE_OK="YES", **TILED)


@pytest.mark.parametrize("threads", [None, 3])
@pytest.mark.parametrize(
    "data",
    [
        damaged(LAYOUTS["deflate"]),
        damaged(LAYOUTS["zstd"]),
        damaged(LAYOUTS["jpeg"]),
        LAYOUTS["deflate"][: len(LAYOUTS["deflate"]) // 2],
        LAYOUTS["strips"][: len(LAYOUTS["strips"]) // 2],
        SPARSE,
    ],
    ids=["deflate", "zstd", "jpeg", "cut", "cut strips", "sparse"],
)
def test_damage_in_the_middle_is_corrupt(data: bytes, threads: int | None) -> None:
    members = [Member(f"{i}.tif", f"memory://{i}.tif", data) for i in range(2)]
    with DecodePool(threads or 1) as pool:
        found = [
            item
            for _ in range(2)
            for item in decode_stream(members, RULES, preprocess(VIEWS["own size"]), pool)
            if isinstance(item, Pixels)
        ]
    assert [pixels.status for pixels in found] == ["corrupt"] * 4
    assert len({pixels.error.partition(": ")[2] for pixels in found}) == 1 and "vsimem" not in found[0].error


def test_bands_and_a_range_choose_what_is_seen() -> None:
    values = RANDOM.integers(0, 12_000, (*SIZE, 5)).astype(np.uint16)
    data = raster(values, compress="deflate", **TILED)
    expected = np.floor(np.clip(values[..., [3, 2, 1]].astype(float) / 10_000 * 255, 0, 255) + 0.5)
    for spec in (
        ViewSpec(bands=(4, 3, 2), range=(0, 10_000), tile=TileSpec(overlap=8, size=(512, 512))),
        ViewSpec(bands=(4, 3, 2), range=(0, 10_000)),
    ):
        found = decoded(data, preprocess(spec, 512))
        assert found.status == "ok", found.error
        shown = Image.fromarray(expected.astype(np.uint8))
        window = found.inputs[0].window
        width, height = window.place[2] - window.place[0], window.place[3] - window.place[1]
        resized = np.asarray(shown.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(found.inputs[0].image_HWC[:height, :width] - resized).max() == 0
    one = decoded(data, preprocess(ViewSpec(bands=(5,)), 64))  # the fixed scale
    assert one.status == "ok"
    assert one.only_input is not None and (one.only_input[..., 0] == one.only_input[..., 1]).all()
    picture = decode_image(data, RULES, 100, ViewSpec(bands=(4, 3, 2), range=(0, 10_000)))
    assert picture.mode == "RGB" and picture.size == (100, 76)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int32, np.uint32])
def test_every_type_works_with_a_range_and_names_it_without_one(kind: type) -> None:
    values = (RANDOM.random(SIZE) * 40 - 20).astype(kind)
    data = raster(values)
    found = decoded(data, preprocess(ViewSpec(range=(-10, 10), tile=TileSpec(overlap=8, size=(512, 512))), 512))
    assert found.status == "ok", found.error
    place = found.inputs[0].window.place
    shown = found.inputs[0].image_HWC[: place[3], : place[2], 0]
    exact = np.floor(np.clip((values.astype(float) + 10) / 20 * 255, 0, 255) + 0.5).astype(np.uint8)
    resized = Image.fromarray(exact).resize((place[2], place[3]), Image.Resampling.BILINEAR)
    assert np.abs(shown.astype(int) - np.asarray(resized)).max() <= 1
    for spec in (ViewSpec(), VIEWS["own size"], ViewSpec(bands=(1,))):
        found = decoded(data, preprocess(spec))
        assert found.status == "unsupported_mode" and "view.range" in found.error


def test_nodata_is_filled_and_noted() -> None:
    values = np.full((*SIZE, 3), 100, np.float32)
    values[:50], values[50:60, :100] = -9999, np.nan
    data = raster(values, nodata=-9999, **TILED)
    found = decoded(data, preprocess(ViewSpec(range=(0, 200)), 64))
    assert found.status == "ok" and found.facts()["note"] == "nodata: 21.21 %"
    assert found.only_input is not None
    assert (found.only_input[0, 0] == FILL).all() and (found.only_input[-1, -1] == 128).all()
    grey = decoded(raster(values[..., 0], nodata=-9999), preprocess(ViewSpec(range=(0, 200)), 64))
    assert grey.only_input is not None and (grey.only_input[0, 0] == 117).all()
    assert Image.new("RGB", (1, 1), FILL).convert("L").getpixel((0, 0)) == 117


@pytest.mark.parametrize(
    ("data", "spec", "message"),
    [
        (raster(np.dstack([COLOUR, COLOUR])), ViewSpec(), "view.bands"),
        (raster(np.dstack([COLOUR, COLOUR])), ViewSpec(range=(0, 9)), "Choose one or three of them with view.bands"),
        (raster(COLOUR), ViewSpec(bands=(4,)), r"view.bands = \[4\], and it has 3 bands"),
        (raster(GREY.astype(np.complex64)), ViewSpec(range=(0, 9)), "complex"),
        (LAYOUTS["palette"], ViewSpec(bands=(1,)), "palette"),
    ],
)
def test_what_has_no_defined_bands_is_refused(data: bytes, spec: ViewSpec, message: str) -> None:
    with pytest.raises(MemberError, match=message) as caught:
        found = decoded(data, preprocess(spec))
        raise MemberError(found.status, found.error)
    assert caught.value.status == "unsupported_mode"


def test_four_bands_stay_what_they_were() -> None:
    four = np.dstack([COLOUR, GREY])
    for data in (raster(four, photometric="RGB"), raster(four, photometric="RGB", alpha="UNSPECIFIED")):
        assert (np.asarray(decode_image(data, RULES)) == COLOUR).all()
    found = decoded(raster(four, photometric="MINISBLACK"), preprocess(ViewSpec()))
    assert found.status == "unsupported_mode" and "view.bands" in found.error


@pytest.mark.parametrize(("bands", "values"), [((1, 2), None), (None, (3, 3)), (None, (0, float("inf"))), ((0,), None)])
def test_bands_and_ranges_without_meaning_are_refused(bands: Any, values: Any) -> None:
    with pytest.raises(SpecError, match="view"):
        validate(ViewSpec, {"bands": bands, "range": values}, "view")


def test_a_view_is_recorded_with_its_bands() -> None:
    view = View(ViewSpec(bands=(4, 3, 2), range=(0, 10_000)))
    assert view.recorded() == {"bands": [4, 3, 2], "range": [0, 10_000]}
    assert View.of_record({"bands": [4, 3, 2], "range": [0, 10_000]}) == view


def test_jpeg_2000_is_read_with_and_without_tiles() -> None:
    data = raster(COLOUR, "JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES", YCBCR420="NO")
    assert (np.asarray(decode_image(data, RULES, 2000)) == COLOUR).all()
    for spec in (ViewSpec(), *VIEWS.values()):
        found, same = decoded(data, preprocess(spec)), decoded(LAYOUTS["tiles"], preprocess(spec))
        assert found.status == "ok", found.error
        for ours, theirs in zip(found.inputs, same.inputs, strict=True):
            assert (ours.image_HWC == theirs.image_HWC).all()
    assert decoded(data[: len(data) // 2], preprocess(ViewSpec())).status == "corrupt"


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "is_installed", lambda: False)
    jp2 = raster(COLOUR, "JP2OpenJPEG")
    for data, spec in ((jp2, ViewSpec()), (LAYOUTS["tiles"], ViewSpec(bands=(1,)))):
        found = decoded(data, preprocess(spec))
        assert found.status == "unsupported_mode" and library.INSTALL in found.error
    found = decoded(LAYOUTS["tiles"], preprocess(VIEWS["own size"]), DecodeRules(1000, True))
    assert found.status == "too_many_pixels" and library.INSTALL in found.error
    assert decoded(LAYOUTS["tiles"], preprocess(VIEWS["own size"])).status == "ok"  # small enough for memory


@pytest.mark.parametrize("name", ["tiles", "strips", "overviews", "orientation 6", "palette", "grey of 16 bits"])
def test_a_large_picture_is_shrunk_in_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode_image(LAYOUTS[name], RULES)
    monkeypatch.setattr(opening, "SHOWN_PIXELS", 100)
    monkeypatch.setattr("raydetect.images.rasters.picture.BAND_PIXELS", 5000)
    picture = decode_image(LAYOUTS[name], RULES, 60)
    expected = whole.resize(picture.size, Image.Resampling.BILINEAR)
    assert max(picture.size) == 60
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(expected))
    assert difference.max() <= (64 if name == "overviews" else 1), difference.max()
    with pytest.raises(MemberError, match="max_pixels"):
        decode_image(LAYOUTS[name], DecodeRules(1000, True), None)


MASK = np.zeros(SIZE, np.uint8)
MASK[30:90, 200:260], MASK[200:240, 10:30] = 1, 2


@pytest.mark.parametrize(
    "data",
    [
        raster(MASK, compress="deflate"),
        raster(MASK * 127, **TILED),
        raster((MASK > 0).astype(np.uint8), nbits=1, compress="deflate"),
        raster(1 - (MASK > 0).astype(np.uint8), nbits=1, photometric="MINISWHITE"),
        raster(GREY),
        raster(np.where(GREY > 127, 0, GREY)),
        raster(DEEP),
        raster(COLOUR, photometric="RGB", compress="lzw"),
        raster(MASK * 100, compress="jpeg", **TILED),
        with_tag(Image.fromarray(MASK), 6),
        with_tag(Image.fromarray(COLOUR).quantize(8), 8),
    ],
)
@pytest.mark.parametrize(("canvas", "share"), [((50, 66), 1.0), ((97, 131), 1.0), ((40, 40), 0.7)])
def test_masks_are_sampled_as_in_memory(
    data: bytes, canvas: tuple[int, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, height = loaded_size(data)
    image = Pixels(width=width, height=height)
    box = (0.1 * (1 - share) * width, 0.0, share * width, share * height)
    expected, size = sampled_mask(data, image, RULES, canvas, box)
    monkeypatch.setattr(opening, "SHOWN_PIXELS", 100)
    monkeypatch.setattr("raydetect.images.masks.decoding.BAND_PIXELS", 5000)
    found, same_size = sampled_mask(data, image, RULES, canvas, box)
    assert size == same_size == (width, height) and (found == expected).all() and found.dtype == bool


def loaded_size(data: bytes) -> tuple[int, int]:
    with loaded_image(data, RULES) as loaded:
        return loaded.size


def test_a_mask_of_another_size_tells_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Pixels(width=400, height=400)
    for limit in (1 << 24, 100):
        monkeypatch.setattr(opening, "SHOWN_PIXELS", limit)
        found, size = sampled_mask(raster(MASK), image, RULES, (40, 40), (0.0, 0.0, 400.0, 400.0))
        assert size == SIZE[::-1] and not found.any()


def test_a_mask_without_orientation_is_turned_with_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Pixels(width=SIZE[0], height=SIZE[1], orientation=6)
    box = (0.0, 0.0, *map(float, SIZE))
    expected, _ = sampled_mask(raster(MASK), image, RULES, (99, 75), box)
    monkeypatch.setattr(opening, "SHOWN_PIXELS", 100)
    found, size = sampled_mask(raster(MASK), image, RULES, (99, 75), box)
    assert size == SIZE and expected.any() and (found == expected).all()


def test_gdal_reads_nothing_but_the_bytes() -> None:
    assert library.OPTIONS["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"
    vrt = b'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'
    with MemoryFile(vrt, filename="a.vrt") as file, file.open() as dataset:
        assert dataset.width == 9  # GDAL itself would
    for data in (vrt, b"II*\0" + vrt, LAYOUTS["tiles"][:8] + vrt):
        found = decoded(data, preprocess(ViewSpec(bands=(1,))))
        assert found.status in ("not_an_image", "unsupported_mode", "corrupt")
        with pytest.raises(MemberError), library.opened_dataset(data):
            pass


def test_the_cache_suits_the_blocks() -> None:
    for name, kept in (("tiles", 24 << 20), ("strips", 64 << 20)):
        with library.opened_dataset(LAYOUTS[name]) as dataset:
            library.read_window(dataset, (1,), (0, 0, 9, 9))
            assert library._cache_bytes(dataset) == kept, name


def test_levels_that_are_values_are_not_copied() -> None:
    values_CHW = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    levels_HW, empty = Kind((1,)).levels(values_CHW[:1])
    assert np.shares_memory(levels_HW, values_CHW) and empty == 0
    levels_HWC, _ = Kind((1, 2, 3)).levels(values_CHW)
    assert (levels_HWC == values_CHW.transpose(1, 2, 0)).all() and levels_HWC.flags.c_contiguous
    assert (Kind((1,), inverted=True).levels(values_CHW[:1])[0] == 255 - values_CHW[0]).all()


def test_turning_keeps_the_tag() -> None:
    assert turned(LAYOUTS["orientation 1"], 6) == LAYOUTS["orientation 6"]


def test_a_damaged_overview_spoils_no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "SHOWN_PIXELS", 100)
    data = raster(COLOUR, photometric="RGB", compress="lzw", overviews=[2, 4], **TILED)
    reader = Reader(data)
    for offset in list(reader.offsets())[1:]:
        offsets = reader.numbers(offset, TILE_OFFSETS)
        assert offsets is not None
        for start in map(int, offsets):
            data = data[:start] + b"\xff" * 60 + data[start + 60 :]
    whole = decode_image(data, RULES).resize((60, 45), Image.Resampling.BILINEAR)
    picture = decode_image(data, RULES, 60)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(whole)).max() <= 1


def test_compressions_that_gdal_may_lack_are_decoded_in_memory() -> None:
    data, reader = LAYOUTS["lzw"], Reader(LAYOUTS["lzw"])
    offset = reader.directory(reader.start).value_offsets[COMPRESSION]
    data = data[:offset] + (50001).to_bytes(2, "little") + data[offset + 2 :]  # WebP
    assert raster_for_windows(data, RULES, VIEWS["own size"]) is None
