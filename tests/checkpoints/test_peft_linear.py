"""The methods beside weights in peft's directories, against the peft library in both directions, over several architectures."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.export import save_adapters
from mmjax.models import adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SIZE, "intermediate_size": 24, "pad_token_id": 0, "max_position_embeddings": 32}
BASES = {
    "llama": lambda: transformers.LlamaConfig(**GATED, num_key_value_heads=2),
    "tied": lambda: transformers.LlamaConfig(**GATED, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=4, n_positions=32),
    "phi3": lambda: transformers.Phi3Config(**GATED, num_key_value_heads=2),
    "opt": lambda: transformers.OPTConfig(**SIZE, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
    "neox": lambda: transformers.GPTNeoXConfig(**GATED),
}
LORA = {"r": 3, "lora_alpha": 7}
CASES = {
    "patterns": ("llama", peft.LoraConfig, {
        **LORA, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5, "v_proj": 2},
        "alpha_pattern": {"down_proj": 9}, "exclude_modules": ["2.mlp.down_proj"], "use_rslora": True}),
    "layers": ("llama", peft.LoraConfig, {
        **LORA, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers", "use_dora": True}),
    "tables": ("llama", peft.LoraConfig, {**LORA, "target_modules": ["embed_tokens", "lm_head", "o_proj"], "modules_to_save": ["norm"]}),
    "saved": ("llama", peft.LoraConfig, {**LORA, "target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ("tied", peft.LoraConfig, {**LORA, "target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 4], "bias": "all"}),
    "tied_head": ("tied", peft.LoraConfig, {**LORA, "target_modules": ["lm_head", "k_proj"], "bias": "lora_only"}),
    "dora_table": ("tied", peft.LoraConfig, {**LORA, "target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", peft.LoraConfig, {
        **LORA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True, "bias": "all"}),
    "fused": ("phi3", peft.LoraConfig, {**LORA, "target_modules": "all-linear", "lora_bias": False, "use_dora": True}),
    "by_heads": ("neox", peft.LoraConfig, {**LORA, "target_modules": ["query_key_value"], "bias": "lora_only"}),
    "biases": ("opt", peft.LoraConfig, {**LORA, "target_modules": ["q_proj", "fc1"], "bias": "all", "lora_bias": True}),
    "ia3": ("opt", peft.IA3Config, {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}),
    "ia3_fused": ("phi3", peft.IA3Config, {"target_modules": ["qkv_proj", "gate_up_proj"], "feedforward_modules": ["gate_up_proj"]}),
    "ia3_conv1d": ("gpt2", peft.IA3Config, {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "norms": ("opt", peft.LNTuningConfig, {"target_modules": ["self_attn_layer_norm", "model.decoder.final_layer_norm"]}),
}
IDS = np.array([[5, 3, 9, 11, 4, 2], [7, 8, 3, 1, 30, 49]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name -> (transformers' model, its directory), made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(BASES[name]()).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3)
            made[name] = model, tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name][1])
        return copy.deepcopy(made[name][0]), made[name][1]

    return get


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


def ours(model) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(model({"input_ids": IDS})["logits"])


def apart(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def written_by_peft(model, kind, settings, base, path):
    """peft's model with every tensor of its adapter drawn at random, written to a directory."""
    wrapped = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            ones = "ia3" in name or "ln_tuning" in name or "magnitude" in name
            torch.nn.init.normal_(parameter, 1.0 if ones else 0.0, 0.3)
    wrapped.save_pretrained(path)
    fields = json.loads((path / "adapter_config.json").read_text())
    fields |= {"base_model_name_or_path": str(base), "of_the_future": [1, 2]}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return wrapped


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case, bases, tmp_path):
    name, kind, settings = CASES[case]
    model, base = bases(name)
    plain = theirs(model)
    wrapped = written_by_peft(model, kind, settings, base, tmp_path / "theirs")
    want = theirs(wrapped)
    assert apart(plain, want) > 1e-2  # it does something
    found = mmjax.load(tmp_path / "theirs")
    assert apart(ours(found), want) < 2e-5
    merged, config = adapters.merge(found.params, found.config)
    assert apart(ours(dataclasses.replace(found, params=merged, config=config)), want) < 2e-5

    # As it was read it is written again; what nobody knows stays.
    save_adapters(found, tmp_path / "again")
    again, before = (json.loads((tmp_path / where / "adapter_config.json").read_text()) for where in ("again", "theirs"))
    assert again["of_the_future"] == [1, 2] and again["target_modules"] == before["target_modules"]
    assert apart(ours(mmjax.load(tmp_path / "again")), want) < 2e-5

    # Trained onward it loads in peft.
    flat = tree.flatten(found.params)
    keys = jax.random.split(jax.random.key(2), len(flat))
    flat = {p: a + 0.2 * jax.random.normal(k, a.shape) if "/adapters/" in p else a for k, (p, a) in zip(keys, flat.items())}
    if name == "phi3" and kind is peft.IA3Config:  # one module reads one input
        flat = {p: flat[p.replace("/up/", "/gate/")] if "ia3_input" in p else a for p, a in flat.items()}
    onward = dataclasses.replace(found, params=tree.unflatten(flat))
    save_adapters(onward, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(bases(name)[0], tmp_path / "ours").eval()
    assert apart(theirs(loaded), ours(onward)) < 2e-5
    assert apart(ours(mmjax.load(tmp_path / "ours")), ours(onward)) < 2e-5


@pytest.fixture(scope="module")
def adapted(bases, tmp_path_factory):
    """A LoRA directory over the Llama, and the logits of peft's model."""
    path = tmp_path_factory.mktemp("adapter")
    model, base = bases("llama")
    return path, theirs(written_by_peft(model, peft.LoraConfig, {**LORA, "target_modules": ["q_proj", "up_proj"]}, base, path))


def rewritten(source, path, change):
    """The directory with other tensors."""
    from safetensors.torch import load_file, save_file

    (path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    save_file(change(load_file(source / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    "before, after",
    [("model.layers.", "layers."), ("model.layers.", "model.model.layers."), ("base_model.model.model.", "base_model.model.model.model.")],
    ids=["of a class without the head", "doubled", "wrapped"],
)
def test_other_names_are_recognised(adapted, tmp_path, before, after):
    """Adapters made on LlamaModel lack `model.`; some tools write it twice (peft's issue 1579)."""
    changed = rewritten(adapted[0], tmp_path, lambda tensors: {name.replace(before, after, 1): t for name, t in tensors.items()})
    assert apart(ours(mmjax.load(changed)), adapted[1]) < 2e-5


def test_pickled_tensors_are_read(adapted, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "adapter_config.json").write_text((adapted[0] / "adapter_config.json").read_text())
    torch.save(load_file(adapted[0] / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    assert apart(ours(mmjax.load(tmp_path)), adapted[1]) < 2e-5


def test_missing_and_other_tensors_are_errors(adapted, tmp_path):
    gone = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    changed = rewritten(adapted[0], tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name != gone})
    with pytest.raises(UserError, match=rf"missing \(1\): {gone}"):
        mmjax.load(changed)
    changed = rewritten(adapted[0], tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.2.mlp" not in n})
    with pytest.raises(UserError, match=r"missing \(2\): .*layers.2.mlp.up_proj.lora_A.weight"):
        mmjax.load(changed)
    changed = rewritten(adapted[0], tmp_path, lambda tensors: {name: t[:2] if "lora_A" in name else t for name, t in tensors.items()})
    with pytest.raises(UserError, match="of rank 2, the config asks for 3"):
        mmjax.load(changed)


def test_rows_choose_among_named_adapters(adapted, bases, tmp_path):
    """Each row its own adapter, as peft's batches of mixed adapters; weights; generation; merged and taken apart again."""
    model, base = bases("llama")
    other = {**LORA, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}
    written_by_peft(model, peft.LoraConfig, other, base, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(bases("llama")[0], adapted[0]).eval()
    wrapped.load_adapter(tmp_path, "other")
    found = mmjax.load(adapted[0]).add_adapter(tmp_path, "other")
    with torch.no_grad():
        want = wrapped(input_ids=torch.tensor(IDS), adapter_names=["other", "__base__"]).logits.numpy()
    inputs = {"input_ids": IDS}
    rows = [["other"], []]
    with jax.default_matmul_precision("highest"):
        assert apart(np.asarray(found(inputs, adapters=rows)["logits"]), want) < 2e-5
        assert apart(np.asarray(found(inputs, adapters="default")["logits"]), adapted[1]) < 2e-5
        plain = mmjax.load(base)
        np.testing.assert_array_equal(found(inputs, adapters=[])["logits"], plain(inputs)["logits"])
        both = np.asarray(found(inputs, adapters={"default": 1.0, "other": 0.5})["logits"])
    wrapped.set_adapter("default")
    wrapped.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both", combination_type="cat")
    wrapped.set_adapter("both")
    assert apart(both, theirs(wrapped)) < 2e-5

    # A row's adapter goes with it through generation, with beams as well.
    for beams in (1, 2):
        mixed = found.generate(inputs, 5, adapters=rows, ignore_eos=True, num_beams=beams)
        alone = [
            found.generate({"input_ids": IDS[i : i + 1]}, 5, adapters=rows[i], ignore_eos=True, num_beams=beams)[0] for i in range(2)
        ]
        np.testing.assert_array_equal(mixed, alone)

    chosen = found.with_adapters({"default": 1.0, "other": 0.5})
    merged = chosen.merge()
    assert not merged.config.adapters and apart(ours(merged), both) < 2e-5
    before, after = tree.flatten(chosen.params), tree.flatten(merged.unmerge().params)
    assert before.keys() == after.keys() and all(after[path] is leaf for path, leaf in before.items())
    merged.save_pretrained(tmp_path / "merged")
    assert apart(theirs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), both) < 2e-5
    with pytest.raises(UserError, match="unknown adapter 'others' .nearest: 'other'.; this model has default, other"):
        found(inputs, adapters=["others"])
    with pytest.raises(UserError, match="has an adapter 'other' already"):
        found.add_adapter(tmp_path, "other")
