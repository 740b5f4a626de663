"""Every decoder-only language model against transformers, every parameter drawn: logits, greedy ids, files there and back."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.checkpoints import safetensors
from mmjax.errors import UserError
from mmjax.families import find
from mmjax.families.fields import ACTIVATIONS
from mmjax.models import adapters
from mmjax.models.tuning_config import LoraConfig

torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

import transformers as hf  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 3.0, 5.0]}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
NEOX = {"num_key_value_heads": None}
GEMMA3 = {**SMALL, "head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 20}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
OPT = {"ffn_dim": 40, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
MPT = {"vocab_size": 64, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 128}
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}

# One of each family, whose greedy ids are compared as well as its logits...
FAMILIES = {
    "llama": (hf.LlamaConfig, {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": (hf.MistralConfig, {**SMALL, "sliding_window": 5}),
    "mixtral": (hf.MixtralConfig, {**SMALL, "sliding_window": 9, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen2": (hf.Qwen2Config, {**SMALL, **WINDOWS, "tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, {**SMALL, **WINDOWS, "head_dim": 12, "attention_bias": True}),
    "gemma": (hf.GemmaConfig, {**SMALL, "head_dim": 10, "num_key_value_heads": 1, "attention_bias": True}),
    "gemma2": (hf.Gemma2Config, {**SMALL, "head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3_text": (hf.Gemma3TextConfig, {**GEMMA3, "layer_types": GEMMA3_LAYERS, "attention_bias": True}),
    "phi": (hf.PhiConfig, {**SMALL, "qk_layernorm": True}),
    "phi3": (hf.Phi3Config, {**SMALL, "pad_token_id": 0, "eos_token_id": 1, "sliding_window": 7}),
    "opt": (hf.OPTConfig, {**OPT, "max_position_embeddings": 128}),
    "gpt2": (hf.GPT2Config, {**GPT2, "n_inner": 40, "scale_attn_weights": False, "tie_word_embeddings": False}),
    "gpt_neox": (hf.GPTNeoXConfig, {**SMALL, **NEOX, "attention_bias": False, "rotary_pct": 0.5}),
    "mpt": (hf.MptConfig, {**MPT, "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3, "alibi_bias_max": 4}}),
}
# ... and what else their configs may say.
OPTIONS = {
    "linear rope": (hf.LlamaConfig, {**SMALL, "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 5000.0}),
    "llama3 rope": (hf.LlamaConfig, {**SMALL, "rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True}),
    "dynamic rope": (
        hf.LlamaConfig,
        {**SMALL, "max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "yarn": (hf.Qwen2Config, {**SMALL, "rope_scaling": YARN, "rope_theta": 5000.0}),
    "yarn, untruncated": (
        hf.LlamaConfig,
        {**SMALL, "rope_scaling": {**YARN, "truncate": False, "beta_fast": 16, "mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
    "longrope, short": (hf.Phi3Config, {**SMALL, "pad_token_id": 0, "rope_scaling": LONG, "original_max_position_embeddings": 64}),
    "longrope, long": (
        hf.Phi3Config,
        {**SMALL, "pad_token_id": 0, "rope_scaling": LONG, "original_max_position_embeddings": 8, "tie_word_embeddings": True},
    ),
    "no soft caps": (
        hf.Gemma2Config,
        {**SMALL, "final_logit_softcapping": None, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 3},
    ),
    "two scaled ropes": (
        hf.Gemma3TextConfig,
        {
            **GEMMA3,
            "num_hidden_layers": 7,
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "tied phi": (hf.PhiConfig, {**SMALL, "tie_word_embeddings": True, "partial_rotary_factor": 0.25}),
    "norms behind, narrow embeddings": (hf.OPTConfig, {**OPT, **POST_NORM, "enable_bias": False}),
    "no last norm": (hf.OPTConfig, {**OPT, "_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "one after the other": (hf.GPTNeoXConfig, {**SMALL, **NEOX, "use_parallel_residual": False, "tie_word_embeddings": True}),
    "untied experts": (hf.MixtralConfig, {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 12}),
}
IDS = np.random.default_rng(0).integers(3, 64, (4, 12))
MASK = np.array([[0] * 4 + [1] * 8, [1] * 12, [0] * 9 + [1] * 3, [0] + [1] * 11])
GIVEN = {"input_ids": IDS, "attention_mask": MASK, "position_ids": np.maximum(np.cumsum(MASK, 1) - 1, 0)}


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """The models of a file this long are many: their compiled programs are given back."""
    yield
    jax.clear_caches()


def published(kind, settings, path):
    """A directory that transformers has written, and the model in it."""
    theirs = hf.AutoModelForCausalLM.from_config(kind(**settings), attn_implementation="eager")
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        norm = "norm" in name or "ln_" in name
        torch.nn.init.normal_(parameter, float(norm and name.endswith("weight")), 0.1 if norm else 0.2)
    theirs.eval().save_pretrained(path)
    return theirs


def logits(model, ids=IDS, mask=MASK):
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    given = {} if model.config.model_type == "mpt" else {"position_ids": positions}
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask), **given).logits.numpy()


@pytest.mark.parametrize("name", [*FAMILIES, *OPTIONS])
def test_equals_transformers(name, tmp_path):
    kind, settings = {**FAMILIES, **OPTIONS}[name]
    theirs = published(kind, settings, tmp_path / "theirs")
    ours = mmjax.load(tmp_path / "theirs")
    reference = logits(theirs)
    found = np.asarray(ours(GIVEN)["logits"])
    assert np.abs(found - reference)[MASK == 1].max() < 2e-5 * np.abs(reference).max()

    ours.save_pretrained(tmp_path / "ours")
    written, read = (safetensors.read(tmp_path / place / "model.safetensors") for place in ("ours", "theirs"))
    assert set(written) == set(read)
    assert all(np.array_equal(written[key].read(), tensor.read()) for key, tensor in read.items())
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert np.array_equal(logits(again), reference)


@pytest.mark.parametrize("name", FAMILIES)
def test_generates_the_same_ids(name, tmp_path):
    theirs = published(*FAMILIES[name], tmp_path)
    ours = mmjax.load(tmp_path)
    theirs.generation_config = hf.GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        reference = theirs.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    found = ours.generate({"input_ids": IDS, "attention_mask": MASK}, max_new_tokens=64, ignore_eos=True)
    assert np.array_equal(found, reference[:, IDS.shape[1] :].numpy())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral", "phi3"])
def test_a_merged_adapter_is_in_the_files(name, tmp_path):
    """Where transformers stores several of our leaves in one tensor, or one of ours in several."""
    published(*FAMILIES[name], tmp_path / "theirs")
    model = mmjax.load(tmp_path / "theirs")
    lora = LoraConfig("a", rank=3, alpha=6.0, targets=("llm/layers/attention/*",))
    config = dataclasses.replace(model.config, adapters=(lora,))
    params = adapters.add(jax.random.key(0), model.params, config)
    leaves = {
        path: jax.random.normal(jax.random.key(len(path)), leaf.shape) * 0.2 if path.endswith("lora_b") else leaf
        for path, leaf in tree.flatten(params).items()
    }
    model = dataclasses.replace(model, config=config, params=tree.unflatten(leaves))
    found = np.asarray(model(GIVEN)["logits"])
    model.save_pretrained(tmp_path / "ours")
    reference = logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval())
    assert np.abs(found - reference)[MASK == 1].max() < 2e-5 * np.abs(reference).max()


def test_the_balance_of_experts_is_transformers(tmp_path):
    kind, settings = FAMILIES["mixtral"]
    theirs = published(kind, {**settings, "output_router_logits": True, "router_aux_loss_coef": 0.5}, tmp_path)
    labels = np.where(MASK * np.roll(MASK, 1, 1) == 1, IDS, -100)
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(MASK), "labels": torch.tensor(labels)}
        reference = theirs(torch.tensor(IDS), **given)
    found = mmjax.load(tmp_path)({"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    assert np.allclose(found["aux_loss"], reference.aux_loss.numpy(), rtol=1e-5)
    assert np.allclose(found["loss"], reference.loss.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "model_type, fields, named",
    [
        ("llama", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_scaling.rope_type = 'spiral'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "of type llama3 has no low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp = 2"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        ("llama", {"hidden_size": None}, "no field hidden_size"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types = "),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln = True"),
    ],
)
def test_unsupported_fields(model_type, fields, named):
    with pytest.raises(UserError, match=named):
        find({"model_type": model_type}).read_config({"model_type": model_type, **SMALL, **fields}, "config.json")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_that_are_not_given(name, tmp_path):
    """Slots, padding counted, but in OPT; generation counts real tokens in both."""
    theirs = published(*FAMILIES[name], tmp_path)
    with torch.no_grad():
        reference = theirs(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.numpy()
    found = np.asarray(mmjax.load(tmp_path)({"input_ids": IDS, "attention_mask": MASK})["logits"])
    assert np.abs(found - reference)[MASK == 1].max() < 2e-5 * np.abs(reference).max()


def test_only_the_copy_of_a_tied_weight_is_stored(tmp_path):
    theirs = published(hf.LlamaConfig, {**SMALL, "tie_word_embeddings": True}, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors_numpy.save_file(tensors, file)
    found = np.asarray(mmjax.load(tmp_path)({"input_ids": IDS, "attention_mask": MASK})["logits"])
    assert np.abs(found - logits(theirs))[MASK == 1].max() < 1e-4


@pytest.mark.parametrize("name", ["gemma", "gpt_neox", "mpt"])
def test_files_of_the_base_class(name, tmp_path):
    kind, settings = FAMILIES[name]
    theirs = published(kind, {**settings, "tie_word_embeddings": True}, tmp_path / "whole")
    hf.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    found = np.asarray(mmjax.load(tmp_path / "base")({"input_ids": IDS, "attention_mask": MASK})["logits"])
    assert np.abs(found - logits(theirs))[MASK == 1].max() < 1e-4


def test_what_absent_and_null_fields_mean():
    """As in transformers' configuration classes, whose values for these are read here."""
    for kind, fields in (
        (hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": None}),
        (hf.Qwen3Config, {"num_key_value_heads": None}),
        (hf.GemmaConfig, {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"}),
        (hf.GPTNeoXConfig, {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rotary_emb_base": 700}),
    ):
        given = {"model_type": kind.model_type, **SMALL, **fields}
        shapes = find(given).read_config(given, "config.json").language
        theirs = kind(**{**SMALL, **fields})
        if kind is not hf.GPTNeoXConfig:
            assert shapes.block.kv_heads == theirs.num_key_value_heads
        assert shapes.windows == (0,) and shapes.block.activation == ACTIVATIONS[theirs.hidden_act]
        rope = theirs.rope_parameters
        assert shapes.block.rope.theta == rope["rope_theta"]
        assert shapes.block.rope.fraction == rope.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_text_longer_than_the_table_of_positions(name, tmp_path):
    published(*FAMILIES[name], tmp_path)
    model = mmjax.load(tmp_path)
    with pytest.raises(UserError, match="129 positions.*has 128"):
        model({"input_ids": np.ones((1, 129), int)})
    with pytest.raises(UserError, match="132 positions.*has 128"):
        model.generate({"input_ids": np.full((1, 125), 5)}, max_new_tokens=8)


def test_families_read_what_they_wrote_from_nothing():
    """A config written without one to begin from says the same."""
    for name, (kind, settings) in {**FAMILIES, **OPTIONS}.items():
        config = json.loads(kind(**settings).to_json_string())
        family = find(config)
        shapes = family.read_config(config, "config.json")
        assert family.read_config(family.write_config(shapes, {}), "again") == shapes, name


def test_gemma_3_as_it_was_published():
    """Every sixth layer sees everything, and alone has the scaled rotary embedding; what is absent is transformers' default."""
    given = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    given["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    shapes = find(given).read_config(given, "config.json")
    llm = shapes.language
    assert llm.windows == (1024,) * 5 + (0,) and llm.block.head_dim == 256 and llm.vocab_size == 262208
    assert [(rope.theta, rope.factor) for rope in llm.ropes] == [(1e4, 1.0)] * 5 + [(1e6, 8.0)]
    assert find(given).write_config(shapes, given)["rope_scaling"] == given["rope_scaling"]
