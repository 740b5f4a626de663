"""Generation equals transformers' for a random Llama: greedy, penalised, by beams; and its own properties."""

import dataclasses

import numpy as np
import pytest

from mmjax import tree
from mmjax.batch import Batch
from mmjax.inference.generate import generate, pad_prompt, stream
from mmjax.inference.sampling import Sampling
from mmjax.models import decoder
from tests.models import tiny

torch = pytest.importorskip("torch")

NAMES = {"attention": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}}


@pytest.fixture(scope="module")
def pair():
    """The same random Llama twice: transformers' and ours, with a left-padded batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    for parameter in hf.parameters():
        parameter.data.normal_(0, 0.3)
    weights = {name: value.numpy() for name, value in hf.state_dict().items()}
    config = dataclasses.replace(tiny.model_config(layers=2), vision=None, connector=None)
    params = {
        "llm/embed/embedding": weights["model.embed_tokens.weight"],
        "llm/head/kernel": weights["lm_head.weight"].T,
        "llm/final_norm/scale": weights["model.norm.weight"],
    }

    def stack(name):
        return np.stack([weights[f"model.layers.{i}.{name}.weight"] for i in range(2)])

    for ours, theirs in NAMES["attention"].items():
        params[f"llm/layers/attention/{ours}/kernel"] = stack(f"self_attn.{theirs}").swapaxes(1, 2)
    for name in ("gate", "up", "down"):
        params[f"llm/layers/mlp/{name}/kernel"] = stack(f"mlp.{name}_proj").swapaxes(1, 2)
    params["llm/layers/attention_norm/scale"] = stack("input_layernorm")
    params["llm/layers/mlp_norm/scale"] = stack("post_attention_layernorm")
    ids = np.random.default_rng(1).integers(3, 64, (3, 9)).astype(np.int32)
    mask = np.ones((3, 9), np.int32)
    mask[1, :4] = ids[1, :4] = 0
    batch = Batch(tokens=ids, segments=mask, positions=np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32))
    return hf, tree.unflatten(params), config, batch


def theirs(hf, batch, **settings):
    ids, mask = torch.tensor(batch.tokens).long(), torch.tensor(batch.segments)
    return hf.generate(ids, attention_mask=mask, pad_token_id=0, do_sample=False, **settings)[:, 9:].numpy()


ENDS = (11, 30, 42, 57)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 64},
        {"repetition_penalty": 1.3, "min_new_tokens": 6},
        {"num_beams": 3, "repetition_penalty": 1.2, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never", "num_return_sequences": 2},
        {"num_beams": 4, "length_penalty": -1.0},
    ],
    ids=["greedy", "repetition", "beams", "long_beams", "short_beams"],
)
def test_equal_to_transformers(pair, settings):
    hf, params, config, batch = pair
    settings = {"max_new_tokens": 20, **settings}
    got = generate(params, config, batch, Sampling(end=ENDS, **settings)).tokens
    want = theirs(hf, batch, eos_token_id=list(ENDS), **settings)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)


def test_padding_on_either_side_and_rows_alone_give_the_same(pair):
    _, params, config, batch = pair
    sampling = Sampling(max_new_tokens=12)
    want = generate(params, config, batch, sampling).tokens
    right = {f: np.stack([np.roll(row, -4) if i == 1 else row for i, row in enumerate(getattr(batch, f))])
             for f in ("tokens", "segments", "positions")}  # fmt: skip
    np.testing.assert_array_equal(generate(params, config, Batch(**right), sampling).tokens, want)
    for row in range(3):
        alone = Batch(**{f: getattr(batch, f)[row : row + 1] for f in ("tokens", "segments", "positions")})
        np.testing.assert_array_equal(generate(params, config, alone, sampling).tokens[0], want[row])


def test_streamed_equals_whole_and_scores_are_the_logits(pair):
    _, params, config, batch = pair
    sampling = Sampling(max_new_tokens=10)
    whole = generate(params, config, batch, sampling, return_scores=True)
    parts = list(stream(params, config, batch, sampling, every=4))
    assert [part.shape[1] for part in parts] == [4, 8, 10]
    np.testing.assert_array_equal(parts[-1], whole.tokens)
    np.testing.assert_array_equal(whole.scores.argmax(-1), whole.tokens)


def test_sampling_is_reproducible_and_keeps_to_its_sets(pair):
    _, params, config, batch = pair

    def draw(seed, **settings):
        return generate(params, config, batch, Sampling(max_new_tokens=8, temperature=1.5, seed=seed, **settings)).tokens

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    greedy = generate(params, config, batch, Sampling(max_new_tokens=8)).tokens
    np.testing.assert_array_equal(draw(3, top_k=1), greedy)
    np.testing.assert_array_equal(draw(3, top_p=1e-6), greedy)


def test_prompts_are_padded_to_few_lengths():
    lengths = {pad_prompt(tiny.rows([[n]], n, images=False)).tokens.shape[1] for n in range(1, 400, 7)}
    assert lengths == {32, 64, 96, 128, 160, 192, 224, 256, 384, 512}


def test_neither_a_prompts_length_nor_a_seed_nor_a_limit_compiles_anew(pair):
    _, params, config, batch = pair

    def draw(length, new, seed):
        fields = {f: getattr(batch, f)[:, -length:] for f in ("tokens", "segments", "positions")}
        return generate(params, config, Batch(**fields), Sampling(max_new_tokens=new, temperature=1.0, seed=seed)).tokens

    assert draw(9, 8, 0).shape == (3, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "decode", None)  # nothing is traced any more
        assert draw(5, 12, 1).shape == (3, 12)


def test_several_draws_are_those_of_a_row_given_several_times(pair):
    _, params, config, batch = pair
    fields = ("tokens", "segments", "positions")
    twice = Batch(**{f: np.repeat(getattr(batch, f), 2, 0) for f in fields})
    settings = {"max_new_tokens": 8, "temperature": 1.0}
    got = generate(params, config, batch, Sampling(num_return_sequences=2, **settings)).tokens
    np.testing.assert_array_equal(got, generate(params, config, twice, Sampling(**settings)).tokens)
    assert (got[0::2] != got[1::2]).any()
