"""--job=train from a recipe to a workdir that says everything about itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import config, tree
from mmjax.errors import UserError
from mmjax.jobs import train
from tests import small_workdir
from tests.configs import expand

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> config.Recipe:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(24):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (20, 16), COLOURS[name]).save(folder / f"{i}.png")
        if i == 5:
            (folder / "5.png").write_bytes(b"\x89PNG broken")
        asked = [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "Which colour?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]
        lines.append(json.dumps({"id": f"s{i}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    source = config.Source(kind="messages", path=str(folder / "data.jsonl"), images=str(folder))
    stage = config.Stage(
        sources={"colours": source},
        epochs=1.0,
        rows=8,
        length=32,
        packing=False,
        optimizer=config.Optimizer(learning_rate=1e-2, warmup_ratio=0.0),
        validation=config.Validation(sources={"colours": source}, every=2, batches=1),
    )
    return config.Recipe(
        name="colours",
        model=config.Model(
            llm=small_workdir.MODEL.llm,
            vision=config.Part(
                config=dict(
                    model_type="siglip_vision_model",
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=32,
                    image_size=16,
                    patch_size=8,
                )
            ),
            image=config.Image(aspect="squash"),
            tokenizer=config.Tokenizer(kind="word"),
            template="plain",
            adapters={"tune": config.Adapter(rank=2, targets=("llm/layers/attention/*",))},
        ),
        stages={"align": dataclasses.replace(stage, trainable=("connector/**", "llm/**/lora_*"))},
        run=("align",),
        loader=config.Loader(max_broken=0.2),
        logging=config.Logging(every=1, tensorboard=False),
    )


@pytest.fixture(scope="module")
def workdir(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.run(recipe, folder)
    return folder


def test_the_workdir_describes_the_run(recipe, workdir):
    assert config.read_recipe(workdir) == recipe
    for name in ("first_batch_align.png", "losses.png", "README.md", "sharding.txt"):
        assert (workdir / name).stat().st_size > 0, name
    results = json.loads((workdir / "results.json").read_text())
    assert results["train_seconds"] > 0 and np.isfinite(results["loss_align"]) and "validation_loss_align" in results
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("align", step) for step in (1, 2, 3)
    ]
    skipped = [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    assert {line["id"] for line in skipped} == {"s5"}


def test_the_model_loads_from_the_workdir_alone(workdir):
    model = mmjax.load(workdir)
    flat = tree.flatten(model.params)
    assert any(np.any(np.asarray(leaf)) for path, leaf in flat.items() if path.endswith("lora_b"))
    assert isinstance(model.chat([{"role": "user", "content": [{"type": "text", "text": "Which colour?"}]}], 2), str)


def test_the_same_command_again_trains_nothing(recipe, workdir):
    before = (workdir / "metrics.jsonl").read_text()
    params = jax.tree.map(np.asarray, mmjax.load(workdir).params)
    train.run(recipe, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before
    for path, leaf in tree.flatten(mmjax.load(workdir).params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(params)[path])


@pytest.mark.parametrize("name", ["quickstart", *expand.systems()])
def test_a_recipe_goes_on_in_its_own_workdir(name, tmp_path):
    shipped = config.from_config_dict(expand.config(name, ""))
    config.write_recipe(shipped, tmp_path)
    for stage in shipped.run:
        (tmp_path / "checkpoints" / stage / "1").mkdir(parents=True)
    train.check_same_run(shipped, tmp_path)


def test_another_recipe_is_refused_by_the_keys_that_differ(recipe, workdir):
    other = config.from_config_dict(config.to_config_dict(recipe))
    other.stages["align"].optimizer.learning_rate = 0.5
    other.model.llm.config["hidden_size"] = 64
    other.stages["align"].remat = "full"  # how it is run may change
    with pytest.raises(UserError) as error:
        train.run(other, workdir)
    assert "stages.align.optimizer.learning_rate was 0.01 and is 0.5" in str(error.value)
    assert "model.llm.config.hidden_size was 32 and is 64" in str(error.value)
    assert "remat" not in str(error.value)


def test_a_mask_that_matches_nothing_is_said_before_anything_is_compiled(recipe, tmp_path):
    wrong = dataclasses.replace(recipe.stages["align"], trainable=("connectors/**",))
    with pytest.raises(UserError, match="stages.align.trainable: 'connectors/\\*\\*' matches no parameter"):
        train.run(dataclasses.replace(recipe, stages={**recipe.stages, "align": wrong}), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
