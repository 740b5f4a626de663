"""What a Q-Former begins as: from a BERT, from a whole model, from a file in LAVIS's layout."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import save_file

from mmjax import config as recipes
from mmjax import qformer_weights, tree
from mmjax.errors import UserError
from mmjax.families import lavis, writing
from mmjax.models import multimodal
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ConnectorConfig

CONFIG = ConnectorConfig(
    "qformer", in_width=12, out_width=10, positions=5, depth=2, hidden_width=16, latents=3, heads=2, mlp_width=24, text_vocab=21,
    text_positions=8, contrast_width=6,
)  # fmt: skip


def randomised(config=CONFIG, seed=0):
    random = np.random.default_rng(seed)
    shapes = tree.flatten(multimodal.shapes(ModelConfig(connector=config)))
    return {path: random.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


def written(path, config=CONFIG, drop=()):
    leaves = randomised(config)
    tensors = writing.tensors(tree.unflatten(leaves), lavis.qformer_rules(config))
    named = {tensor.name: np.array(tensor.make(), order="C") for tensor in tensors}
    kept = {name: value for name, value in named.items() if not name.startswith(tuple(drop))} if drop else named
    save_file({**kept, "visual_encoder.cls_token": np.zeros(3, np.float32)}, path)
    return leaves


def loaded(config=CONFIG, **section):
    return tree.flatten(qformer_weights.load(recipes.Connector(kind="qformer", **section), config))


def test_a_file_in_laviss_layout(tmp_path):
    leaves = written(tmp_path / "q.safetensors")
    found = loaded(path=str(tmp_path / "q.safetensors"))
    assert set(found) == set(leaves)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_what_a_file_has_not_begins_fresh(tmp_path):
    written(tmp_path / "q.safetensors", drop=("vision_proj", "text_proj", "itm_head", "temp", "Qformer.cls"))
    found = loaded(path=str(tmp_path / "q.safetensors"), projection=False)
    parts = {path.split("/")[1] for path in found}
    assert parts == {"queries", "embed", "layers", "cross"}
    bare = dataclasses.replace(CONFIG, text_vocab=0, contrast_width=0)  # MiniGPT-4's: the text's part of the file is not read
    found = loaded(bare, path=str(tmp_path / "q.safetensors"), projection=False)
    assert not any("text" in path or "embedding" in path for path in found)


def test_of_a_bert(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
    bert = hf.BertForMaskedLM(hf.BertConfig(**small, max_position_embeddings=8))
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter)
    bert.save_pretrained(tmp_path)
    found, state = loaded(bert=str(tmp_path)), {name: value.numpy() for name, value in bert.state_dict().items()}
    for ours in ("mlp", "text_mlp"):
        theirs = state["bert.encoder.layer.1.intermediate.dense.weight"].T
        np.testing.assert_array_equal(found[f"connector/layers/{ours}/up/kernel"][1], theirs)
    words = found["connector/embed/embedding"]
    np.testing.assert_array_equal(words[:20], state["bert.embeddings.word_embeddings.weight"])
    assert words.shape == (21, 16) and 0 < np.abs(words[20]).max() < 0.1  # [DEC]
    np.testing.assert_array_equal(found["connector/heads/language/bias"][:20], state["cls.predictions.bias"])
    assert not any(path.startswith(("connector/cross", "connector/queries", "connector/project_out")) for path in found)
    written(tmp_path / "q.safetensors")
    both = loaded(bert=str(tmp_path), path=str(tmp_path / "q.safetensors"))
    np.testing.assert_array_equal(both["connector/embed/embedding"], randomised()["connector/embed/embedding"])


def test_what_does_not_fit_is_said(tmp_path):
    written(tmp_path / "q.safetensors", dataclasses.replace(CONFIG, text_vocab=30))
    with pytest.raises(UserError, match="word_embeddings"):
        loaded(path=str(tmp_path / "q.safetensors"))
    save_file({"layer.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no Q-Former"):
        loaded(path=str(tmp_path / "other.safetensors"))
