"""Image processors that transformers writes are read, and make the same pixels."""

import json

import numpy as np
import pytest

from mmjax.data.images import ImageProcessor
from mmjax.data.tiling import AnyRes, DynamicTiles, SmartResize, Tiling, patch_rows
from mmjax.errors import UserError
from mmjax.models.config import ModelConfig
from mmjax.preprocessing import read_image_processor, write_image_processor

CONFIG = ModelConfig(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
CANVASES = [[20, 40], [40, 20], [40, 40], [60, 20], [20, 60]]
SQUARE, EDGE = {"height": 20, "width": 20}, {"shortest_edge": 20}
PROCESSORS: dict[str, tuple[dict, Tiling | None]] = {
    "LlavaNext": ({"size": EDGE, "crop_size": SQUARE, "image_grid_pinpoints": CANVASES}, AnyRes()),
    "GotOcr2": ({"size": SQUARE, "crop_to_patches": True, "max_patches": 6}, DynamicTiles(1, 6)),
    "Qwen2VL": ({"min_pixels": 3136, "max_pixels": 7000, "patch_size": 14}, SmartResize(3136, 7000)),
    "Idefics": ({"image_size": 20}, None),
    "Blip": ({"size": {"height": 20, "width": 28}}, None),
}


@pytest.mark.parametrize("sides", [(40, 60), (75, 50), (30, 30), (97, 13), (9, 70), (1, 1)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_tiles_equal_transformers(tmp_path, name, sides):
    import transformers

    settings, tiling = PROCESSORS[name]
    reference = getattr(transformers, f"{name}ImageProcessorPil")(**settings)
    reference.save_pretrained(str(tmp_path))
    processor = read_image_processor(tmp_path, CONFIG)
    assert processor is not None and processor.tiling == tiling
    picture = np.random.default_rng(sides).integers(0, 256, (*sides, 3), np.uint8)
    found = reference(picture, return_tensors="np", input_data_format="channels_last")
    expected = np.asarray(found["pixel_values"] if name != "Idefics" else found)
    tiles = processor.tiles(picture)
    assert len(tiles) == processor.count(*sides)
    if isinstance(tiling, SmartResize):
        values = patch_rows(processor.normalise(tiles), 2)
        layout = tiling.layout(*sides, processor.shape[:2])
        assert found["image_grid_thw"].tolist() == [[1, layout.rows, layout.columns]]
    else:
        values = processor.normalise(tiles).transpose(0, 3, 1, 2)
        expected = expected.reshape(-1, *expected.shape[-3:])
    np.testing.assert_allclose(values, expected, atol=1e-6)


def read(folder, **values):
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return read_image_processor(folder, CONFIG)


def test_files_as_they_are_published(tmp_path):
    """Shorter than what transformers 5 writes."""
    idefics = read(tmp_path, image_processor_type="IdeficsImageProcessor", image_size=224, image_num_channels=3)
    assert (idefics.size, idefics.aspect, idefics.mean) == (224, "squash", CONFIG.image_mean)
    blip = read(tmp_path, feature_extractor_type="BlipFeatureExtractor", size=384)
    assert (blip.size, blip.aspect) == (384, "squash")
    qwen = read(tmp_path, image_processor_type="Qwen2VLImageProcessor", min_pixels=3136, max_pixels=12845056)
    assert (qwen.size, qwen.tiling) == (14, SmartResize(3136, 12845056, 2))
    internvl = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 448, "width": 448}}
    assert read(tmp_path, **internvl, crop_to_patches=False).tiling is None
    assert read(tmp_path, **internvl, processor_class="InternVLProcessor").tiling == DynamicTiles(1, 12)
    (tmp_path / "preprocessor_config.json").unlink()
    joined = {"processor_class": "InternVLProcessor", "image_processor": internvl}
    (tmp_path / "processor_config.json").write_text(json.dumps(joined))
    assert read_image_processor(tmp_path, CONFIG).tiling == DynamicTiles(1, 12)


@pytest.mark.parametrize(
    "values",
    [
        {"size": EDGE, "crop_size": {"height": 24, "width": 24}, "image_grid_pinpoints": CANVASES},
        {"size": {"height": 20, "width": 30}, "image_grid_pinpoints": CANVASES},
        {"size": EDGE, "image_grid_pinpoints": [[20, 50]]},
        {"size": EDGE},
    ],
)
def test_grids_that_are_not_whole_tiles_are_refused(tmp_path, values):
    with pytest.raises(UserError, match="one square|whole tiles"):
        read(tmp_path, image_processor_type="LlavaNextImageProcessor", **values)


@pytest.mark.parametrize(
    "tiling", [AnyRes(((1, 2), (2, 2))), AnyRes(overview=False, rounded=False), DynamicTiles(2, 5), DynamicTiles(overview=False)]
)
@pytest.mark.parametrize("strategy", ["default", ""])
def test_tilings_are_written_and_read_back(tmp_path, tiling, strategy):
    processor = ImageProcessor(20, "squash", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), tiling=tiling)
    write_image_processor(processor, CONFIG, tmp_path, strategy)
    assert read_image_processor(tmp_path, CONFIG) == processor


def test_patches_of_any_number_are_not_written(tmp_path):
    with pytest.raises(UserError, match="SmartResize.*cannot be written"):
        write_image_processor(ImageProcessor(20, "squash", tiling=SmartResize()), CONFIG, tmp_path, "default")
