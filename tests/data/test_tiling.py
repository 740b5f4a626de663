from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmjax.data.images import ImageProcessor, decode, size_of
from mmjax.data.tiling import AnyRes, DynamicTiles, Layout, OverlappingTiles, SmartResize, cut, patch_rows, unpadded
from mmjax.errors import UserError
from tests.data.pictures import encoded, gradient

TILINGS = {
    "anyres": AnyRes(),
    "anyres of LLaVA's own order": AnyRes(((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))),
    "dynamic": DynamicTiles(1, 12),
    "dynamic, several": DynamicTiles(4, 6),
    "smart": SmartResize(28 * 28 * 4, 28 * 28 * 64),
}
EXTREME = [(1, 1), (1, 20000), (20000, 1), (3, 2), (8192, 8192)]


def sizes(number: int) -> list[tuple[int, int]]:
    """Heights and widths of all scales, squares and simple ratios (where grids are equally good) among them."""
    rng = np.random.default_rng(0)
    drawn = [(int(h), int(w)) for h, w in np.exp(rng.uniform(np.log(8), np.log(3000), (number, 2)))]
    return [*drawn, *((side * a, side * b) for side in (7, 200, 336, 448, 1000) for a in (1, 2, 3) for b in (1, 2, 3))]


@pytest.mark.parametrize(
    ("tiling", "tile", "size", "expected"),
    [
        (AnyRes(), 336, (672, 672), Layout(672, 672, 2, 2, overview="first")),
        (AnyRes(), 336, (168, 168), Layout(336, 336, 1, 2, overview="first")),
        (AnyRes(), 336, (200, 1000), Layout(202, 1008, 1, 3, overview="first")),
        (DynamicTiles(), 448, (448, 448), Layout(448, 448, 1, 1)),
        (DynamicTiles(), 448, (1000, 1000), Layout(1344, 1344, 3, 3, overview="last")),
        (DynamicTiles(), 448, (600, 800), Layout(1344, 1792, 3, 4, overview="last")),
        (SmartResize(), 14, (480, 640), Layout(476, 644, 34, 46, block=2)),
        (SmartResize(), 14, (10, 10), Layout(56, 56, 4, 4, block=2)),
        (SmartResize(), 14, (4000, 4000), Layout(980, 980, 70, 70, block=2)),
    ],
)
def test_layouts_that_can_be_checked_by_hand(tiling, tile, size, expected):
    assert tiling.layout(*size, (tile, tile)) == expected


def test_layouts_equal_transformers_at_many_sizes():
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in sizes(500):
        for grids in (TILINGS["anyres"].grids, TILINGS["anyres of LLaVA's own order"].grids):
            layout = AnyRes(grids).layout(height, width, (336, 336))
            chosen = select_best_resolution((height, width), [(336 * rows, 336 * columns) for rows, columns in grids])
            assert (layout.rows * 336, layout.columns * 336) == chosen, (height, width)
        for least, most in ((1, 12), (4, 6)):
            layout = DynamicTiles(least, most).layout(height, width, (448, 448))
            chosen = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
            assert (layout.columns, layout.rows) == chosen, (height, width)
        if max(height, width) <= 200 * min(height, width):
            layout = SmartResize().layout(height, width, (14, 14))
            assert (layout.height, layout.width) == smart_resize(height, width), (height, width)


def test_tokens_of_anyres_equal_transformers():
    from transformers import LlavaNextProcessor

    canvases = [(336 * rows, 336 * columns) for rows, columns in AnyRes().grids]
    reference = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=canvases), patch_size=14, num_additional_image_tokens=0
    )
    reference._get_unpadded_features = lambda *given: LlavaNextProcessor._get_unpadded_features(reference, *given)
    for height, width in sizes(300):
        rows, columns = unpadded(AnyRes().layout(height, width, (336, 336)), height, width, 24)
        expected = LlavaNextProcessor._get_number_of_features(reference, height, width, 336, 336)
        assert 24**2 + rows * (columns + 1) == expected, (height, width)
    assert unpadded(AnyRes().layout(672, 672, (336, 336)), 672, 672, 24) == (48, 48)  # 2928 tokens in all


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("size", EXTREME)
def test_extreme_sizes_have_sound_layouts(tiling, size):
    tile = (14, 14) if isinstance(tiling, SmartResize) else (336, 336)
    layout = tiling.layout(*size, tile)
    assert 1 <= layout.height <= layout.rows * tile[0] and 1 <= layout.width <= layout.columns * tile[1]
    assert layout.rows % layout.block == 0 and layout.columns % layout.block == 0
    assert layout.tiles == layout.rows * layout.columns + bool(layout.overview)
    assert layout.tiles <= (13 if not isinstance(tiling, SmartResize) else 16000)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("size", [(1, 1), (1, 100), (90, 1), (33, 57), (60, 60)])
def test_tiles_are_as_many_as_counted(tiling, size):
    side = 14 if isinstance(tiling, SmartResize) else 20
    processor = ImageProcessor(side, "squash", tiling=tiling)
    tiles = processor.tiles(np.full((*size, 3), 200, np.uint8))
    assert tiles.dtype == np.uint8 and tiles.shape == (processor.count(*size), *processor.shape)
    assert set(np.unique(tiles)) <= {0, 200} and (tiles == 200).any()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_pictures_of_other_modes_are_cut_as_what_they_decode_to(mode):
    image = gradient(90, 50).quantize(16) if mode == "P" else gradient(90, 50).convert(mode)
    processor = ImageProcessor(20, "squash", tiling=DynamicTiles())
    plain = np.asarray(decode(encoded(image)))
    np.testing.assert_array_equal(processor.tiles(encoded(image)), processor.tiles(plain))


def test_without_a_tiling_a_picture_is_its_only_tile():
    for aspect in ("pad", "crop", "squash"):
        processor = ImageProcessor((20, 30), aspect)
        assert processor.count(50, 90) == 1
        np.testing.assert_array_equal(processor.tiles(gradient(90, 50)), processor.pixels(gradient(90, 50))[None])


def test_several_tiles_where_one_is_expected_are_refused():
    with pytest.raises(UserError, match="several tiles"):
        ImageProcessor(20, "squash", tiling=AnyRes()).pixels(gradient())


def test_the_overview_follows_the_aspect():
    cropped, squashed = (ImageProcessor(20, aspect, tiling=AnyRes()) for aspect in ("crop", "squash"))
    for processor in (cropped, squashed):
        single = ImageProcessor(20, processor.aspect).pixels(gradient(90, 50))
        np.testing.assert_array_equal(processor.tiles(gradient(90, 50))[0], single)
    np.testing.assert_array_equal(cropped.tiles(gradient(90, 50))[1:], squashed.tiles(gradient(90, 50))[1:])


def test_cutting_pads_the_middle_and_keeps_the_order():
    pixels = np.arange(1, 16, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 3), np.uint8)  # 15 rows onto 16
    tiles = cut(pixels, Layout(15, 8, 4, 2, block=2), (4, 4))
    assert tiles[:, 0, 0, 0].tolist() == [1, 1, 5, 5, 9, 9, 13, 13] and (tiles[-1, 3] == 0).all()
    numbered = np.kron(np.arange(16).reshape(4, 4), np.ones((2, 3), int))[..., None].repeat(3, -1).astype(np.uint8)
    by_rows, by_blocks = (cut(numbered, Layout(8, 12, 4, 4, block=block), (2, 3)) for block in (1, 2))
    assert by_rows[:, 1, 2, 1].tolist() == list(range(16))
    assert by_blocks[:, 1, 2, 1].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_patch_rows_put_channels_before_frames_before_pixels():
    tiles = np.random.default_rng(0).random((5, 2, 3, 3))
    rows = patch_rows(tiles, 2).reshape(5, 3, 2, 2, 3)
    for frame in range(2):
        np.testing.assert_array_equal(rows[:, :, frame], tiles.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_size_is_that_of_the_picture_turned_upright(format):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(gradient(), format, exif=exif)
        assert size_of(data) == np.asarray(decode(data)).shape[:2]
    assert size_of(np.zeros((5, 9), np.uint8)) == (5, 9)


def test_the_size_needs_no_decoding():
    whole = encoded(gradient(500, 300), "JPEG")
    assert size_of(whole[: len(whole) // 2]) == (300, 500)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((400, 800), (2, 5)),
        ((100, 900), (1, 1)),
        ((378, 378), (1, 1)),
        ((600, 600), (3, 3)),
        ((3000, 900), (6, 1)),
        ((560, 1600), (2, 6)),
        ((560, 2000), (1, 6)),
    ],
)
def test_overlapping_tiles_share_their_borders(size, grid):
    """moondream 2's choice of a grid, and that a tile holds what its neighbours show beyond their own part."""
    layout = OverlappingTiles().layout(*size, (378, 378))
    assert (layout.rows, layout.columns) == grid and layout.tiles == grid[0] * grid[1] + 1
    assert (layout.height, layout.width) == tuple(266 * n + 112 for n in grid)
    pixels = np.random.default_rng(0).integers(0, 255, (layout.height, layout.width, 3)).astype(np.uint8)
    tiles = cut(pixels, layout, (378, 378))
    assert tiles.shape == (grid[0] * grid[1], 378, 378, 3)
    for column in range(1, grid[1]):
        np.testing.assert_array_equal(tiles[column - 1][:, -112:], tiles[column][:, :112])
