"""Every recipe: its expanded form is the stored one, it is valid, and `tiny` changes sizes, steps and data only."""

from __future__ import annotations

import re

import pytest

from mmjax import tree
from mmjax.config import Recipe, from_config_dict
from tests.configs import expand

VARIANTS = expand.variants()

SIZES_STEPS_DATA = re.compile(
    r"name"
    r"|model\.path|model\.(llm|vision)\.path|model\.image\.(size|overlap)"
    r"|model\.connector\.(path|bert|tokenizer|hidden_width|squeeze_width|pooled_tokens|depth|latents|heads|head_dim|grid)"
    r"|model\.connector\.(text_vocab|text_positions|text_length|contrast_width)"
    r"|model\.cross_attention\.(every|first|heads|head_dim)"
    r"|model\.feature_layers"  # of an encoder with fewer blocks
    r"|model\.tokenizer\.(path|vocab_size|min_frequency)"
    r"|model\.adapters\.\w+\.(rank|alpha|length|depth|tokens|encoder_width)"
    r"|stages\.\w+\.(steps|epochs|rows|length|answer_length|tiles|accumulate)"
    r"|stages\.\w+\.validation\.(every|batches|patience)"
    r"|stages\.\w+\.(validation\.)?sources\..*"
    r"|evaluations\.\w+\.(source\..*|max_new_tokens|batch|limit|samples)"
    r"|(checkpoint|logging)\.every|generate\.max_new_tokens"
)


def recipe(name: str, argument: str) -> Recipe:
    return from_config_dict(expand.config(name, argument))


@pytest.mark.parametrize("name, argument", VARIANTS, ids=[f"{n}:{a}" for n, a in VARIANTS])
def test_expanded_form_is_the_stored_one(name, argument):
    stored = expand.path(name, argument)
    assert stored.exists() and stored.read_text() == expand.text(name, argument), (
        f"configs/{name}.py or a default has changed; if that is meant: python -m tests.configs.expand"
    )


def test_nothing_is_stored_of_recipes_that_are_gone():
    assert {path.name for path in expand.EXPANDED.glob("*")} == {expand.path(*variant).name for variant in VARIANTS}


@pytest.mark.parametrize("name, argument", VARIANTS, ids=[f"{n}:{a}" for n, a in VARIANTS])
def test_a_model_is_asked_as_its_last_stage_taught_it(name, argument):
    whole = expand.config(name, argument)
    last = whole.stages[whole.run[-1]]
    assert name == "gallery_base" or last.template in ("", whole.model.template)  # the base is only ever trained further


@pytest.mark.parametrize("name, argument", VARIANTS, ids=[f"{n}:{a}" for n, a in VARIANTS])
def test_tiny_changes_only_sizes_steps_and_data(name, argument):
    full = expand.config(name, argument).to_dict()
    tiny = expand.config(name, f"{argument},tiny").to_dict()
    if not full["model"]["path"] and not full["model"]["llm"]["config"]:  # continues from whatever directory it is given
        for part in ("llm", "vision"):
            full["model"][part] = tiny["model"][part]
    assert list(full["stages"]) == list(tiny["stages"])
    one, other = ({path.replace("/", "."): leaf for path, leaf in tree.flatten(d).items()} for d in (full, tiny))
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) == other.get(key) or SIZES_STEPS_DATA.fullmatch(key):
            continue
        numbers = all(isinstance(value, (int, float, type(None))) for value in (one.get(key), other.get(key)))
        assert re.fullmatch(r"model\.(llm|vision)\.config\.\w+", key) and numbers, f"tiny changes {key}"
    assert one["name"] != other["name"]  # or they would share a workdir


@pytest.mark.parametrize("name, argument", VARIANTS, ids=[f"{n}:{a}" for n, a in VARIANTS])
def test_tiny_is_valid_and_needs_no_files(name, argument):
    small = recipe(name, f"{argument},tiny")
    assert small.run
    for stage in small.stages.values():
        assert 0 < stage.steps <= 100 or stage.epochs
        assert not any(source.path for source in stage.sources.values())
    assert not (small.model.path or small.model.llm.path or small.model.vision.path or small.model.tokenizer.path)
