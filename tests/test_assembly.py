"""Models built from recipes, and what they become on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import assembly, tree
from mmjax.architecture import model_config
from mmjax.assembly import assemble
from mmjax.config import (
    Adapter,
    Connector,
    Model,
    Part,
    Recipe,
    Source,
    Stage,
    Tokenizer,
    from_config_dict,
    write_recipe,
)
from mmjax.config import Image as RecipeImage
from mmjax.data.messages import Sample, validated
from mmjax.errors import UserError
from mmjax.families import composed
from mmjax.model import Model as Whole
from mmjax.models import multimodal
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.tuning_config import MultitaskPromptConfig, PromptConfig
from tests.data.tokenizers import byte_tokenizer
from tests.models import tiny

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} and {b}?"},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
    }
    for a in range(4)
    for b in range(4)
]


def recipe(folder: Path, **model) -> Recipe:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    section = Model(
        llm=Part(config=LLAMA),
        vision=Part(config=CLIP),
        tokenizer=Tokenizer(kind="word", vocab_size=200),
        adapters={"default": Adapter(rank=2, alpha=4.0, targets=("llm/layers/attention/**",))},
    )
    stage = Stage(sources={"sums": Source(kind="messages", path=str(folder / "data.jsonl"))}, steps=1)
    return Recipe(model=dataclasses.replace(section, **model), stages={"one": stage}, run=("one",))


def randomised(model):
    """The model with every leaf drawn, zeros included."""
    rng = np.random.default_rng(0)
    drawn = {
        p: jax.device_put(leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32))
        for p, leaf in tree.flatten(model.params).items()
    }
    return dataclasses.replace(model, params=tree.unflatten(drawn))


def logits(model, ids, pixels) -> np.ndarray:
    return np.asarray(model({"input_ids": ids, "pixel_values": pixels})["logits"])


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return randomised(assemble(recipe(workdir), workdir)), workdir


@pytest.fixture(scope="module")
def exported(assembled, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    assembled[0].save_pretrained(directory)
    return directory


def question() -> list:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is 2 and 3?"}]}
    ]


def test_everything_is_there_and_nothing_more(assembled):
    model, workdir = assembled
    shapes = {path: leaf.shape for path, leaf in tree.flatten(multimodal.shapes(model.config)).items()}
    assert {path: leaf.shape for path, leaf in tree.flatten(model.params).items()} == shapes
    assert model.config.llm.vocab_size == len(model.tokenizer) < 100
    assert model.own == set(shapes) and not model.bases
    assert (workdir / "tokenizer" / "tokenizer.json").is_file()
    assert model.config.connector == ConnectorConfig("mlp", in_width=24, out_width=32, positions=4)


def test_the_same_recipe_gives_the_same_weights(assembled):
    _, workdir = assembled
    first, second = (tree.flatten(assemble(recipe(workdir), workdir).params) for _ in range(2))
    assert all(np.array_equal(first[path], second[path]) for path in first)
    other = tree.flatten(assemble(dataclasses.replace(recipe(workdir), seed=1), workdir).params)
    assert not np.array_equal(other["connector/layers_0/kernel"], first["connector/layers_0/kernel"])


def test_an_export_loads_in_transformers_with_its_processor(assembled, exported):
    torch = pytest.importorskip("torch")
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, _ = assembled
    theirs, report = LlavaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(exported, backend="pil")
    messages = question()
    picture = messages[0]["content"][0]["image"]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, messages[0]["content"][1]]}], add_generation_prompt=True
    )
    given = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    ours = mmjax.load(exported)
    example = ours.prompt(Sample("x", validated(messages)))
    placeholder = theirs.config.image_token_id
    assert given["input_ids"][0].tolist() == np.where(example.media >= 0, placeholder, example.ids).tolist()
    ids, pixels = given["input_ids"].numpy(), given["pixel_values"].numpy()
    assert np.abs(ours.image_processor.normalise(example.pixels).transpose(0, 3, 1, 2) - pixels).max() < 1e-6
    with torch.no_grad():
        reference = theirs.eval()(**given).logits.numpy()
    assert np.abs(logits(ours, ids, pixels) - reference).max() < 2e-4 * max(1, np.abs(reference).max())
    # The adapters of the assembled model are merged in what was written.
    vocab = model.config.llm.vocab_size
    assert (
        np.abs(logits_of(model, example)[..., :vocab] - reference[..., :vocab]).max() < 1e-3 * np.abs(reference).max()
    )


def logits_of(model, example) -> np.ndarray:
    from mmjax.data.collation import collate

    states = multimodal.hidden(model.params, model.config, collate([[example]]), model.run)
    return np.asarray(multimodal.head(model.params, model.config, states))


def test_chat_is_the_same_after_export(assembled, exported):
    model, _ = assembled
    answer = model.chat(question(), max_new_tokens=8)
    assert answer and mmjax.load(exported).chat(question(), max_new_tokens=8) == answer


def test_original_layout_and_back(exported, tmp_path):
    model = mmjax.load(exported)
    model.save_pretrained(tmp_path, layout="original")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["mm_projector_type"] == "mlp2x_gelu"
    back = mmjax.load(tmp_path)
    assert back.config == model.config
    theirs = tree.flatten(back.params)
    assert all(np.array_equal(theirs[path], leaf) for path, leaf in tree.flatten(model.params).items())


@pytest.mark.parametrize(
    "connector",
    [Connector(kind="pooled_mlp", pooled_tokens=3), Connector(kind="cross_self_perceiver", depth=2, latents=3, heads=4)],
    ids=["pooled_mlp", "perceiver"],
)
def test_what_no_published_layout_holds_has_one_of_its_own(connector, tmp_path):
    made = recipe(tmp_path, connector=connector, adapters={})
    model = assemble(made, tmp_path)
    with pytest.raises(UserError, match="two-layer MLP"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
    model.save_pretrained(tmp_path / "out")
    back = mmjax.load(tmp_path / "out")
    assert back.config == model.config
    theirs = tree.flatten(back.params)
    assert all(np.array_equal(theirs[path], leaf) for path, leaf in tree.flatten(model.params).items())
    sample = Sample("x", validated(question()))
    assert back.prompt(sample).ids.tolist() == model.prompt(sample).ids.tolist()


def test_parts_from_a_whole_models_directory(assembled, exported, tmp_path):
    model, workdir = assembled
    made = recipe(tmp_path, llm=Part(str(exported)), vision=Part(str(exported)), adapters={})
    parts = assemble(made, tmp_path)
    whole = tree.flatten(mmjax.load(exported).params)
    for path, leaf in tree.flatten(parts.params).items():
        assert path.startswith("connector/") != np.array_equal(np.asarray(leaf), np.asarray(whole[path])), path
    assert parts.own == {path for path in whole if path.startswith("connector/")}
    assert set(parts.bases) == {str(exported)}


def test_a_changed_base_has_another_fingerprint(exported, tmp_path):
    from mmjax.published import fingerprint

    before = fingerprint(exported)
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert fingerprint(tmp_path) == before
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    assert fingerprint(tmp_path) != before


def test_projector_only_files(exported, tmp_path):
    torch = pytest.importorskip("torch")
    kernels = tree.flatten(mmjax.load(exported).params)
    tensors = {}
    for name, path in (("0", "layers_0"), ("2", "layers_1")):
        tensors[f"model.mm_projector.{name}.weight"] = torch.tensor(
            np.asarray(kernels[f"connector/{path}/kernel"]).T.copy()
        )
        tensors[f"model.mm_projector.{name}.bias"] = torch.tensor(np.asarray(kernels[f"connector/{path}/bias"]).copy())
    torch.save(tensors, tmp_path / "mm_projector.bin")
    for place in (tmp_path, tmp_path / "mm_projector.bin", exported):
        model = assemble(recipe(tmp_path, connector=Connector(path=str(place))), tmp_path)
        for name in ("layers_0/kernel", "layers_1/bias"):
            assert np.array_equal(tree.flatten(model.params)[f"connector/{name}"], kernels[f"connector/{name}"])
    del tensors["model.mm_projector.2.bias"]
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="missing.*model.mm_projector.2.bias"):
        assemble(recipe(tmp_path, connector=Connector(path=str(tmp_path))), tmp_path)


def test_llava_lora_directories(exported, tmp_path):
    """LLaVA's LoRA layout: the language model and the tower elsewhere, the projector beside the adapter."""
    torch = pytest.importorskip("torch")
    model = mmjax.load(exported)
    flat = tree.flatten(model.params)
    original, adapter = tmp_path / "original", tmp_path / "adapter"
    model.save_pretrained(original, layout="original")
    adapter.mkdir()
    config = json.loads((original / "config.json").read_text())
    del config["vision_config"]
    (adapter / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(exported)}))
    projector = {}
    for name, path in (("0", "layers_0"), ("2", "layers_1")):
        prefix = f"base_model.model.model.mm_projector.{name}."
        projector[prefix + "weight"] = torch.tensor(np.asarray(flat[f"connector/{path}/kernel"]).T.copy())
        projector[prefix + "bias"] = torch.tensor(np.asarray(flat[f"connector/{path}/bias"]).copy())
    torch.save(projector, adapter / "non_lora_trainables.bin")
    drawn = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{s}.weight": torch.randn(shape)
        for i in (0, 1)
        for s, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    torch.save(drawn, adapter / "adapter_model.bin")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(exported), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    loaded = mmjax.load(adapter)
    assert loaded.config.adapters[0].targets == ("llm/layers/attention/query",)
    found = tree.flatten(loaded.params)
    assert all(np.array_equal(found[path], leaf) for path, leaf in flat.items())


def test_shapes_need_no_weights():
    from configs import llava15

    whole = model_config(from_config_dict(llava15.get_config()))
    assert whole.connector == ConnectorConfig("mlp", in_width=1024, out_width=4096, positions=576)
    assert whole.llm.layers == 32 and whole.vision.layers == 24


def test_a_workdir_without_a_checkpoint_is_what_its_recipe_assembles(assembled, tmp_path):
    made = recipe(tmp_path)
    write_recipe(made, tmp_path)
    loaded = tree.flatten(mmjax.load(tmp_path).params)
    again = tree.flatten(assemble(made, tmp_path).params)
    assert all(np.array_equal(loaded[path], leaf) for path, leaf in again.items())
    # The run is a base of the next one: its model, with adapters of the next recipe.
    onward = Recipe(model=Model(path=str(tmp_path), adapters={"more": Adapter(rank=2, targets=("llm/layers/mlp/**",))}))
    model = assemble(onward, tmp_path / "next")
    assert [a.name for a in model.config.adapters] == ["default", "more"]
    assert model.own and all("/adapters/more/" in path for path in model.own) and set(model.bases) == {str(tmp_path)}


def test_a_part_that_is_not_here_is_said(tmp_path):
    with pytest.raises(
        UserError, match="model.llm.path: some/llm is neither a directory nor in the local.*hf download some/llm"
    ):
        assemble(recipe(tmp_path, llm=Part("some/llm")), tmp_path)


def test_a_connector_may_read_what_the_encoder_makes_of_a_whole_picture(tmp_path):
    config = model_config(recipe(tmp_path, pooled=True))
    assert (config.connector.positions, config.connector.tokens) == (1, 1)
    model = assemble(recipe(tmp_path, pooled=True), tmp_path)
    picture = np.zeros((1, 28, 28, 3), np.uint8)
    assert multimodal.vision_features(model.params, config, picture, model.run).shape == (1, 1, 24)
    with pytest.raises(UserError, match="model.pooled: this encoder makes no one vector"):
        model_config(recipe(tmp_path, pooled=True, vision=Part(config={"model_type": "mobilenet_v2", "image_size": 64})))


def test_a_pooled_feature_is_exported_in_our_own_layout(tmp_path):
    model = assemble(recipe(tmp_path, pooled=True, adapters={}), tmp_path)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mmjax"
    assert mmjax.load(tmp_path / "out").config.features == model.config.features
    with pytest.raises(UserError, match="every position of one tile"):
        model.save_pretrained(tmp_path / "hf", layout="hf")


STITCHED = {
    "stitching": "area",
    "mask": "opening",
    "image": RecipeImage(aspect="squash", size=56, tiling="overlapping", most_tiles=4, overlap=14),
    "template": "moondream",
    "feature_layers": (-1,),
    "adapters": {},
}


def test_stitched_tiles_go_through_questions_exports_and_reading(tmp_path):
    """Two pictures of several shapes in two conversations, answered together and alone, by the model and by what was written of it."""
    model = randomised(assemble(recipe(tmp_path, **STITCHED), tmp_path))
    assert (model.config.connector.tokens, model.config.connector.in_width) == (16, 48)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)) for size in ((80, 120), (30, 40))]
    talks = [[{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": "What is it?"}]}] for p in pictures]
    examples = [model.prompt(Sample("x", validated(talk))) for talk in talks]
    assert [example.grids for example in examples] == [((1, 2),), ((1, 1),)] and examples[0].pixels.shape == (3, 56, 56, 3)
    together = model.answers(talks, 6)
    assert together == [model.chat(talk, 6) for talk in talks] and together[0] != together[1]
    model.save_pretrained(tmp_path / "out")
    again = mmjax.load(tmp_path / "out", template="moondream")
    assert again.config.features == model.config.features and again.image_processor.tiling == model.image_processor.tiling
    assert again.answers(talks, 6) == together


def test_a_prompt_begins_as_the_embeddings_of_its_text():
    """Repeated until it is long enough; other prompts begin as they were drawn."""
    tuned = PromptConfig("told", 5, text="ab"), MultitaskPromptConfig("cut", 2, text="abc"), PromptConfig("drawn", 2)
    config = dataclasses.replace(tiny.model_config(1, adapters=tuned), vision=None, connector=None)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.language, vocab_size=300, embed_scale=2.0))
    params, tokenizer = tiny.random_params(config), byte_tokenizer()
    model = Whole(config, params, composed.FAMILY, {}, tokenizer=tokenizer)
    prompts = assembly._with_texts_begun(model, None).params["llm"]["prompts"]
    a, b = tokenizer("ab")["input_ids"]
    table = params["llm"]["embed"]["embedding"]
    np.testing.assert_array_equal(prompts["told"]["vectors"], 2 * table[[a, b, a, b, a]])
    np.testing.assert_array_equal(prompts["cut"]["vectors"], 2 * table[[a, b]])
    np.testing.assert_array_equal(prompts["drawn"]["vectors"], params["llm"]["prompts"]["drawn"]["vectors"])
    with pytest.raises(UserError, match="told.text cannot be read: the model has no tokenizer"):
        assembly._with_texts_begun(dataclasses.replace(model, tokenizer=None), None)
