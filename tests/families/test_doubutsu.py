"""doubutsu's layout around transformers' own tower and language model."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel  # noqa: E402

WIDTH, OUT = 24, 32


class Reference(torch.nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        torch.manual_seed(0)
        tower = SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
        text = Qwen2Config(
            vocab_size=90,
            hidden_size=OUT,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        nn = torch.nn
        self.vision_model, self.text_model = SiglipVisionModel(tower), Qwen2ForCausalLM(text)
        self.mm_projector = nn.ModuleDict(
            {"model": nn.Sequential(nn.Linear(WIDTH, OUT), nn.GELU(), nn.Linear(OUT, OUT))}
        )
        for name, parameter in self.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
        self.eval()

    def save(self, path, kind: str) -> None:
        path.mkdir(exist_ok=True)
        parts = {"text_config": self.text_model.config, "vision_config": self.vision_model.config}
        sections = {name: json.loads(config.to_json_string(use_diff=False)) for name, config in parts.items()}
        (path / "config.json").write_text(json.dumps({"model_type": kind, **sections}))
        state = {name: value.clone() for name, value in self.state_dict().items()}
        safetensors_torch.save_file(state, path / "model.safetensors")

    @torch.no_grad()
    def embeddings(self, kind: str, pixels, ids):
        out = self.vision_model(torch.tensor(pixels), output_hidden_states=True)
        features = out.pooler_output[:, None] if kind == "doubutsu_pooled" else out.hidden_states[-2]
        media = self.mm_projector["model"](features).reshape(len(ids), -1, OUT)
        return torch.cat([media, self.text_model.get_input_embeddings()(torch.tensor(ids))], 1)


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.mark.parametrize("kind, tiles", [("doubutsu", 1), ("doubutsu_next", 3), ("doubutsu_pooled", 1)])
def test_logits_greedy_ids_and_files_equal_the_reference(reference, tmp_path, kind, tiles):
    reference.save(tmp_path / "theirs", kind)
    ours = mmjax.load(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 90, (2, 5))
    pixels = rng.standard_normal((2 * tiles, 3, 28, 28)).astype(np.float32)
    x = reference.embeddings(kind, pixels, ids)
    given = {"input_ids": ids, "pixel_values": pixels}
    with torch.no_grad():
        logits = reference.text_model(inputs_embeds=x).logits.numpy()
        new = reference.text_model.generate(
            inputs_embeds=x, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    assert np.abs(np.asarray(ours(given)["logits"]) - logits).max() < 2e-4
    assert ours.generate(given, max_new_tokens=8, ignore_eos=True).tolist() == new.tolist()
    ours.save_pretrained(tmp_path / "ours")
    again = mmjax.load(tmp_path / "ours")
    theirs = {
        name.replace("vision_model.vision_model.", "vision_model."): v for name, v in reference.state_dict().items()
    }
    written = safetensors_torch.load_file(tmp_path / "ours" / "model.safetensors")
    for name, value in written.items():
        assert torch.equal(theirs[name.replace("vision_model.vision_model.", "vision_model.")], value), name
    same = tree.flatten(again.params)
    assert all(np.array_equal(same[path], leaf) for path, leaf in tree.flatten(ours.params).items())


def test_a_row_padded_on_the_right_is_the_row_alone(reference, tmp_path):
    reference.save(tmp_path, "doubutsu")
    ours, rng = mmjax.load(tmp_path), np.random.default_rng(1)
    ids = rng.integers(3, 90, (2, 5))
    pixels = rng.standard_normal((2, 3, 28, 28)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    labels = np.where(mask == 1, ids, -100)
    both = ours({"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels})
    alone = ours({"input_ids": ids[:1, :3], "pixel_values": pixels[:1]})
    np.testing.assert_allclose(both["logits"][:1, :7], alone["logits"], rtol=1e-4, atol=1e-5)
    assert both["spliced_labels"].tolist()[0][:4] == [-100] * 4
    assert both["spliced_attention_mask"].tolist()[0] == [1] * 7 + [0] * 2
    with pytest.raises(UserError, match="3 pictures for 2 rows of input_ids; a doubutsu takes one for each"):
        ours({"input_ids": ids, "pixel_values": np.concatenate([pixels, pixels[:1]])})
