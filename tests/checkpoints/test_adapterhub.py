"""AdapterHub's directories. Formulas and names were compared with the library itself (adapters 1.3.0) on BERT, GPT-2, LLaMA, Mistral, T5 and
ViT; recorded cases of it are run by `python -m tests.golden`."""

import dataclasses
import json

import numpy as np
import pytest

import mmjax
from mmjax import export, tree
from mmjax.checkpoints import safetensors
from mmjax.errors import UserError
from mmjax.families import llama
from mmjax.model import Model
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.tuning_config import BottleneckConfig
from tests.models import tiny

ADAPTER = BottleneckConfig("task", reduction=4.0, places=("attention", "mlp"), reads="input", scale=4.0, norm_before=True, layers=(0, 2))
IDS = {"input_ids": np.arange(14).reshape(2, 7) + 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A LLaMA in a directory, and with an adapter whose leaves are random."""
    path = tmp_path_factory.mktemp("base")
    config = ModelConfig(llm=tiny.model_config(layers=3).llm)
    base = Model(config, tiny.random_params(config), llama.FAMILY, {"model_type": "llama"}, Execution())
    base.save_pretrained(path)
    loaded = mmjax.load(path)
    adapted = dataclasses.replace(loaded.config, adapters=(ADAPTER,))
    params = tree.merge(tiny.random_params(adapted, 1), loaded.params)
    return dataclasses.replace(loaded, config=adapted, params=params), path


def test_a_directory_goes_out_and_comes_back(model, tmp_path):
    model, base = model
    export.save_adapters(model, tmp_path, base=str(base))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["config"]["leave_out"] == [1] and fields["config"]["reduction_factor"] == 4 and fields["config"]["is_parallel"]
    names = set(safetensors.read(tmp_path / "adapter.safetensors"))
    assert "model.layers.2.output_adapters.adapters.task.adapter_down.1.weight" in names and len(names) == 2 * 2 * 8
    again = mmjax.load(tmp_path)
    assert again.config.adapters == (dataclasses.replace(ADAPTER),)
    np.testing.assert_array_equal(again(IDS)["logits"], model(IDS)["logits"])
    without = export.without_adapters(model)
    assert np.abs(without(IDS)["logits"] - model(IDS)["logits"]).max() > 0.01
    assert not [path for path in tree.flatten(without.params) if "/plugs/" in path]
    with pytest.raises(UserError, match="cannot be merged"):
        model.save_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phm_layer": True}, "phm_layer = True"),
        ({"architecture": "prefix_tuning"}, "prefix_tuning"),
        ({"scaling": "learned"}, "scaling = 'learned'"),
        ({"non_linearity": "tanh"}, "non_linearity = 'tanh'"),
        ({"new_field": 1}, "new_field"),
        ({"ln_after": True}, r"missing \(8\): .*adapter_norm_after"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, tmp_path, change, said):
    model, base = model
    export.save_adapters(model, tmp_path, base=str(base))
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields["config"] |= change
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=said):
        mmjax.load(tmp_path)


def test_generating_with_a_cache_is_generating_anew(model):
    model = model[0]
    prompt = {"input_ids": IDS["input_ids"][:1]}
    ids = model.generate(prompt, max_new_tokens=5, ignore_eos=True)[0]
    text = np.concatenate([prompt["input_ids"][0], ids])[None]
    logits = model({"input_ids": text})["logits"][0]
    assert [int(logits[6 + i].argmax()) for i in range(5)] == list(ids)
