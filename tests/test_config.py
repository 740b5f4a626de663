"""Recipes to ConfigDicts and back, and what is said about recipes that cannot be meant."""

from __future__ import annotations

import pytest

from mmjax import config_checks
from mmjax.config import (
    Adapter,
    Connector,
    Mesh,
    Model,
    Optimizer,
    Part,
    Recipe,
    Source,
    Stage,
    Validation,
    from_config_dict,
    parse_arguments,
    read_recipe,
    to_config_dict,
    write_recipe,
)
from mmjax.errors import UserError


def recipe(**changes) -> Recipe:
    fields = dict(
        name="small",
        model=Model(
            llm=Part(config={"model_type": "llama", "rope_scaling": {"factors": [1.0, 2.0]}, "pad_token_id": None}),
            adapters={"default": Adapter(rank=4)},
        ),
        stages={
            "second": Stage(steps=2, sources={"digits": Source(kind="digits", options={"size": 8})}),
            "first": Stage(
                epochs=1.0,
                sources={"digits": Source(kind="digits")},
                optimizer=Optimizer(multipliers={"llm/**": 0.1, "connector/**": 2.0}),
            ),
        },
        run=("first", "second"),
    )
    return Recipe(**{**fields, **changes})


def problems(values) -> str:
    with pytest.raises(UserError) as error:
        from_config_dict(values)
    return str(error.value)


def test_there_and_back():
    original = recipe()
    back = from_config_dict(to_config_dict(original))
    assert back == original
    assert back.model.system is None
    assert list(back.stages) == ["second", "first"] and list(back.stages["first"].optimizer.multipliers) == ["llm/**", "connector/**"]


def test_every_field_is_there_to_be_overridden():
    values = to_config_dict(recipe())
    values.model.system = "You see."  # None as a default takes a string
    values.stages.first.optimizer.learning_rate = 1  # and a whole number is a number
    values.mesh.fsdp = -1
    values.mesh.data = 1
    changed = from_config_dict(values)
    assert changed.model.system == "You see."
    assert changed.stages["first"].optimizer.learning_rate == 1.0
    assert changed.mesh == Mesh(data=1, fsdp=-1)


def test_stored_recipe(tmp_path):
    write_recipe(recipe(), tmp_path)
    assert read_recipe(tmp_path) == recipe()
    with pytest.raises(UserError, match="nowhere.recipe.json does not exist"):
        read_recipe(tmp_path / "nowhere")
    (tmp_path / "recipe.json").write_text('{"name": ')
    with pytest.raises(UserError, match="is not JSON"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("stages.first.optimiser", "stages.first.optimizer"),  # a sibling
        ("stages.first.learning_rate", "stages.first.optimizer.learning_rate"),  # the same name, one level down
        ("model.adapters.default.rnk", "model.adapters.default.rank"),
        ("modell", "model"),
        ("stages.second.sources.digits.imags", "stages.second.sources.digits.images"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    values = to_config_dict(recipe()).to_dict()
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    node[last] = 1
    assert f"{key} is not a key of a recipe; the nearest one is {nearest}." in problems(values)


def test_all_problems_are_reported_at_once():
    values = to_config_dict(recipe()).to_dict()
    values["stages"]["first"]["rows"] = "many"
    values["stages"]["first"]["packing"] = 1
    values["stages"]["second"]["remat"] = "ful"
    values["run"] = 3
    values["model"]["feature_layers"] = (-2, "x")
    values["model"]["vision"] = "clip"
    values["surprise"] = 1
    said = problems(values)
    assert "stages.first.rows must be a whole number, not 'many'." in said
    assert "stages.first.packing must be true or false, not 1." in said
    assert "stages.second.remat is 'ful'; it must be one of 'none', 'dots', 'full'. Did you mean 'full'?" in said
    assert "run must be a list of strings, not 3." in said
    assert "model.feature_layers[1] must be a whole number, not 'x'." in said
    assert "model.vision must be a group of keys (path, config), not 'clip'." in said
    assert "surprise is not a key" in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"run": ("first", "secnd")}, "run names a stage 'secnd' that does not exist (stages: second, first). Did you mean 'second'?"),
        ({"run": ("first", "first")}, "run names stage 'first' twice"),
        ({"stages": {"first": Stage(sources={"d": Source(kind="digits")})}, "run": ("first",)}, "stages.first: give either steps or epochs (steps=0, epochs=0)."),
        (
            {"stages": {"first": Stage(steps=1, epochs=1.0, sources={"d": Source(kind="digits")})}, "run": ("first",)},
            "stages.first: give either steps or epochs (steps=1, epochs=1).",
        ),
        ({"stages": {"first": Stage(steps=1)}, "run": ("first",)}, "stages.first.sources is empty"),
        (
            {"stages": {"first": Stage(steps=1, rows=6, accumulate=4, sources={"d": Source()})}, "run": ("first",)},
            "stages.first.rows is 6, which stages.first.accumulate=4 micro-batches do not divide.",
        ),
        ({"stages": {"first": Stage(steps=1, sources={"d": Source(kind="llava")})}, "run": ("first",)}, "stages.first.sources.d.path is empty"),
        (
            {"stages": {"first": Stage(steps=1, sources={"d": Source(kind="digits")}, validation=Validation(patience=2))}},
            "stages.first.validation.patience is 2 but stages.first.validation.every is 0",
        ),
        ({"stages": {"first": Stage(steps=1, label_smoothing=1.5, sources={"d": Source(kind="digits")})}}, "stages.first.label_smoothing is 1.5; it must be between 0 and 1."),
        ({"model": Model()}, "model names no parts"),
        ({"model": Model(path="somewhere", llm=Part("elsewhere"))}, "model.llm is given beside model.path='somewhere'"),
        ({"model": Model(llm=Part(config={"hidden_size": 4}))}, "model.llm.config has no model_type"),
        ({"model": Model(llm=Part("x"), connector=Connector(kind="mlp_gelu"))}, "model.connector.kind is 'mlp_gelu'; it must be one of linear, mlp,"),
        ({"model": Model(llm=Part("x"), template="chatlm")}, "Did you mean 'chatml'?"),
        ({"model": Model(llm=Part("x"), adapters={"a": Adapter(rank=0)})}, "model.adapters.a.rank is 0; it must be at least 1."),
        ({"mesh": Mesh(data=-1, fsdp=-1)}, "mesh: only one axis may be -1"),
        ({"mesh": Mesh(tensor=0)}, "mesh.tensor is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(changes, said):
    assert said in problems(to_config_dict(recipe(**changes)))


def test_missing_files_are_those_the_job_reads(tmp_path):
    here = tmp_path / "here.jsonl"
    here.write_text("")
    stage = Stage(steps=1, sources={"a": Source(kind="messages", path=str(here), images="/nowhere/*.tar"), "b": Source(path="/nowhere/b.json")})
    model = Model(llm=Part("/nowhere/llm"), vision=Part("owner/name-of-a-repository"))
    unrun = Stage(steps=1, sources={"c": Source(path="/nowhere/c.json")})
    made = recipe(model=model, stages={"first": stage, "other": unrun}, run=("first",))
    keys = [line.split(" is ")[0] for line in config_checks.missing_files(made, "train")]
    assert keys == ["model.llm.path", "stages.first.sources.a.images", "stages.first.sources.b.path"]
    assert [line.split(" is ")[0] for line in config_checks.missing_files(made, "chat")] == ["model.llm.path"]
    assert config_checks.missing_files(made, "plan") == []


WORDS = {"size": ("7b", "13b"), "peft": ("full", "lora"), "tiny": False, "data": "", "rank": 8}


def test_arguments_combine():
    chosen = parse_arguments("13b,peft=lora, tiny,data=a=b.jsonl,rank=16", WORDS)
    assert vars(chosen) == {"size": "13b", "peft": "lora", "tiny": True, "data": "a=b.jsonl", "rank": 16}
    assert vars(parse_arguments("", WORDS)) == {"size": "7b", "peft": "full", "tiny": False, "data": "", "rank": 8}


@pytest.mark.parametrize(
    "argument, said",
    [
        ("14b", "'14b' is not known to this recipe. It knows: size=7b|13b (or the bare word); peft=full|lora"),
        ("peft=qlora", "'peft=qlora' is not known"),
        ("tiny=1", "'tiny=1' is not known"),
        ("data", "'data' is not known"),
        ("rank=high", "rank takes a whole number, 'high' is none"),
        ("7b,13b", "size was already given as '7b'"),
    ],
)
def test_arguments_that_are_not_known(argument, said):
    with pytest.raises(UserError) as error:
        parse_arguments(argument, WORDS)
    assert said in str(error.value)
