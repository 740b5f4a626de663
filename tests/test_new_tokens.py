"""New tokens from the recipe to the export: added, trained alone, kept over restarts and stages, written for transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import assembly, config, tree
from mmjax.checkpoints.store import open_workdir
from mmjax.data.messages import Sample, validated
from mmjax.errors import UserError
from mmjax.export import save_adapters, without_adapters
from mmjax.jobs import export, plan, train
from mmjax.models import adapters, new_rows
from mmjax.models.tuning_config import LoraConfig
from tests import small_workdir
from tests.data.tokenizers import byte_tokenizer

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

TOKENS = ("<unit 0>", "<im_start>", "<state>", "<|im_end|>")  # the second and the last are tokens already
SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


def llama(directory, tied: bool, padding: int = 0, layers: int = 2):
    """transformers' Llama, written with a tokenizer of 263 tokens; its vocabulary has `padding` rows more."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    built = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + padding, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=1,
            eos_token_id=2, num_hidden_layers=layers, **SIZES,
        )
    ).eval()  # fmt: skip
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.2)
    built.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return built


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """(directory, transformers' model)"""
    directory = tmp_path_factory.mktemp("llama")
    return directory, llama(directory, request.param)


def drawn(model):
    """The model with noise on its new rows."""
    flat = {
        path: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape) if path in new_rows.LEAVES else leaf
        for path, leaf in tree.flatten(model.params).items()
    }
    return dataclasses.replace(model, params=tree.unflatten(flat))


def theirs(directory, ids):
    built, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return built.state_dict(), built.eval()(torch.tensor(ids)).logits.numpy()


def test_added_tokens_begin_as_the_mean_like_a_resized_model_of_transformers(base):
    directory, before = base
    model = mmjax.load(directory).add_tokens(TOKENS)
    n = len(byte_tokenizer())
    assert model.tokenizer.convert_tokens_to_ids(list(TOKENS)) == [n, 5, n + 1, 4]
    assert model.config.llm.new_rows == (4, 5, n, n + 1) and model.config.llm.vocab_size == n + 2
    assert model.tokenizer("a<state>b")["input_ids"][1] == n + 1
    grown = LlamaForCausalLM.from_pretrained(directory)
    grown.resize_token_embeddings(n + 2, mean_resizing=False)
    with torch.no_grad():
        for old, new in ((before.get_input_embeddings(), grown.get_input_embeddings()), (before.lm_head, grown.lm_head)):
            new.weight[n:] = old.weight.mean(0)
        ids = [[1, n, 60, n + 1, 5, 61]]
        wanted = grown.eval()(torch.tensor(ids)).logits.numpy()
    assert np.abs(np.asarray(model({"input_ids": ids})["logits"]) - wanted).max() < 1e-4
    with pytest.raises(UserError, match="outside the vocabulary of 265"):
        model({"input_ids": [[1, n + 2]]})


def test_an_export_holds_the_rows_bit_for_bit(base, tmp_path):
    directory, before = base
    model = drawn(mmjax.load(directory).add_tokens(TOKENS))
    ids = [[1, 263, 60, 264, 5, 61]]
    for name, changed in (("plain", model), ("adapted", adapted(model))):
        changed.save_pretrained(tmp_path / name)
        state, logits = theirs(tmp_path / name, ids)
        assert np.abs(np.asarray(changed({"input_ids": ids})["logits"]) - logits).max() < 2e-4
        for table, leaf in (("model.embed_tokens", "embed"), ("lm_head", "head")):
            leaf = "embed" if model.config.llm.tied_head else leaf
            found = state[f"{table}.weight"].numpy()
            wanted = np.zeros_like(found)
            wanted[:263] = (before.get_input_embeddings() if leaf == "embed" else before.lm_head).weight.detach().numpy()
            wanted[[4, 5, 263, 264]] = model.params["llm"][leaf]["new_rows"]
            np.testing.assert_array_equal(found, wanted)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer("a<state><unit 0>")["input_ids"][-2:] == [264, 263]
    again = mmjax.load(tmp_path / "plain")
    assert again.config.llm.new_rows == () and again.config.llm.vocab_size == 265
    assert again.add_tokens(TOKENS[:2]).config.llm.new_rows == (5, 263)


def adapted(model):
    """The model with an adapter that changes something."""
    shapes = dataclasses.replace(model.config, adapters=(LoraConfig("tune", 2, 4.0, ("llm/layers/**",)),))
    flat = tree.flatten(adapters.add(jax.random.key(0), model.params, shapes))
    flat = {path: leaf + 0.1 if path.endswith("lora_b") else leaf for path, leaf in flat.items()}
    return dataclasses.replace(model, config=shapes, params=tree.unflatten(flat))


def test_an_adapter_alone_cannot_hold_them(base, tmp_path):
    model = adapted(drawn(mmjax.load(base[0]).add_tokens(TOKENS)))
    with pytest.raises(UserError, match="4 new rows of the vocabulary are no part of an adapter"):
        save_adapters(model, tmp_path)
    without_adapters(model).save_pretrained(tmp_path / "base")
    save_adapters(model, tmp_path, base="base")
    ids = [[1, 263, 60, 264, 5, 61]]
    again = mmjax.load(tmp_path)({"input_ids": ids})["logits"]
    assert np.abs(np.asarray(model({"input_ids": ids})["logits"]) - np.asarray(again)).max() < 1e-4


def test_rows_inside_a_padded_vocabulary(tmp_path):
    llama(tmp_path, tied=False, padding=20)
    model = mmjax.load(tmp_path).add_tokens(("<a>", "<b>"))
    assert model.config.llm.new_rows == (263, 264) and model.config.llm.vocab_size == 283 and not model.config.llm.beyond
    kernel = np.asarray(model.params["llm"]["head"]["kernel"])
    np.testing.assert_allclose(model.params["llm"]["head"]["new_rows"], np.tile(kernel.mean(1), (2, 1)), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_token_is_generated_and_shown(tmp_path, tied):
    llama(tmp_path, tied, layers=1)
    model = mmjax.load(tmp_path).add_tokens(["<state>"])
    ids = [[1, 60, 61, 62]]
    state = np.asarray(model({"input_ids": ids})["last_hidden_state"])[0, -1]
    side = "embed" if tied else "head"
    params = tree.merge(model.params, {"llm": {side: {"new_rows": 50 * state[None] / (state @ state)}}})
    model = dataclasses.replace(model, params=params)
    new = model.generate({"input_ids": ids}, max_new_tokens=4, ignore_eos=True)
    assert new[0, 0] == 263 and model.tokenizer.decode(new[0, :1], skip_special_tokens=True) == "<state>"


def test_the_vocabulary_is_resized(base):
    model = drawn(mmjax.load(base[0]).add_tokens(["<state>"]))
    wider = model.resize_vocabulary(320)
    assert wider.config.llm.vocab_size == 320 and not wider.config.llm.new_rows
    table = np.asarray(wider.params["llm"]["embed"]["embedding"])
    np.testing.assert_array_equal(table[263], model.params["llm"]["embed"]["new_rows"][0])
    np.testing.assert_allclose(table[264:], np.tile(table[:263].mean(0), (56, 1)), atol=1e-6)
    with pytest.raises(UserError, match="has 320 tokens; it cannot become smaller"):
        wider.resize_vocabulary(100)


def test_delimiters_of_a_fresh_model(tmp_path):
    """New tokens around each image, for a language model and a tokenizer that the recipe itself makes."""
    section = dataclasses.replace(
        small_workdir.RECIPE.model, new_tokens=("<im_start>", "<im_end>"), image_start="<im_start>", image_end="<im_end>"
    )
    recipe = dataclasses.replace(small_workdir.RECIPE, model=section)
    model = drawn(assembly.assemble(recipe, tmp_path))
    size = len(model.tokenizer)
    assert model.config.llm.new_rows == (size - 2, size - 1) and model.config.llm.vocab_size == size
    assert set(new_rows.LEAVES[:2]) <= model.own == set(tree.flatten(model.params))
    picture = {"type": "image", "image": np.zeros((8, 8, 3), np.uint8)}
    sample = Sample("x", validated([{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}]))
    example = model.encoder().encode(sample, generation_prompt=True)
    before, after = np.flatnonzero(example.media >= 0)[[0, -1]] + [-1, 1]
    assert example.ids[[before, after]].tolist() == [size - 2, size - 1]
    model.save_pretrained(tmp_path / "export")
    again = mmjax.load(tmp_path / "export")
    assert again.encoder().encode(sample, generation_prompt=True).ids.tolist() == example.ids.tolist()
    assert again.config.llm.vocab_size >= size and not again.config.llm.new_rows


ROWS = [{"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"<state>{a}<unit 0>"}]} for a in range(8)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(recipe, workdir) of a run whose first stage trains the new rows alone, and whose second trains an adapter."""
    directory, workdir = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    llama(directory, tied=False)
    (workdir / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    stage = config.Stage(
        trainable=("llm/**/new_rows",),
        sources={"talk": config.Source(kind="messages", path=str(workdir / "data.jsonl"))},
        steps=2, rows=8, length=32, tiles=0, optimizer=config.Optimizer(learning_rate=1e-2, warmup_ratio=0.0),
    )  # fmt: skip
    recipe = config.Recipe(
        model=config.Model(
            llm=config.Part(path=str(directory)),
            new_tokens=TOKENS[:3],
            template="plain",
            adapters={"tune": config.Adapter(rank=2, targets=("llm/layers/mlp/up",))},
        ),
        stages={"rows": stage, "tune": dataclasses.replace(stage, trainable=("llm/**/lora_*",))},
        run=("rows", "tune"),
        logging=config.Logging(every=1, tensorboard=False),
    )
    train.run(dataclasses.replace(recipe, run=("rows",)), workdir)
    return recipe, workdir


def test_a_stage_trains_the_rows_alone(run):
    recipe, workdir = run
    start, end = (tree.flatten(m.params) for m in (assembly.assemble(recipe, workdir), mmjax.load(workdir)))
    rows = {"llm/embed/new_rows", "llm/head/new_rows"}
    assert {path for path in start if not np.array_equal(start[path], end[path])} == rows
    _, checkpoint = open_workdir(workdir)
    assert {name for name in checkpoint.manifest["leaves"] if name.startswith("trained/")} == {f"trained/{p}" for p in rows}
    moments = [shape for _, shape, _ in checkpoint.manifest["optimizer"] if shape]
    assert moments == [[3, 32]] * 4  # two of Adam for each
    assert end["llm/embed/new_rows"].shape == (3, 32) and end["llm/embed/embedding"].shape == (263, 32)


def test_rows_outlive_later_stages_and_restarts(run):
    recipe, workdir = run
    before = tree.flatten(mmjax.load(workdir).params)
    train.run(recipe, workdir)
    model = mmjax.load(workdir)
    after = tree.flatten(model.params)
    for path, leaf in before.items():
        assert path.endswith(("lora_a", "lora_b")) or np.array_equal(leaf, after[path]), path
    assert model.tokenizer.convert_tokens_to_ids("<state>") == 264
    alone = config.Export(str(workdir / "peft"), format="peft")
    adapter = export.export(model, dataclasses.replace(recipe, export=alone), workdir)
    state, _ = theirs(adapter / "base", [[1, 263, 60, 264]])
    np.testing.assert_array_equal(state["lm_head.weight"][[5, 263, 264]], after["llm/head/new_rows"])
    # Another recipe goes on from the run, with a token more.
    onward = config.Recipe(model=config.Model(path=str(workdir), new_tokens=("<more>", "<state>"), template="plain"))
    grown = assembly.assemble(onward, workdir / "next")
    assert grown.config.llm.new_rows == (5, 263, 264, 265)
    assert grown.own == {path for path in tree.flatten(grown.params) if path.endswith("new_rows")}
    rows = np.asarray(tree.flatten(grown.params)["llm/embed/new_rows"])
    np.testing.assert_array_equal(rows[:3], after["llm/embed/new_rows"])


def test_a_plan_counts_the_rows(run, tmp_path, capsys):
    recipe, _ = run
    plan.run(recipe, tmp_path)
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["trainable_rows"] == 2 * 3 * 32 and "rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "section, named",
    [
        (config.Model(llm=config.Part(path="x"), new_tokens=("a", "a")), "'a' is empty or stands there twice"),
        (config.Model(llm=config.Part(path="x"), new_tokens=("",)), "'' is empty"),
        (config.Model(vision=config.Part(path="x"), new_tokens=("a",)), "no language model"),
    ],
)
def test_new_tokens_that_cannot_be_meant(section, named):
    with pytest.raises(UserError, match=named):
        config.from_config_dict(config.to_config_dict(config.Recipe(model=section)))


def test_a_tokenizer_with_more_tokens_than_embeddings(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base[0])
    tokenizer.add_tokens(["<more>", "<state>"])
    tokenizer.save_pretrained(tmp_path)
    section = config.Model(llm=config.Part(path=str(base[0])), tokenizer=config.Tokenizer(path=str(tmp_path)), template="plain")
    with pytest.raises(UserError, match="rows of their own .*: '<more>', '<state>'"):
        assembly.assemble(config.Recipe(model=section), tmp_path)
    both = dataclasses.replace(section, new_tokens=("<state>", "<more>"))
    assert assembly.assemble(config.Recipe(model=both), tmp_path).config.llm.new_rows == (263, 264)
