"""OpenFlamingo and Otter around every language model they come with: against transformers' language model and tower with the
papers' resampler and gated blocks, written here in torch; in the authors' files, both ways. (Whole models are also compared with
recorded outputs of OpenFlamingo's own code: tests/test_golden.py.)
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.checkpoints import safetensors
from mmjax.errors import UserError
from mmjax.families import find
from mmjax.model import Model
from tests.models.tiny import random_params

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402
from torch.nn import functional as F  # noqa: E402

IMAGE, SIDE = 90, 28
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 92}
TEXTS = {
    "llama": ({"model_type": "llama", **SMALL, "intermediate_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}, "model.layers"),
    "mpt": ({"model_type": "mpt", "d_model": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 92, "max_seq_len": 64, "attn_config": {"alibi": True}}, "transformer.blocks"),
    "opt": ({"model_type": "opt", **SMALL, "ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "model.decoder.layers"),
    "gpt_neox": ({"model_type": "gpt_neox", **SMALL, "intermediate_size": 40, "max_position_embeddings": 64}, "gpt_neox.layers"),
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
SIZES = {
    "perceiver": {"depth": 2, "heads": 2, "dim_head": 6, "num_latents": 5, "ff_mult": 2},
    "gated_cross_attn": {"heads": 2, "dim_head": 6, "ff_mult": 3, "only_attend_immediate_media": True},
}


def open_flamingo(text: str, every: int = 2, last: bool = True) -> dict:
    gated = {**SIZES["gated_cross_attn"], "only_attend_immediate_media": last}
    return {
        "model_type": "openflamingo",
        "cross_attn_every_n_layers": every,
        "media_token_id": IMAGE,
        "text_config": TEXTS[text][0],
        "vision_config": TOWER,
        "perceiver": SIZES["perceiver"],
        "gated_cross_attn": gated,
    }


def otter(text: str) -> dict:
    return {
        "model_type": "otter",
        "cross_attn_every_n_layers": 4,
        "media_token_id": IMAGE,
        "max_num_frames": 3,
        "text_config": TEXTS[text][0],
        "vision_config": TOWER,
    }


def written(config: dict, directory) -> Model:
    """A model of this config with every parameter drawn, in its layout."""
    family = find(config)
    shapes = family.read_config(config, "config.json")
    params = random_params(shapes)
    model = Model(config=shapes, params=params, family=family, foreign=config)
    model.save_pretrained(directory)
    return model


def inputs(seed: int = 0, frames: int = 1) -> dict[str, np.ndarray]:
    """Text before the first of two pictures; one picture, padded; no picture; two, with padding on the left."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, IMAGE, (4, 10))
    ids[0, 2] = ids[0, 6] = ids[1, 0] = ids[3, 4] = ids[3, 8] = IMAGE
    mask = np.ones((4, 10), int)
    mask[1, 7:] = mask[3, :3] = 0
    pixels = rng.standard_normal((4, 2, frames, 3, SIDE, SIDE)).astype(np.float32)
    return {"lang_x": ids, "attention_mask": mask, "vision_x": pixels}


def stored(directory) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(tensor.read()) for name, tensor in safetensors.read(directory / "model.safetensors").items()}


def reference(directory, config: dict, given: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of transformers' language model, each of whose chosen blocks is preceded by a gated one."""
    weights, kind = stored(directory), config["text_config"]["model_type"]
    language = hf.AutoModelForCausalLM.from_config(
        hf.AutoConfig.for_model(**config["text_config"]), attn_implementation="eager"
    ).eval()
    mine = {name.removeprefix("lang_encoder."): value for name, value in weights.items() if name.startswith("lang_encoder.")}
    own = {name.replace(".decoder_layer.", "."): value for name, value in mine.items() if ".gated_cross_attn_layer." not in name}
    own = {name.replace("embed_out.", "lm_head."): value for name, value in own.items()}
    missing, unexpected = language.load_state_dict(own, strict=False)
    assert not unexpected and all("lm_head" in name or "inv_freq" in name for name in missing)
    language.tie_weights()
    tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**{k: v for k, v in TOWER.items() if k != "model_type"})).eval()
    image = {name.removeprefix("vision_encoder."): value for name, value in weights.items() if name.startswith("vision_encoder.")}
    names = tower.state_dict().keys()
    image = {name if name in names else name.removeprefix("vision_model."): value for name, value in image.items()}
    tower.load_state_dict({name: value for name, value in image.items() if name in names})
    pixels = torch.tensor(given["vision_x"])
    rows, media = pixels.shape[:2]
    with torch.no_grad():
        states = tower(pixels.reshape(-1, 3, SIDE, SIDE), output_hidden_states=True).hidden_states[-1][:, 1:]
        tokens = resampled(weights, config, states).reshape(rows, media, -1, states.shape[-1])
        begun = torch.tensor(np.cumsum(given["lang_x"] == IMAGE, 1))
        every, last = config["cross_attn_every_n_layers"], config["gated_cross_attn"]["only_attend_immediate_media"]
        for i in range(every - 1, 4, every):
            path = f"{TEXTS[kind][1]}.{i}"
            block = {name.split(".gated_cross_attn_layer.")[1]: v for name, v in mine.items() if name.startswith(f"{path}.gated")}

            def before(module, args, kwargs, block=block):
                if args:
                    return (gated(block, config, args[0], tokens, begun, last), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": gated(block, config, kwargs["hidden_states"], tokens, begun, last)}

            language.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)
        out = language(torch.tensor(given["lang_x"]), attention_mask=torch.tensor(given["attention_mask"]))
    return out.logits.numpy()


def gated(w, config, x, media, begun, last):
    """x with what it reads of media [rows, media, tokens, width]."""
    rows, count, tokens, width = media.shape
    heads, dim = config["gated_cross_attn"]["heads"], config["gated_cross_attn"]["dim_head"]
    h = F.layer_norm(x, x.shape[-1:], w["attn.norm.weight"], w["attn.norm.bias"])
    q = (h @ w["attn.to_q.weight"].T).reshape(rows, -1, heads, dim)
    k, v = ((media.reshape(rows, -1, width) @ half.T).reshape(rows, -1, heads, dim) for half in w["attn.to_kv.weight"].chunk(2))
    number = torch.arange(1, count + 1).repeat_interleave(tokens)
    seen = begun[..., None] == number if last else begun[..., None] >= number
    scores = (torch.einsum("bthd,bshd->bhts", q, k) * dim**-0.5).masked_fill(~seen[:, None], -1e30)
    mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1) * seen[:, None], v).reshape(rows, -1, heads * dim)
    x = x + w["attn_gate"].tanh() * (mixed @ w["attn.to_out.weight"].T)
    h = F.layer_norm(x, x.shape[-1:], w["ff.0.weight"], w["ff.0.bias"])
    return x + w["ff_gate"].tanh() * (F.gelu(h @ w["ff.1.weight"].T) @ w["ff.3.weight"].T)


def resampled(weights, config, states):
    """Latents that have read states [pictures, positions, width]."""
    w = {name.removeprefix("perceiver."): value for name, value in weights.items() if name.startswith("perceiver.")}
    heads, dim = config["perceiver"]["heads"], config["perceiver"]["dim_head"]
    x = w["latents"].repeat(len(states), 1, 1)

    def normed(name, y):
        return F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(config["perceiver"]["depth"]):
        at = f"layers.{i}.0"
        latents = normed(f"{at}.norm_latents", x)
        both = torch.cat([normed(f"{at}.norm_media", states), latents], 1)
        split = [y.reshape(len(states), -1, heads, dim) for y in (latents @ w[f"{at}.to_q.weight"].T, *(both @ w[f"{at}.to_kv.weight"].T).chunk(2, -1))]
        scores = torch.einsum("bthd,bshd->bhts", split[0], split[1]) * dim**-0.5
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), split[2]).reshape(len(states), -1, heads * dim)
        x = x + mixed @ w[f"{at}.to_out.weight"].T
        at = f"layers.{i}.1"
        x = x + F.gelu(normed(f"{at}.0", x) @ w[f"{at}.1.weight"].T) @ w[f"{at}.3.weight"].T
    return normed("norm", x)


@pytest.mark.parametrize("text, every, last", [("llama", 2, True), ("mpt", 1, False), ("opt", 4, True), ("gpt_neox", 3, True)])
def test_whole_model_against_its_parts_in_torch(text, every, last, tmp_path):
    config, given = open_flamingo(text, every, last), inputs()
    written(config, tmp_path)
    ours = mmjax.load(tmp_path)
    assert ours.config.cross_attention.layers == tuple(range(every - 1, 4, every))
    found, wanted = ours(given), reference(tmp_path, config, given)
    real = given["attention_mask"] == 1
    assert np.abs(np.asarray(found["logits"]) - wanted)[real].max() < 1e-4 * np.abs(wanted).max()
    assert found["image_features"].shape == (4, 2, 1, 4, 24) and found["connector_output"].shape == (4, 2, 5, 24)


@pytest.mark.parametrize("config", [open_flamingo("mpt"), open_flamingo("gpt_neox", 3, False), otter("llama"), otter("mpt")], ids=["mpt", "gpt_neox", "otter", "otter mpt"])
def test_files_both_ways(config, tmp_path):
    model = written(config, tmp_path / "first")
    again = mmjax.load(tmp_path / "first")
    assert again.config == model.config
    for path, leaf in tree.flatten(again.params).items():
        np.testing.assert_array_equal(np.asarray(leaf), tree.flatten(model.params)[path], path)
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    blocks = TEXTS[config["text_config"]["model_type"]][1]
    part = "feed_forward" if config["model_type"] == "otter" else "ff"
    names = set(stored(tmp_path / "first"))
    layer = config["cross_attn_every_n_layers"] - 1
    assert f"lang_encoder.{blocks}.{layer}.gated_cross_attn_layer.{part}.1.weight" in names
    assert sum(name.endswith("attn_gate") for name in names) == 4 // config["cross_attn_every_n_layers"]
    assert all(".decoder_layer." in name or ".gated_cross_attn_layer." in name for name in names if f"{blocks}." in name)


def test_frames_of_a_video_are_read_together(tmp_path):
    written(otter("llama"), tmp_path)
    ours = mmjax.load(tmp_path)
    given = inputs(frames=3)
    found = ours(given)
    assert found["image_features"].shape == (4, 2, 3, 4, 24) and found["connector_output"].shape == (4, 2, 64, 24)
    turned = ours({**given, "vision_x": given["vision_x"][:, :, ::-1]})
    assert np.abs(np.asarray(turned["logits"]) - np.asarray(found["logits"])).max() > 1e-3  # frames have their places
    with pytest.raises(ValueError, match="embeddings of 3 frames, not of 4"):
        ours(inputs(frames=4))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_published_checkpoint_over_the_frozen_parts(wrapped, tmp_path):
    """checkpoint.pt has what was trained and the embeddings; the language model and the tower are where config.json says."""
    config = open_flamingo("mpt")
    model = written(config, tmp_path / "whole")
    text = {**config["text_config"], "vocab_size": 88}  # before its vocabulary grew
    language = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**text))
    language.save_pretrained(tmp_path / "llm")
    tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**{k: v for k, v in TOWER.items() if k != "model_type"}))
    tower.save_pretrained(tmp_path / "clip")
    trained = {
        name: value
        for name, value in stored(tmp_path / "whole").items()
        if name.startswith("perceiver.") or ".gated_cross_attn_layer." in name or "wte" in name
    }
    place = tmp_path / "published"
    place.mkdir()
    content = {"epoch": 1, "model_state_dict": {f"module.{name}": value for name, value in trained.items()}} if wrapped else trained
    torch.save(content, place / "checkpoint.pt")
    named = {"lang_encoder_path": str(tmp_path / "llm"), "clip_vision_encoder_path": str(tmp_path / "clip")}
    kept = {name: value for name, value in config.items() if name not in ("text_config", "vision_config")}
    (place / "config.json").write_text(json.dumps({**kept, **named}))
    found = tree.flatten(mmjax.load(place).params)
    frozen = tree.flatten(mmjax.load(tmp_path / "llm").params)
    for path, leaf in tree.flatten(model.params).items():
        if path.startswith(("connector/", "llm/plugs/", "llm/embed/")):
            np.testing.assert_array_equal(np.asarray(found[path]), leaf, path)
        elif path.startswith("llm/"):
            np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(frozen[path]), path)
    assert found["vision/patch/kernel"].shape == (588, 24)
    trained.pop(next(iter(trained)))
    torch.save(trained, place / "checkpoint.pt")
    with pytest.raises(UserError, match="missing"):
        mmjax.load(place)


def test_pictures_and_text_must_agree(tmp_path):
    written(open_flamingo("llama"), tmp_path)
    ours, given = mmjax.load(tmp_path), inputs()
    with pytest.raises(UserError, match="row 0 of the text holds 2 media, but 1 are given"):
        ours({**given, "vision_x": given["vision_x"][:, :1]})
    with pytest.raises(UserError, match="none are given"):
        ours({name: value for name, value in given.items() if name != "vision_x"})
