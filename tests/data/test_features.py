"""Cached features equal those that the model makes of the pixels themselves, and are made once."""

import dataclasses
import json
import os
import pickle
import sys

import jax
import numpy as np
import pytest

from mmjax.batch import Batch
from mmjax.config import Loader, Source, Stage
from mmjax.config import Mesh as MeshSizes
from mmjax.data import features, sources, templates
from mmjax.data.encoding import Encoder
from mmjax.data.images import BrokenImage, ImageProcessor
from mmjax.data.messages import Sample
from mmjax.data.pipeline import Pipeline
from mmjax.data.tiling import DynamicTiles
from mmjax.errors import UserError
from mmjax.models import connectors, multimodal
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, ViTConfig
from mmjax.parallel.mesh import make_mesh
from tests.data.pictures import encoded, gradient, write_tar
from tests.data.tokenizers import byte_tokenizer

BLOCK = BlockConfig(8, 2, 2, 4, 16, "gelu", "layer", 1e-5, False, True, True, True)
TOWER = ViTConfig(8, 4, 1, BLOCK)
CONFIG = ModelConfig(
    vision=TOWER, connector=ConnectorConfig("linear", 8, 6, 4), image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4)
)
PROCESSOR = ImageProcessor(8, "squash")
PICTURES = 7


@pytest.fixture
def source(tmp_path):
    """Seven pictures, of which the third cannot be read, with two captions each."""
    files = {f"{i}.png": encoded(gradient(10 + i, 9)) for i in range(PICTURES)} | {"2.png": b"no picture"}
    write_tar(tmp_path / "pictures.tar", files)
    rows = [{"id": f"p{i}", "image": f"{i}.png", "captions": ["a", "b"]} for i in range(PICTURES)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Source(kind="captions", path=str(tmp_path / "captions.jsonl"), images=str(tmp_path / "pictures.tar"))


@pytest.fixture(scope="module")
def params():
    return multimodal.init(jax.random.key(0), CONFIG)


def make(folder, source, params, config=CONFIG, flip=True, devices=2, **more):
    mesh = make_mesh(MeshSizes(), jax.devices()[:devices])
    dataset = sources.open(source)
    settings = {"flip": flip, "mesh": mesh, "batch": 2, **more}
    return features.cached(
        folder / "features", config, params, {"all": source}, {"all": dataset}, PROCESSOR, **settings
    )


@pytest.mark.parametrize("kind", ["linear", "pooled_mlp"])
def test_features_and_what_the_connector_makes_of_them(tmp_path, source, params, kind):
    config = dataclasses.replace(CONFIG, connector=ConnectorConfig(kind, 8, 6, 4, depth=1, pooled_tokens=2))
    params = {**params, "connector": connectors.init(jax.random.key(1), config.connector)}
    found, dataset = make(tmp_path, source, params, config), sources.open(source)
    assert found.shape == ((4, 8) if kind == "linear" else (1, 8))
    for name in ("0.png", "6.png"):
        for flipped in (False, True):
            pixels = PROCESSOR.pixels(dataset.image(name))[:, :: -1 if flipped else 1]
            kept = found.lookup("all", name, flipped)
            assert kept.dtype == np.float16 and kept.shape == (1, *found.shape)
            direct = multimodal.encode_media(params, config, Batch(images=pixels[None, None]), Execution())
            cached = multimodal.encode_media(params, config, Batch(features=kept[None]), Execution())
            np.testing.assert_allclose(cached, direct, atol=5e-3)
    assert not np.allclose(found.lookup("all", "0.png"), found.lookup("all", "0.png", True))
    with pytest.raises(BrokenImage, match="2.png"):
        found.lookup("all", "2.png")


def test_made_once_and_again_when_something_changes(tmp_path, source, params, monkeypatch):
    def files():
        return sorted((tmp_path / "features").glob("*.npy"))

    make(tmp_path, source, params)
    first = files()
    assert [path.suffix for path in sorted((tmp_path / "features").iterdir())] == [".json", ".npy"]

    def refuse(*arguments):
        raise AssertionError("made again")

    with monkeypatch.context() as patched:
        patched.setattr(features, "_fill", refuse)
        assert make(tmp_path, source, params, devices=1).lookup("all", "0.png").shape == (1, 4, 8)
        for changed in (
            lambda: make(tmp_path, source, params, flip=False),
            lambda: make(tmp_path, source, {"vision": jax.tree.map(lambda leaf: leaf + 1, params["vision"])}),
            lambda: make(tmp_path, source, params, dataclasses.replace(CONFIG, image_std=(1.0, 1.0, 1.0))),
            lambda: make(tmp_path, dataclasses.replace(source, limit=2), params),
        ):
            with pytest.raises(AssertionError, match="made again"):
                changed()
        os.utime(source.images, ns=(0, 0))
        with pytest.raises(AssertionError, match="made again"):
            make(tmp_path, source, params)
    assert files() == first


def test_goes_on_where_it_was_stopped(tmp_path, source, params, monkeypatch):
    monkeypatch.setattr(features, "FLUSH", 1)
    whole = make(tmp_path / "whole", source, params, devices=1)
    encode, calls = features._encode, []

    def stopped(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments, **settings)

    monkeypatch.setattr(features, "_encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, source, params, devices=1)
    made = make(tmp_path, source, params, devices=1)
    assert len(calls) == 4 + 2  # four batches in all; two were on disk when it was stopped
    for i in (0, 1, 3, 4, 5, 6):
        np.testing.assert_array_equal(made.lookup("all", f"{i}.png"), whole.lookup("all", f"{i}.png"))


def test_the_pipeline_feeds_them(tmp_path, source, params):
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, templates.get("plain", tokenizer), tokens_per_image=4)
    stage = Stage(
        sources={"all": source},
        steps=8,
        rows=2,
        length=16,
        tiles=1,
        packing=False,
        cache_features=True,
        augment=("flip",),
    )
    found = pickle.loads(pickle.dumps(make(tmp_path, source, params)))  # as it goes to a worker process
    dataset = sources.open(source)
    pipeline = Pipeline(
        stage, {"all": dataset}, encoder, PROCESSOR, seed=0, loader=Loader(max_broken=0.5), features=found
    )
    seen = set()
    for batch, info in pipeline.batches():
        assert batch.images is None and batch.features.shape == (1, 2, 4, 8) and batch.features.dtype == np.float16
        tile = 0
        for row in info.ids:
            for id in row:
                views = [found.lookup("all", f"{id[1]}.png", flipped)[0] for flipped in (False, True)]
                seen |= {which for which, view in enumerate(views) if np.array_equal(view, batch.features[0, tile])}
                tile += 1
        assert tile == batch.tiles.sum()
    assert seen == {0, 1} and {item.id[:2] for item in pipeline.skipped} == {"p2"}


def test_pictures_without_a_name_are_refused(tmp_path, source, params, monkeypatch):
    """A sample may carry the picture itself; there is nothing to look its features up by."""
    turns = [{"role": "user", "content": [{"type": "image", "image": gradient(8, 8)}]}]
    monkeypatch.setattr(sources.Captions, "__getitem__", lambda self, index: Sample("inline", turns))
    with pytest.raises(UserError, match="drawn"):
        make(tmp_path, source, params)


def test_pictures_in_tiles_have_a_row_for_each(tmp_path, source, params, monkeypatch):
    """Also where a picture's tiles are spread over batches, and mirrored before they are cut."""
    cutting = dataclasses.replace(PROCESSOR, tiling=DynamicTiles(2, 4))
    monkeypatch.setattr(sys.modules[__name__], "PROCESSOR", cutting)
    found, dataset = make(tmp_path, source, params, devices=1, batch=4), sources.open(source)
    for name in ("0.png", "1.png", "6.png"):
        for flipped in (False, True):
            tiles = cutting.tiles(dataset.image(name), flipped)
            kept = found.lookup("all", name, flipped)
            assert len(tiles) == cutting.count(*dataset.picture_size(name)) > 2 and kept.shape == (len(tiles), *found.shape)
            direct = multimodal.vision_features(params, CONFIG, tiles, Execution())
            np.testing.assert_allclose(kept, direct, atol=5e-3)
    with pytest.raises(BrokenImage, match="2.png"):
        found.lookup("all", "2.png")
