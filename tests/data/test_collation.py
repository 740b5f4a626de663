import dataclasses

import numpy as np
import pytest

from mmjax.data.collation import collate
from mmjax.data.encoding import Example


def example(id, layout, pixels=None, category=-1):
    """`layout`: a letter is a token, upper case supervised, '#' an image position."""
    ids = np.array([0 if char == "#" else ord(char) for char in layout], np.int32)
    shown = np.array([char == "#" for char in layout], bool)
    media = np.where(shown, np.cumsum(shown) - 1, -1)
    labels = np.where([char.isupper() for char in layout], ids, -100)
    count = 0 if pixels is None else len(pixels)
    tokens = int(shown.sum()) // count if count else 0
    return Example(
        id, ids, labels.astype(np.int32), media, ({"path": id},) * count, pixels, category, tile_tokens=tokens
    )


def picture(*values):
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def test_text_images_and_several_images_share_a_batch():
    one = example("one", "a##B", picture(1))
    text = example("text", "cDE")
    two = example("two", "##f##G", picture(2, 3))
    batch = collate([[one, text], [two]], length=8)
    A, B, D, E, G = (ord(char) for char in "aBDEG")
    np.testing.assert_array_equal(batch.tokens, [[A, 0, 0, B, ord("c"), D, E, 0], [0, 0, ord("f"), 0, 0, G, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0, 0]])
    np.testing.assert_array_equal(batch.media, [[-1, 0, 1, -1, -1, -1, -1, -1], [2, 3, -1, 4, 5, -1, -1, -1]])
    np.testing.assert_array_equal(batch.targets, [[0, 0, B, 0, D, E, 0, 0], [0, 0, 0, 0, G, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, np.array(batch.targets) > 0)
    np.testing.assert_array_equal(batch.images[0, :, 0, 0, 0], [1, 2, 3])
    assert batch.tiles.all() and batch.classes is None and batch.features is None


def test_groups_count_their_own_media_and_carry_dummies():
    rows = [
        [example("a", "#A", picture(1))],
        [example("b", "bB")],
        [example("c", "cC")],
        [example("d", "#D", picture(4))],
    ]
    batch = collate(rows, groups=2, tiles=2)
    assert batch.images.shape == (2, 2, 2, 2, 3)
    np.testing.assert_array_equal(batch.tiles, [[True, False], [True, False]])
    np.testing.assert_array_equal(batch.media[:, 0], [0, -1, -1, 0])
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0, 0], [1, 4])
    assert not batch.images[:, 1].any()


def test_a_batch_of_text_has_dummies_where_asked_and_nothing_otherwise():
    rows = [[example("a", "aA")]]
    assert collate(rows).images is None and collate(rows).tiles is None
    dummies = collate(rows, tiles=3, media_shape=(4, 4, 3))
    assert dummies.images.shape == (1, 3, 4, 4, 3) and not dummies.tiles.any()
    features = collate(rows, tiles=3, media_shape=(9, 5), media_dtype=np.float16, audio_shape=(2, 7))
    assert features.features.shape == (1, 3, 9, 5) and features.images is None
    assert (features.features.dtype, dummies.images.dtype, features.audio.shape) == (np.float16, np.uint8, (1, 3, 2, 7))
    with pytest.raises(ValueError, match="media_shape"):
        collate(rows, tiles=3)


def test_classes_stand_beside_their_tiles():
    rows = [[example("a", "", picture(1), 7), example("b", "", picture(2), 0)], [example("c", "", picture(3), 4)]]
    batch = collate(rows, groups=2, tiles=2)
    assert batch.tokens is None
    np.testing.assert_array_equal(batch.classes, [[7, 0], [4, -1]])


def test_what_does_not_fit_is_an_error_that_names_the_sample():
    with pytest.raises(ValueError, match="4 tokens, more than 3; its last sample is b"):
        collate([[example("a", "aA"), example("b", "bB")]], length=3)
    with pytest.raises(ValueError, match="2 tiles, more than 1; the last is of sample b"):
        collate([[example("b", "##B", picture(1, 2))]], tiles=1)
    with pytest.raises(ValueError, match="3 rows cannot be shared by 2 groups"):
        collate([[]] * 3, groups=2)


def test_stitched_pictures_count_media_by_picture_and_tiles_by_tile():
    def stitched(id, layout, *grids):
        one = example(id, layout)
        tiles = tuple(1 + rows * columns for rows, columns in grids)
        pixels = np.zeros((sum(tiles), 2, 2, 3), np.uint8)
        return dataclasses.replace(
            one, images=({"path": id},) * len(grids), pixels=pixels, tiles=tiles, tile_tokens=2, grids=grids
        )

    rows = [[stitched("a", "##A##B", (1, 2), (2, 2))], [stitched("b", "##C", (1, 1)), stitched("c", "cD")]]
    batch = collate(rows, length=6, tiles=12, stitched=True)
    assert batch.media.tolist() == [[0, 1, -1, 2, 3, -1], [4, 5, -1, -1, -1, -1]]
    assert batch.grids.tolist() == [[[0, 1, 2], [3, 2, 2], [8, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert batch.tiles.tolist() == [[True] * 10 + [False] * 2]
