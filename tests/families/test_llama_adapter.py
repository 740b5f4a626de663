"""LLaMA-Adapter's and RobustGER's own layouts: files both ways, parts published elsewhere, adapters over other models written to them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.export import save_adapters
from mmjax.families import llama, robust_ger
from mmjax.families.llama_adapter import BIASED
from mmjax.model import Model
from mmjax.models import adaption_prompt, multimodal
from mmjax.models.tuning_config import AdaptionPromptConfig, AffineConfig, LoraConfig, NoisePromptConfig, NormConfig

torch = pytest.importorskip("torch")

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = np.random.default_rng(0).integers(0, 64, (2, 6))


def drawn(config, seed=0):
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in tree.flatten(multimodal.shapes(config)).items():
        flat[path] = jax.numpy.asarray(path.endswith("scale") + rng.normal(size=leaf.shape) * 0.2, "float32")
    return tree.unflatten(flat)


def over_llama(*adapters) -> Model:
    """A Llama in transformers' layout with drawn adapters."""
    config = dataclasses.replace(llama.FAMILY.read_config(TEXT, "here"), adapters=adapters)
    return Model(config, drawn(config), llama.FAMILY, TEXT)


CASES = {
    "llama_adapter_v1": (AdaptionPromptConfig("prompts", 3, 2),),
    "llama_adapter_v2": (
        AffineConfig("affine", ("llm/layers/**",), "input"),
        NormConfig("norms", ("llm/layers/*_norm",)),
        AdaptionPromptConfig("prompts", 3, 2, gate_scale=False),
    ),
    "robust_ger": (NoisePromptConfig("prompts", 3, 2, channels=6),),
}


@pytest.mark.parametrize("layout", CASES)
def test_a_llama_with_prompts_is_written_and_read(layout, tmp_path):
    """Grouped keys, an MLP of a width of its own, other rows of queries and keys; tuned norms are merged, prompts are not."""
    ours = over_llama(*CASES[layout])
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == layout
    again = mmjax.load(tmp_path)
    given = {("idx" if layout == "robust_ger" else "tokens"): IDS}
    np.testing.assert_allclose(again(given)["logits"], ours({"input_ids": IDS})["logits"], rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama_adapter_v1/train_tanh_gate", "llama_adapter_v2/multimodal_finetune_bias", "robust_ger/llama_start_layer1"])
def test_recorded_files_come_out_as_they_went_in(goldens, name, tmp_path):
    mmjax.load(goldens / name).save_pretrained(tmp_path)
    before, after = (mmjax.checkpoints.safetensors.read(folder / "model.safetensors") for folder in (goldens / name, tmp_path))
    unused = {n for n in before if n.endswith("attention.gate")} - set(after)  # of layers without prompts
    assert before.keys() - unused == after.keys()
    for tensor in after:
        np.testing.assert_array_equal(after[tensor].read(), before[tensor].read())


def test_an_adapters_file_over_models_published_elsewhere(goldens, tmp_path):
    """As the authors publish it: a .pth with the adapter alone, below `model`, beside settings."""
    case = goldens / "llama_adapter_v2" / "multimodal_finetune_bias"
    whole, stored = mmjax.load(case), mmjax.checkpoints.safetensors.read(case / "model.safetensors")
    base = dataclasses.replace(whole.config, adapters=(), vision=None, connector=None)
    text = llama.FAMILY.write_config(base, {})
    leaves = {p: a for p, a in tree.flatten(whole.params["llm"]).items() if "/adapters/" not in p and not p.startswith("plugs/")}
    Model(base, {"llm": tree.unflatten(leaves)}, llama.FAMILY, text).save_pretrained(tmp_path / "llama")
    frozen = ("attention.wq.weight", "attention.wk.weight", "wv.weight", "wo.weight", "w1.weight", "w2.weight", "w3.weight", "output.weight")
    own = {n: torch.tensor(t.read()) for n, t in stored.items() if not n.endswith((*frozen, "tok_embeddings.weight"))}
    (tmp_path / "adapter").mkdir()
    torch.save({"model": own, "config": {"w_bias": True, "w_lora": False}}, tmp_path / "adapter" / "7fa5_BIAS-7B.pth")
    config = {**json.loads((case / "config.json").read_text()), "llama_path": "../llama"}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    inputs = {name: value for name, value in np.load(case / "inputs.npz").items() if name != "labels"}
    np.testing.assert_allclose(mmjax.load(tmp_path / "adapter")(inputs)["logits"], whole(inputs)["logits"], rtol=1e-5, atol=1e-5)


def test_lora_without_alpha_and_a_gates_factor_are_turned_with_their_rows(goldens, tmp_path):
    """V2's multimodal model with everything that may be in it: what is written and read again is the same."""
    model = mmjax.load(goldens / "llama_adapter_v2" / "multimodal_finetune_bias")
    prompts = dataclasses.replace(model.config.adapters[-1], gate_scale=True)
    lora = LoraConfig("lora", 3, 3.0, ("llm/layers/**",))
    config = dataclasses.replace(model.config, adapters=(AffineConfig("affine", BIASED, "bias"), lora, prompts))
    model = dataclasses.replace(model, config=config, params=drawn(config))
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    inputs = {"tokens": rng.integers(0, 120, (2, 5)), "imgs": rng.normal(size=(2, 3, 28, 28)).astype(np.float32)}
    again = mmjax.load(tmp_path)
    assert [type(a) for a in again.config.adapters] == [AffineConfig, LoraConfig, AdaptionPromptConfig]
    np.testing.assert_allclose(again(inputs)["logits"], model(inputs)["logits"], rtol=1e-5, atol=1e-5)
    prompt = {**inputs, "tokens": inputs["tokens"][:, :3]}
    assert again.generate(prompt, max_new_tokens=2, ignore_eos=True).shape == (2, 2)


def test_robust_ger_around_falcon(tmp_path):
    """One key for all heads, one norm in front of both sublayers, layer norms, a plain MLP, half of each head turned."""
    config = {
        "model_type": "robust_ger", "vocab_size": 60, "padded_vocab_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_query_groups": 1,
        "rotary_percentage": 0.5, "parallel_residual": True, "shared_attention_norm": True, "bias": False, "_norm_class": "LayerNorm",
        "_mlp_class": "GptNeoxMLP", "adapter_prompt_length": 3, "adapter_start_layer": 0, "n_state": 6,
    }  # fmt: skip
    shape = robust_ger.FAMILY.read_config(config, "here")
    model = Model(shape, drawn(shape), robust_ger.FAMILY, config)
    model.save_pretrained(tmp_path)
    stored = mmjax.checkpoints.safetensors.read(tmp_path / "model.safetensors")
    assert stored["transformer.h.1.attn.attn.weight"].shape == (48, 32) and "transformer.h.0.norm_2.weight" not in stored
    assert stored["transformer.h.0.attn.key_gating_factor"].shape == (1, 4, 3, 8) and "transformer.h.0.mlp.fc.weight" in stored
    inputs = {"idx": IDS % 60, "emb_diff": np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)}
    np.testing.assert_allclose(mmjax.load(tmp_path)(inputs)["logits"], model(inputs)["logits"], rtol=1e-5, atol=1e-5)


def test_a_single_prompt_is_read_without_the_gates_factor():
    """As V2's code has it: over one key there is no softmax, and new_gate is left out."""
    leaves = {"gate": jax.numpy.array([0.5, -1.0]), "gate_scale": jax.numpy.array([3.0])}
    one, more = AdaptionPromptConfig("p", 1, gate_scale=True), AdaptionPromptConfig("p", 2, gate_scale=True)
    np.testing.assert_allclose(adaption_prompt.gate(leaves, one, 1), np.tanh([0.5, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(adaption_prompt.gate(leaves, more, 2), 3 * np.tanh([0.5, -1.0]), rtol=1e-6)


def test_what_no_layout_holds_is_said_by_name(tmp_path):
    early = over_llama(AdaptionPromptConfig("early", 2, 1, bottom=True))
    with pytest.raises(UserError, match="the prompts of early do not fit any layout.*llama_adapter_v1: its prompts are those of the topmost"):
        early.save_pretrained(tmp_path)
    paper = over_llama(AffineConfig("affine", ("llm/layers/**",), "output"), AdaptionPromptConfig("prompts", 2, 1))
    with pytest.raises(UserError, match="it scales what Linears read"):
        paper.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="peft's ADAPTION_PROMPT, which has one gate for a layer: its gates have a tanh, its gates differ"):
        save_adapters(over_llama(AdaptionPromptConfig("prompts", 2, 1)), tmp_path)
