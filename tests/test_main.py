"""The command line: overrides, what is refused before any job starts, exit codes."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from absl import flags

from mmjax.config import read_recipe, write_recipe
from mmjax.errors import UserError
from mmjax.main import main, read_command

QUICK = "--config=configs/llava15.py:tiny"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])


def test_overrides_reach_the_recipe():
    recipe, job, workdir = read_command(
        [
            QUICK,
            "--config.stages.pretrain.steps=7",
            "--config.stages.pretrain.optimizer.learning_rate",
            "1",
            "--noconfig.stages.finetune.packing",
            "--config.run=pretrain",
            "--config.model.system=Look.",
            "--config.model.llm.config.num_hidden_layers=3",
            "--config.model.llm.config.attention_bias=true",
            "--config.model.adapters={'default': {'rank': 2}}",
            "--config.stages.finetune.optimizer.multipliers={'connector/**': 0.5}",
        ]
    )
    assert (job, workdir) == ("train", Path("workdirs/llava15_7b_tiny"))
    assert recipe.stages["pretrain"].steps == 7 and recipe.stages["pretrain"].optimizer.learning_rate == 1.0
    assert not recipe.stages["finetune"].packing and recipe.stages["finetune"].optimizer.multipliers == {"connector/**": 0.5}
    assert recipe.run == ("pretrain",) and recipe.model.system == "Look." and recipe.model.adapters["default"].rank == 2
    assert recipe.model.llm.config["num_hidden_layers"] == 3 and recipe.model.llm.config["attention_bias"] is True
    assert read_command([QUICK, "--config.run=pretrain,finetune"])[0].run == ("pretrain", "finetune")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no recipe: say --config=configs/NAME.py"),
        (["--config=configs/llava16.py"], "configs/llava16.py does not exist. Did you mean configs/llava15.py?"),
        (["--config=configs/llava15.py:14b"], "config argument '14b' is not known to this recipe. It knows: size=7b|13b"),
        ([QUICK, "--config.stages.pretrain.step=3"], "the nearest one is stages.pretrain.steps"),
        ([QUICK, "--config.stages.pretrian.steps=3"], "the nearest one is stages.pretrain.steps"),
        ([QUICK, "--config.stages.pretrain.steps=few"], "--config.stages.pretrain.steps=few: invalid literal for int()"),
        ([QUICK, "--config.stages.pretrain.remat=all"], "stages.pretrain.remat is 'all'; it must be one of 'none', 'dots', 'full'"),
        ([QUICK, "--config.stages.finetune.optimizer.multipliers.llm/**=2"], "Give the dictionary it belongs to as a whole"),
        ([QUICK, "--job=fly"], "value should be one of <train|evaluate|generate|chat|export|plan>"),
        ([QUICK, "--jop=plan"], "Unknown command line flag 'jop'"),
        ([QUICK, "plan"], "'plan' is neither a flag nor the value of one"),
        (["--config=configs/llava15.py"], "--config.stages.pretrain.sources.captions.path=PATH"),
        (["--job=chat", "--workdir=/nowhere"], "/nowhere/recipe.json does not exist"),
        ([QUICK, "--workdir=gs://bucket/run"], "is no folder: mount it"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises((UserError, flags.Error)) as error:
        read_command(arguments)
    assert said in str(error.value)


def test_unknown_keys_are_all_named():
    with pytest.raises(UserError) as error:
        read_command([QUICK, "--config.sead=1", "--config.model.lllm.path=x"])
    assert "'sead'; the nearest one is seed." in str(error.value) and "model.llm.path" in str(error.value)


def test_a_workdir_brings_its_recipe(tmp_path):
    recipe, _, _ = read_command([QUICK])
    write_recipe(recipe, tmp_path)
    again, job, workdir = read_command([f"--workdir={tmp_path}", "--job=chat", "--config.generate.temperature=0.5"])
    assert (job, workdir, again.generate.temperature) == ("chat", tmp_path, 0.5)
    again.generate.temperature = recipe.generate.temperature
    assert again == recipe == read_recipe(tmp_path)
    with pytest.raises(UserError, match="no recipe"):  # training never guesses
        read_command([f"--workdir={tmp_path}"])


def test_exit_codes(monkeypatch, capsys, tmp_path):
    calls = []

    def run(recipe, workdir):
        calls.append((recipe.name, workdir))
        if workdir.name == "bad":
            raise UserError("the picture is upside down; turn it")

    monkeypatch.setitem(sys.modules, "mmjax.jobs.chat", types.SimpleNamespace(run=run))
    assert main([QUICK, "--job=chat", f"--workdir={tmp_path}"]) == 0
    assert calls == [("llava15_7b_tiny", tmp_path)]
    assert main([QUICK, "--job=chat", f"--workdir={tmp_path}/bad"]) == 1
    assert capsys.readouterr().err == "mmjax: the picture is upside down; turn it\n"
    assert main([QUICK, "--job=nap"]) == 1 and len(calls) == 2
    assert main(["--help"]) == 0 and "--workdir" in capsys.readouterr().out
