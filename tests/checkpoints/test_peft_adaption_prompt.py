"""peft's ADAPTION_PROMPT, against the peft library in both directions."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.export import save_adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = np.random.default_rng(0).integers(0, 64, (2, 6))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(peft's Llama with grouped keys, the directory of its adapter)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    base, directory = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    own = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    wrapped = peft.get_peft_model(theirs, own).eval()
    for name, parameter in wrapped.named_parameters():
        if "adaption" in name:
            torch.nn.init.normal_(parameter, 0, 0.5)
    wrapped.save_pretrained(directory)
    fields = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(base)}))
    return wrapped, directory, base


def logits(theirs):
    with torch.no_grad():
        return theirs(torch.tensor(IDS)).logits.numpy()


def test_an_adapter_of_peft_is_read(adapted):
    theirs, directory, _ = adapted
    ours = mmjax.load(directory)
    [prompts] = ours.config.adapters
    assert (prompts.length, prompts.depth, prompts.gate, prompts.gate_fn) == (4, 2, "layer", "identity")
    np.testing.assert_allclose(ours({"input_ids": IDS})["logits"], logits(theirs), rtol=2e-4, atol=2e-4)


def test_an_adapter_of_ours_is_read_by_peft(adapted, tmp_path):
    """Also one with a gate for each head, where they are all the same."""
    _, directory, base = adapted
    ours = mmjax.load(directory)
    flat = dict(tree.flatten(ours.params))
    flat["llm/plugs/default/gate"] = np.repeat(np.asarray(flat["llm/plugs/default/gate"]) * 2, 4, 1)
    heads = (dataclasses.replace(ours.config.adapters[0], gate="head"),)
    ours = dataclasses.replace(ours, params=tree.unflatten(flat), config=dataclasses.replace(ours.config, adapters=heads))
    save_adapters(ours, tmp_path, base=str(base))
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path).eval()
    np.testing.assert_allclose(logits(theirs), ours({"input_ids": IDS})["logits"], rtol=2e-4, atol=2e-4)


def test_what_does_not_fit_is_named(adapted, tmp_path):
    _, directory, _ = adapted
    fields = json.loads((directory / "adapter_config.json").read_text())
    for change, message in (
        ({"adapter_layers": 9}, "adapter_layers = 9 of a language model with 3 layers"),
        ({"adapter_layers": 1}, r"layers.1.self_attn.adaption_gate fits no layer with prompts"),
        ({"adapter_len": 3}, r"adaption_prompt is \[1, 4, 32\], not \[1, 3, 32\]"),
        ({"target_modules": "mlp"}, r"target_modules = 'mlp' \(only self_attn\)"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, **change}))
        (tmp_path / "adapter_model.safetensors").write_bytes((directory / "adapter_model.safetensors").read_bytes())
        with pytest.raises(UserError, match=message):
            mmjax.load(tmp_path)
