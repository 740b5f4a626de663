"""Prompts and prefixes in our own model: packed rows, pictures, generation, counts at full size."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmjax import active_adapters, tree
from mmjax.config import Optimizer, Stage
from mmjax.data.collation import collate
from mmjax.data.encoding import Example
from mmjax.errors import UserError
from mmjax.inference.generate import generate
from mmjax.inference.sampling import Sampling
from mmjax.models import multimodal, prefix, prompts
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.tuning_config import MultitaskPromptConfig, PrefixConfig, PromptConfig, PTuningConfig
from tests.models import tiny
from tests.models.test_encoder_decoder import CONFIG as SEQUENCE

TUNED = (
    PromptConfig("plain", 2),
    MultitaskPromptConfig("tasks", 3, tasks=2, task_rank=2),
    PTuningConfig("encoded", 2, encoder="lstm", encoder_width=6),
    PrefixConfig("made", 2, projected=True, encoder_width=6),
    PrefixConfig("held", 3),
)
# Beside a LoRA; the pattern of windows ends in its middle.
CONFIG = tiny.model_config(3, windows=(0, 6), adapters=(tiny.LORA, *TUNED))
VIRTUAL = 7


def example(number: int, length: int, task: int, image: bool) -> Example:
    """A sample as an Encoder makes it: places of virtual tokens, then a picture of four tokens where it has one, then text."""
    rng = np.random.default_rng(number)
    media = np.full(VIRTUAL + length, -1, np.int32)
    media[VIRTUAL : VIRTUAL + 4 * image] = np.arange(4 * image)
    ids = np.where((media < 0) & (np.arange(len(media)) >= VIRTUAL), rng.integers(3, 64, len(media)), 0).astype(np.int32)
    labels = np.where(np.arange(len(ids)) >= len(ids) - 2, ids, -100).astype(np.int32)
    pixels = rng.integers(0, 256, (1, 28, 28, 3), np.uint8) if image else None
    shown = ({"type": "image"},) * image
    return Example(str(number), ids, labels, media, shown, pixels, tile_tokens=4, task=task)


EXAMPLES = [example(0, 9, 1, True), example(1, 6, 0, False), example(2, 8, 1, True)]


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(CONFIG)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, batch, config):
    return multimodal.head(params, config, multimodal.hidden(params, config, batch, Execution()))


def logits(params, config, batch):
    return np.asarray(_logits(params, batch, config))


def rows(packed: list[list[Example]]):
    return collate(packed, length=48, tiles=2, media_shape=(28, 28, 3), virtual=VIRTUAL)


def test_packed_samples_have_what_they_have_alone(params):
    batch = rows([EXAMPLES])
    np.testing.assert_array_equal(batch.virtual[0, 16 : 16 + VIRTUAL + 1], [*range(VIRTUAL), -1])
    np.testing.assert_array_equal(batch.task[0, [0, 16, 29]], [1, 0, 1])
    assert batch.weights.sum() == 6 and (batch.targets[0, :VIRTUAL] == 0).all()
    together, at = logits(params, CONFIG, batch)[0], 0
    alone = logits(params, CONFIG, rows([[one] for one in EXAMPLES]))
    for one, found in zip(EXAMPLES, alone):
        here = slice(at, at + len(one.ids))
        at += len(one.ids)
        np.testing.assert_allclose(together[here], found[: len(one.ids)], atol=2e-5)


def test_packed_samples_of_an_encoder_decoder():
    """The encoder reads the virtual tokens, the decoder the prefix; distances to both are those within the sample."""
    config = dataclasses.replace(SEQUENCE, adapters=(PromptConfig("plain", VIRTUAL), PrefixConfig("held", 3)))
    params = tiny.random_params(config)
    read = [dataclasses.replace(one, ids=one.ids % 32, decoder_ids=one.ids[-n:] % 32, decoder_labels=one.ids[-n:] % 32)
            for one, n in ((EXAMPLES[1], 3), (example(3, 4, 0, False), 2))]  # fmt: skip
    sizes = {"length": 32, "answer_length": 6, "virtual": VIRTUAL}
    together = logits(params, config, collate([read], **sizes))[0]
    for one, found, at in zip(read, logits(params, config, collate([[one] for one in read], **sizes)), (0, 3)):
        np.testing.assert_allclose(together[at : at + len(one.decoder_ids)], found[: len(one.decoder_ids)], atol=2e-5)


def test_each_of_them_changes_the_text_and_tasks_differ(params):
    batch = rows([EXAMPLES[:1]])
    whole = logits(params, CONFIG, batch)
    other = dataclasses.replace(batch, task=np.zeros_like(batch.task))
    assert np.abs(logits(params, CONFIG, other) - whole).max() > 1e-3
    flat = tree.flatten(params)
    for adapter in TUNED:
        names = [path for path in flat if path.startswith((f"llm/prompts/{adapter.name}/", f"llm/plugs/{adapter.name}/"))]
        assert names
        changed = tree.unflatten({**flat, **{path: flat[path] * 1.5 for path in names}})
        assert np.abs(logits(changed, CONFIG, batch) - whole)[0, VIRTUAL:16].max() > 1e-4


def test_generated_behind_padding_and_from_the_cache(params):
    """As if every token were computed from the whole text."""
    answers = generate(params, CONFIG, rows([[EXAMPLES[0]], [EXAMPLES[1]]]), Sampling(max_new_tokens=4)).tokens
    text, written = EXAMPLES[1], []
    for _ in range(4):
        grown = dataclasses.replace(
            text,
            ids=np.append(text.ids, np.array(written, np.int32)).astype(np.int32),
            labels=np.full(len(text.ids) + len(written), -100, np.int32),
            media=np.full(len(text.ids) + len(written), -1, np.int32),
        )
        found = logits(params, CONFIG, rows([[grown], [EXAMPLES[0]]]))
        written.append(int(found[0, len(grown.ids) - 1].argmax()))
    assert answers[1].tolist() == written


def test_they_act_or_not_and_are_not_weighed(params):
    names = [adapter.name for adapter in TUNED]
    bare = dataclasses.replace(EXAMPLES[0], ids=EXAMPLES[0].ids[VIRTUAL:], labels=EXAMPLES[0].labels[VIRTUAL:], media=EXAMPLES[0].media[VIRTUAL:])
    batch = dataclasses.replace(rows([[bare]]), virtual=None, task=None)
    none = active_adapters.choose(params, CONFIG, ["default"])
    assert none[1] == CONFIG.without(names) and prompts.count(none[1]) == prefix.count(none[1]) == 0
    base = {**params, "llm": {name: leaf for name, leaf in params["llm"].items() if name not in ("plugs", "prompts")}}
    np.testing.assert_array_equal(logits(*none, batch), logits(base, CONFIG.without(names), batch))
    assert prompts.count(active_adapters.choose(params, CONFIG, ["plain", "held"])[1]) == 2
    for name in names:
        with pytest.raises(UserError, match=f"adapter '{name}' adds positions, keys or modules, which are there or not"):
            active_adapters.choose(params, CONFIG, {name: 0.5})


def test_a_batch_without_places_is_refused(params):
    with pytest.raises(ValueError, match="no places for their virtual tokens"):
        multimodal.embed(params, CONFIG, collate([EXAMPLES[1:2]]), Execution())


def test_training_changes_them_alone():
    """Fifty steps through an LSTM and an MLP: the loss falls, frozen bytes stay, optimizer state is theirs alone."""
    from tests.training import tiny as training
    from tests.training.test_step import Run

    tuned = (PTuningConfig("encoded", 2, encoder="lstm", encoder_width=4), PrefixConfig("made", 2, projected=True, encoder_width=4))
    config = dataclasses.replace(training.CONFIG, adapters=tuned)
    stage = Stage(trainable=("llm/prompts/**",), optimizer=Optimizer(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0), steps=50)
    run = Run(stage, model=config)
    before = jax.tree.map(np.array, run.frozen)
    batch = run.put(prompts.prepended(config, training.batch()))
    state, losses = run.fresh(), []
    for _ in range(50):
        state, metrics = run.step(state, run.frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.3
    assert {path.split("/")[2] for path in tree.flatten(state.trainable)} == {"encoded", "made"}
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, run.frozen))
    trained, moments = (sum(leaf.size for leaf in jax.tree.leaves(each)) for each in (state.trainable, state.optimizer))
    assert 2 * trained <= moments <= 2 * trained + 8


def language(layers: int, width: int, heads: int) -> ModelConfig:
    """The sizes that count here."""
    block = dataclasses.replace(tiny.LLAMA_BLOCK, width=width, heads=heads, kv_heads=heads, head_dim=width // heads, mlp_width=8)
    return ModelConfig(llm=DecoderConfig(8, layers, block, 8))


@pytest.mark.parametrize(
    "adapter, base, count",
    [
        # arXiv 2104.08691, figure 2: five tokens for T5 XXL, "20,480 parameters per task"
        (PromptConfig("x", 5), language(24, 4096, 64), 20_480),
        # arXiv 2303.02861: 100 tokens for T5-Base, the shared prompt and the task's two vectors: 0.035 % of its 222,903,552 parameters
        (MultitaskPromptConfig("x", 100), language(12, 768, 12), 77_668),
        # peft's PeftModelForCausalLM: gpt2-large with 20 tokens, "trainable params: 1843200"
        (PrefixConfig("x", 20), language(36, 1280, 20), 1_843_200),
        # the same projected: 20 vectors, an MLP of 1280 hidden channels
        (PrefixConfig("x", 20, projected=True), language(36, 1280, 20), 20 * 1280 + 1281 * 1280 + 1281 * 36 * 2 * 1280),
    ],
)
def test_counts_at_full_size(adapter, base, count):
    shapes = tree.flatten(multimodal.shapes(dataclasses.replace(base, adapters=(adapter,))))
    own = {path: leaf for path, leaf in shapes.items() if path.startswith(("llm/prompts/x/", "llm/plugs/x/"))}
    assert sum(leaf.size for leaf in own.values()) == count
