"""Prompts and prefixes in peft's directories, against the peft library in both directions, with every tensor random."""

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
from mmjax.models import prefix, prompts
from mmjax.models.tuning_config import PrefixConfig, PTuningConfig
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16)
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=60, d_model=16, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=64)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, decoder_start_token_id=0)
    ),
}
CAUSAL, TO_TEXT = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_2_SEQ_LM"}
CASES = {
    "prompt of llama": ("llama", lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3)),
    "prompt of gpt2": ("gpt2", lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3)),
    "prompt of opt": ("opt", lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3)),
    "prompt of gemma": ("gemma", lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3)),
    "prompt of t5": ("t5", lambda: peft.PromptTuningConfig(**TO_TEXT, num_virtual_tokens=3)),
    "p_tuning by an LSTM": (
        "llama",
        lambda: peft.PromptEncoderConfig(
            **CAUSAL, num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=6
        ),
    ),
    "prompts of tasks": (
        "llama",
        lambda: peft.MultitaskPromptTuningConfig(**CAUSAL, num_virtual_tokens=3, num_tasks=3, num_ranks=2),
    ),
    "prefix of llama": ("llama", lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3)),
    "prefix of gpt2, projected": (
        "gpt2",
        lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
    ),
    "prefix of opt": ("opt", lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3)),
    "prefix of mpt": ("mpt", lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3, num_attention_heads=4)),
    "prefix of t5": ("t5", lambda: peft.PrefixTuningConfig(**TO_TEXT, num_virtual_tokens=3)),
}


def base(kind):
    torch.manual_seed(0)
    model = BASES[kind]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Kind of base -> its directory."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in BASES}
    for kind, directory in found.items():
        base(kind).save_pretrained(directory)
    return found


def given(kind, config) -> dict[str, np.ndarray]:
    """A full row, one padded on the right, one padded on the left."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 60, (3, 7)), np.ones((3, 7), int)
    mask[1, 5:], mask[2, :2] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        inputs["decoder_input_ids"] = rng.integers(3, 60, (3, 4))
    else:
        inputs["labels"] = np.where(mask, ids, -100)
        inputs["labels"][2, 2] = -100  # in the reference it is predicted from padding
    if isinstance(config, peft.MultitaskPromptTuningConfig):
        inputs["task_ids"] = np.array([2, 0, 1])
    return inputs


def theirs(model, inputs, new: int) -> tuple[np.ndarray, float]:
    with torch.no_grad():
        out = model(**{name: torch.tensor(value) for name, value in inputs.items()})
    logits = out.logits.numpy()
    text = logits if "decoder_input_ids" in inputs else logits[:, logits.shape[1] - inputs["input_ids"].shape[1] :]
    return text, 0.0 if "labels" not in inputs else float(out.loss)


def apart(model, ours, inputs) -> float:
    found = ours(inputs)
    wanted, loss = theirs(model, inputs, 3)
    difference = np.abs(np.asarray(found["logits"]) - wanted)
    if "labels" in inputs:
        difference = difference[inputs["attention_mask"] == 1]
        assert abs(float(found["loss"]) - loss) < 1e-4
    return float(difference.max() / np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_both_ways(directories, tmp_path, case):
    kind, make = CASES[case]
    config = make()
    wrapped = peft.get_peft_model(base(kind), config).eval()
    torch.manual_seed(1)
    for parameter in wrapped.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    wrapped.save_pretrained(tmp_path / "theirs")
    fields = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(directories[kind])
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(fields))
    inputs = given(kind, config)
    ours = mmjax.load(tmp_path / "theirs")
    assert apart(wrapped, ours, inputs) < 2e-5

    own = {path for path in tree.flatten(ours.params) if path.startswith(("llm/prompts/", "llm/plugs/"))}
    drawn = {
        path: jax.random.normal(jax.random.key(i), leaf.shape) * 0.5 if path in own else leaf
        for i, (path, leaf) in enumerate(tree.flatten(ours.params).items())
    }
    assert own and own <= ours.own
    other = dataclasses.replace(ours, params=tree.unflatten(drawn))
    save_adapters(other, tmp_path / "ours", base=str(directories[kind]))
    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()
    assert apart(again, other, inputs) < 2e-5
    back = mmjax.load(tmp_path / "ours")
    assert back.config == other.config
    for path in own:
        np.testing.assert_array_equal(tree.flatten(back.params)[path], drawn[path])


def test_fields_of_the_future_are_written_again(directories, tmp_path):
    model = mmjax.load(rewritten(directories, tmp_path, {"of_the_future": [1, 2], "tokenizer_kwargs": {"a": 1}}))
    save_adapters(model, tmp_path / "again")
    fields = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert fields["of_the_future"] == [1, 2] and "tokenizer_kwargs" not in fields


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_encoders_equal_pefts(kind):
    ours = PTuningConfig("x", 3, encoder=kind, encoder_width=5)
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=3, token_dim=8, num_transformer_submodules=1, encoder_hidden_size=5, encoder_reparameterization_type=kind.upper()
    )
    torch.manual_seed(0)
    theirs = peft.PromptEncoder(config)
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}

    def linear(name):
        return {"kernel": state[f"mlp_head.{name}.weight"].T, "bias": state[f"mlp_head.{name}.bias"]}

    leaves = {"vectors": state["embedding.weight"], "encoder": {"mlp": {f"linear_{i}": linear(2 * i) for i in range(3 if kind == "mlp" else 2)}}}
    if kind == "lstm":
        leaves["encoder"]["lstm"] = {
            f"layer_{i}": {
                direction: {
                    name: {"kernel": state[f"lstm_head.weight_{of}_l{i}{end}"].T, "bias": state[f"lstm_head.bias_{of}_l{i}{end}"]}
                    for name, of in (("input", "ih"), ("state", "hh"))
                }
                for direction, end in (("forward", ""), ("backward", "_reverse"))
            }
            for i in range(2)
        }
    fresh = prompts.init(jax.random.key(0), ours, 8)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, leaves)
    np.testing.assert_allclose(prompts.vectors(leaves, ours)[0], theirs(torch.arange(3)[None])[0].detach(), atol=1e-6)


def test_a_projected_prefix_equals_pefts():
    llm = tiny.model_config(2).language
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=2, token_dim=16, num_layers=2, num_attention_heads=2, prefix_projection=True, encoder_hidden_size=6
    )
    theirs = peft.PrefixEncoder(config)
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    encoder = {
        f"linear_{i}": {"kernel": state[f"transform.{2 * i}.weight"].T, "bias": state[f"transform.{2 * i}.bias"]} for i in range(2)
    }
    leaves = {"vectors": state["embedding.weight"], "encoder": encoder}
    ours = PrefixConfig("made", 2, projected=True, encoder_width=6)
    fresh = tree.unflatten(prefix.init(jax.random.key(0), ours, llm))["llm"]["prompts"]["made"]
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, leaves)
    config = dataclasses.replace(tiny.model_config(2), adapters=(ours,))
    made = prefix.prepared({"llm": {"prompts": {"made": leaves}}}, config)["llm"]["plugs"]["made"]
    wanted = theirs(torch.arange(2)[None])[0].detach().numpy().reshape(2, 4, 16)
    for layer in range(2):
        np.testing.assert_allclose(made["keys"][layer], wanted[:, 2 * layer], atol=1e-6)
        np.testing.assert_allclose(made["values"][layer], wanted[:, 2 * layer + 1], atol=1e-6)


def rewritten(directories, tmp_path, fields=None, tensors=None):
    """A directory of a llama's prompt of 3 tokens, with these fields and tensors beside or in place of its own."""
    from safetensors.numpy import save_file

    known = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "base_model_name_or_path": str(directories["llama"])}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**known, **(fields or {})}))
    save_file(tensors or {"prompt_embeddings": np.ones((3, 16), np.float32)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "fields, tensors, said",
    [
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"num_virtual_tokens": None}, None, "num_virtual_tokens = None"),
        ({"num_virtual_tokens": 4}, None, r"prompt_embeddings is \[3, 16\], not \[4, 16\]"),
        ({}, {"prompt_embedding": np.ones((3, 16), np.float32)}, "prompt_embedding is not known; prompt_embeddings is missing"),
        ({"peft_type": "P_TUNING", "encoder_reparameterization_type": "GRU"}, None, "encoder_reparameterization_type = 'GRU'"),
        ({"peft_type": "PREFIX_TUNING", "num_attention_heads": 4}, None, "the base has 2 heads of keys"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2}, None, "prefix_task_cols is missing"),
    ],
)
def test_what_does_not_fit_is_said(directories, tmp_path, fields, tensors, said):
    with pytest.raises(UserError, match=said):
        mmjax.load(rewritten(directories, tmp_path, fields, tensors))
