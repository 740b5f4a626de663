"""Pictures in several tiles through a whole recipe: assembled, batched, asked, exported."""

import dataclasses

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.assembly import assemble
from mmjax.config import Connector, Image, Loader, Source, from_config_dict
from mmjax.data import sources
from mmjax.data.collation import collate
from mmjax.data.messages import Sample, question
from mmjax.data.pipeline import Pipeline
from mmjax.data.tiling import AnyRes, DynamicTiles
from mmjax.errors import UserError
from mmjax.inference.answering import answer
from mmjax.models import multimodal
from tests.configs import expand


@pytest.fixture(scope="module")
def recipe():
    return from_config_dict(expand.config("llava_next", "tiny"))


@pytest.fixture(scope="module")
def model(recipe, tmp_path_factory):
    return moved(assemble(recipe, tmp_path_factory.mktemp("work")))


def moved(model):
    """Every parameter drawn anew, so that none is at a value that hides a mistake."""
    flat = tree.flatten(model.params)
    rng = np.random.default_rng(0)
    drawn = {path: jax.numpy.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype) for path, leaf in flat.items()}
    run = dataclasses.replace(model.run, dtype="float32")
    params = tree.unflatten({path: leaf.astype("float32") for path, leaf in drawn.items()})
    return dataclasses.replace(model, params=params, run=run)


def scenes(count=6):
    dataset = sources.open(Source(kind="digits", options={"canvas": "any", "size": count}))
    return dataset, [dataset[i] for i in range(count)]


def shown(sample, dataset):
    turns = question(sample.messages)
    parts = [{"type": "image", "image": dataset.image(p["path"])} if "path" in p else p for p in turns[0]["content"]]
    return [{**turns[0], "content": parts}]


def test_the_recipe_says_how_pictures_are_cut(model):
    assert model.image_processor.tiling == AnyRes() and model.image_processor.aspect == "squash"
    assert model.params["connector"]["newline"].shape == (model.config.language.input_width,)


def test_a_batch_packs_tiles_and_the_model_reads_each_picture_as_if_alone(recipe, model):
    stage = dataclasses.replace(recipe.stages["finetune"], rows=2, steps=2, tiles=6)
    dataset, _ = scenes()
    pipeline = Pipeline(stage, {"mixture": dataset}, model.encoder(stage.length), model.image_processor, seed=0, loader=Loader())
    sizes = {(32, 32): 3, (32, 64): 3, (64, 32): 3}
    batch, info = next(pipeline.batches())
    assert info.tiles == 3 * info.images and batch.tiles.sum() == info.tiles and batch.images.shape[1] == 12
    packed = np.asarray(multimodal.hidden(model.params, model.config, batch, model.run))
    compared = 0
    for row, ids in enumerate(info.ids):
        for segment, id in enumerate(ids, 1):
            sample = next(s for s in map(dataset.__getitem__, range(6)) if s.id == id)
            alone = model.prompt(Sample(id, shown(sample, dataset)))
            assert alone.tiles == (sizes[dataset.picture_size(sample.messages[0]["content"][0]["path"])],)
            here = np.flatnonzero(batch.segments[row] == segment)[: len(alone.ids)]
            expected = multimodal.hidden(model.params, model.config, collate([[alone]]), model.run)[0]
            np.testing.assert_allclose(packed[row][here], expected, atol=2e-4)
            compared += 1
    assert compared == info.samples > 1


def test_answers_in_a_batch_are_those_alone(model):
    dataset, samples = scenes(4)
    together = [text for _, text in answer(model, samples, dataset.image, batch=4, max_new_tokens=6)]
    alone = [model.chat(shown(sample, dataset), max_new_tokens=6) for sample in samples]
    assert together == alone and len(set(together)) > 1


def test_the_export_is_a_llava_next_that_transformers_reads_from_messages_alike(model, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model.save_pretrained(tmp_path)
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor).__name__ == "LlavaNextProcessor"
    ours, (dataset, samples) = mmjax.load(tmp_path), scenes(3)
    for sample in samples:
        messages = shown(sample, dataset)
        picture = messages[0]["content"][0]["image"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        given = processor(images=[picture], text=text, return_tensors="np", add_special_tokens=False)
        given = {name: np.asarray(value) for name, value in given.items()}
        example = ours.prompt(Sample("x", messages))
        placeholder = ours.foreign["image_token_index"]
        assert given["input_ids"][0].tolist() == np.where(example.media != -1, placeholder, example.ids).tolist()
        np.testing.assert_allclose(
            given["pixel_values"][0].transpose(0, 2, 3, 1), ours.image_processor.normalise(example.pixels), atol=1e-5
        )
        with torch.no_grad():
            expected = theirs(**{name: torch.tensor(value) for name, value in given.items()}).logits.numpy()
        assert np.abs(np.asarray(ours(given)["logits"]) - expected).max() < 5e-4


def test_what_no_published_layout_holds_goes_out_in_ours_and_comes_back(recipe, tmp_path):
    """Two scales, dynamic tiles without an overview."""
    section = dataclasses.replace(
        recipe.model,
        image=Image(tiling="dynamic", most_tiles=4, overview=False),
        connector=Connector(kind="mlp2x_gelu", merge="spatial"),
        scales=(1, 2),
    )
    model = moved(assemble(dataclasses.replace(recipe, model=section), tmp_path / "work"))
    assert model.config.picture_size == model.image_processor.height == 2 * model.config.encoder.image_size
    assert model.image_processor.tiling == DynamicTiles(1, 4, overview=False)
    model.save_pretrained(tmp_path / "out")
    again = mmjax.load(tmp_path / "out")
    assert again.family.model_types == ("mmjax",) and again.config == model.config
    assert again.image_processor == model.image_processor
    dataset, samples = scenes(3)
    for sample in samples:
        assert again.chat(shown(sample, dataset), max_new_tokens=4) == model.chat(shown(sample, dataset), max_new_tokens=4)
    with pytest.raises(UserError, match="llava_next: it puts the tokens .* not 'spatial'"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
