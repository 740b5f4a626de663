"""What remains to be drawn from equals what transformers' warpers leave; settings are read and refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.inference.sampling import Sampling, choose, from_file, penalised, warped

torch = pytest.importorskip("torch")

from transformers.generation import logits_process as theirs  # noqa: E402

LOGITS = np.random.default_rng(0).normal(0, 3, (16, 50)).astype(np.float32)
WARPERS = {
    "top_k": theirs.TopKLogitsWarper,
    "top_p": theirs.TopPLogitsWarper,
    "min_p": theirs.MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_k": 500},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 0.5, "top_p": 1e-6},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_what_remains_equals_transformers(settings):
    want = torch.tensor(LOGITS) / settings["temperature"]
    for name, warper in WARPERS.items():
        want = warper(settings[name])(None, want) if name in settings else want
    found = np.asarray(warped(jnp.asarray(LOGITS), Sampling(**settings)))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(want.numpy()))
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution():
    sampling = Sampling(temperature=1.2, top_k=6, top_p=0.95)
    logits = jnp.tile(jnp.asarray(LOGITS[:1]), (4000, 1))
    drawn = np.bincount(choose(logits, jnp.int32(3), jax.random.key(1), sampling), minlength=50) / 4000
    expected = np.asarray(jax.nn.softmax(warped(logits[:1], sampling))[0])
    assert not drawn[expected == 0].any()
    assert np.abs(drawn - expected).max() < 0.03


def test_penalties_equal_transformers():
    ids = np.random.default_rng(1).integers(0, 50, (16, 12))
    seen = np.zeros((16, 50), bool)
    np.put_along_axis(seen, ids, True, 1)
    sampling = Sampling(repetition_penalty=1.7, min_new_tokens=3, end=(4, 9), forced_eos_token_id=9)
    want = theirs.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids), torch.tensor(LOGITS)).numpy()
    found = penalised(jnp.asarray(LOGITS), jnp.asarray(seen), jnp.int32(3), jnp.int32(8), sampling)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    early = np.asarray(penalised(jnp.asarray(LOGITS), jnp.asarray(seen), jnp.int32(2), jnp.int32(8), sampling))
    assert (early[:, [4, 9]] == -np.inf).all()
    last = np.asarray(penalised(jnp.asarray(LOGITS), jnp.asarray(seen), jnp.int32(7), jnp.int32(8), sampling))
    assert (last.argmax(1) == 9).all() and np.isinf(last).sum() == 16 * 49


def test_what_a_generation_config_asks_for():
    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "num_beams": 1, "repetition_penalty": 1.05}
    assert from_file(file) == {"num_beams": 1, "repetition_penalty": 1.05}
    assert from_file({"no_repeat_ngram_size": 0, "bad_words_ids": None, "guidance_scale": 1.0}) == {}
    with pytest.raises(UserError, match="no_repeat_ngram_size"):
        from_file({"no_repeat_ngram_size": 3})
    with pytest.raises(UserError, match="forced_eos_token_id"):
        from_file({"forced_eos_token_id": [1, 2]})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2, "temperature": 1.0}, "beam search is not sampled"),
        ({"num_return_sequences": 2}, "several answers"),
        ({"num_beams": 2, "num_return_sequences": 3}, "several answers"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
