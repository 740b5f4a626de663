"""A prompt from a recipe to peft's layout: it does not act in the stage before its own, and no other layout holds it."""

from __future__ import annotations

import dataclasses

import pytest

import mmjax
from mmjax import config, tree
from mmjax.errors import UserError
from mmjax.jobs import export, train
from tests.jobs.test_train import recipe  # noqa: F401  (a fixture)


def prompted(recipe: config.Recipe) -> config.Recipe:  # noqa: F811
    align = dataclasses.replace(
        recipe.stages["align"], trainable=("connector/**",), validation=config.Validation(), epochs=0.0, steps=1, idle=("tune",)
    )
    own = dataclasses.replace(align, trainable=("llm/prompts/tune/**",), idle=())
    adapter = config.Adapter(kind="p_tuning", tokens=2, encoder_width=4)
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, adapters={"tune": adapter}),
        stages={"align": align, "prompt": own},
        run=("align", "prompt"),
        export=config.Export(format="peft"),
    )


def test_trained_and_written(one_device, recipe, tmp_path):  # noqa: F811
    whole = prompted(recipe)
    train.run(whole, tmp_path)
    model = mmjax.load(tmp_path)
    assert "llm/prompts/tune/encoder/mlp/linear_2/kernel" in tree.flatten(model.params)  # training can be gone on with
    export.run(whole, tmp_path)  # compares what is read back
    again = mmjax.load(tmp_path / "export")
    assert again.config.adapters[0].settled and again.encoder().virtual == 2
    with pytest.raises(UserError, match="tune: prompts and prefixes stand in front of the text, and no weights can hold them"):
        model.save_pretrained(tmp_path / "out")


def test_what_cannot_be_meant_is_said_before_anything_is_compiled(recipe, tmp_path):  # noqa: F811
    whole = prompted(recipe)

    def with_stage(**changes):
        return dataclasses.replace(whole, stages={**whole.stages, "prompt": dataclasses.replace(whole.stages["prompt"], **changes)})

    with pytest.raises(UserError, match="stages.prompt.idle names 'tuned', and the model's adapters are tune"):
        train.run(with_stage(idle=("tuned",)), tmp_path / "a")
    with pytest.raises(UserError, match="stages.prompt.trainable has llm/prompts/tune/.* of an adapter that stages.prompt.idle"):
        train.run(with_stage(idle=("tune",)), tmp_path / "b")
    for changes, said in (
        ({"encoder_depth": 3}, "encoder='mlp' has two hidden layers"),
        ({"projected": True}, "adapters.tune.projected is not read by an adapter of kind 'p_tuning'"),
        ({"kind": "prefix", "encoder_width": 4}, "encoder_width is of the MLP that makes a prefix"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
    ):
        wrong = dataclasses.replace(whole.model.adapters["tune"], **{"encoder_width": 0, **changes})
        values = config.to_config_dict(dataclasses.replace(whole, model=dataclasses.replace(whole.model, adapters={"tune": wrong})))
        with pytest.raises(UserError, match=said):
            config.from_config_dict(values)
    early = dataclasses.replace(whole, export=config.Export(format="hf", after_training=True))
    with pytest.raises(UserError, match="export.format is 'hf', but no weights can hold the adapter 'tune'"):
        config.from_config_dict(config.to_config_dict(early))
