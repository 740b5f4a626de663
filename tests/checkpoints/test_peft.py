"""LoRA directories, against the peft library in both directions."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.export import save_adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.families import tiny_llava  # noqa: E402

TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(peft's model, its adapter's directory, our model of it)."""
    base = tmp_path_factory.mktemp("base")
    theirs = tiny_llava.model(tiny_llava.CLIP, 2, strategy="default")
    theirs.save_pretrained(base)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, use_rslora=True)
    wrapped = peft.get_peft_model(theirs, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    directory = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(directory)
    fields = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(base)}))
    return wrapped, directory, mmjax.load(directory)


def apart(theirs, ours) -> float:
    given = tiny_llava.inputs(4, (1, 2))
    real = given["attention_mask"] == 1
    return np.abs(np.asarray(ours(given)["logits"]) - tiny_llava.run(theirs, given)["logits"])[real].max()


def test_an_adapter_of_peft_is_read(adapted):
    theirs, _, ours = adapted
    [lora] = ours.config.adapters
    assert lora.rank == 3 and lora.rank_stabilised
    assert set(lora.targets) == {f"llm/layers/{name}" for name in ("attention/query", "attention/value", "mlp/down")}
    assert apart(theirs, ours) < 2e-4


def test_an_adapter_of_ours_is_read_by_peft(adapted, tmp_path):
    _, _, ours = adapted
    flat = tree.flatten(ours.params)
    drawn = {
        p: jax.random.normal(jax.random.key(i), a.shape) * 0.2 if "/lora_" in p else a
        for i, (p, a) in enumerate(flat.items())
    }
    import dataclasses

    ours = dataclasses.replace(ours, params=tree.unflatten(drawn))
    save_adapters(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llava.model(tiny_llava.CLIP, 2, strategy="default"), tmp_path).eval()
    assert apart(theirs, ours) < 2e-4


def test_merged_on_export(adapted, tmp_path):
    theirs, _, ours = adapted
    ours.save_pretrained(tmp_path)
    assert apart(theirs, mmjax.load(tmp_path)) < 2e-4


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"use_qalora": True}, "use_qalora = True .QA-LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "BOFT"}, "peft_type = 'BOFT' is not supported; supported are LORA, IA3"),
    ],
)
def test_fields_that_change_the_result_are_errors(adapted, tmp_path, fields, named):
    known = json.loads((adapted[1] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**known, **fields}))
    with pytest.raises(UserError, match=named):
        mmjax.load(tmp_path)


def test_tensors_that_fit_nothing_are_listed(adapted, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapted[1] / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.nowhere.lora_A.weight": torch.zeros(3, 2)}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text((adapted[1] / "adapter_config.json").read_text())
    with pytest.raises(UserError, match=r"that fit nothing in its base \(1\): base_model.model.nowhere"):
        mmjax.load(tmp_path)


def test_names_of_an_older_transformers_are_read(adapted, tmp_path):
    """Until transformers 4.52 the language model stood at language_model.model, and adapters still say so (peft's issue 2566)."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapted[1] / "adapter_model.safetensors")
    older = {name.replace("model.model.language_model.", "model.language_model.model."): t for name, t in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / "adapter_model.safetensors")
    fields = json.loads((adapted[1] / "adapter_config.json").read_text())
    fields["target_modules"] = TARGETS.replace(r"model\.language_model\.", r"language_model\.model\.")
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    theirs, _, ours = adapted
    assert apart(theirs, mmjax.load(tmp_path)) < 2e-4
