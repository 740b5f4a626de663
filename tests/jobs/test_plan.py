"""The plan's figures at published size, from shapes alone."""

from __future__ import annotations

import json

import pytest

from mmjax.assembly import assemble
from mmjax.config import from_config_dict
from mmjax.errors import UserError
from mmjax.jobs import plan
from mmjax.main import main
from tests.configs.expand import ROOT, config


def figures(name: str, argument: str, workdir) -> dict[str, float]:
    plan.run(from_config_dict(config(name, argument)), workdir)
    return json.loads((workdir / "results.json").read_text())


def test_llava_15_7b(tmp_path, capsys):
    found = figures("llava15", "", tmp_path)
    assert found["trainable_pretrain"] == 20_979_712
    assert found["trainable_finetune"] == found["parameters_llm"] + found["parameters_connector"] == 6_759_395_328
    assert found["parameters"] == sum(found[f"parameters_{part}"] for part in ("llm", "vision", "connector"))
    # frozen weights in bfloat16, trained ones, their gradients and both of Adam's moments in float32 (and its count of steps)
    assert found["bytes_parameters_pretrain"] == 2 * (found["parameters"] - 20_979_712) + 4 * 20_979_712
    assert found["bytes_gradients_pretrain"] == 4 * 20_979_712
    assert 0 <= found["bytes_optimizer_pretrain"] - 8 * 20_979_712 <= 64
    assert found["flops_per_step_pretrain"] == 256 * found["flops_per_sample_pretrain"]
    printed = capsys.readouterr().out
    assert "20,979,712" in printed and "6,759,395,328" in printed and "multiply-add" in printed


def test_llava_15_7b_lora(tmp_path):
    found = figures("llava15", "lora", tmp_path)
    assert found["parameters_adapters"] == 319_815_680  # rank 128 on every Linear of the LLM but the head
    assert found["trainable_finetune_lora"] == 319_815_680 + 20_979_712
    assert found["trainable_pretrain"] == 20_979_712


@pytest.mark.parametrize(
    "name, argument, trainable",
    [
        ("llava15", "13b", {"pretrain": 31_467_520, "finetune": 13_015_864_320 + 31_467_520}),
        ("llava_v1", "", {"pretrain": 5_248_000, "finetune": 13_015_864_320 + 5_248_000}),
        ("llava_v1", "7b", {"pretrain": 4_198_400, "finetune": 6_738_415_616 + 4_198_400}),
        ("doubutsu", "", {"pretrain": 4_131_840, "adapt": 147_718_144}),
        ("moondream", "", {"pretrain": 59_793_408, "finetune": 1_418_270_720 + 59_793_408}),
    ],
)
def test_published_sizes(name, argument, trainable, tmp_path):
    found = figures(name, argument, tmp_path)
    assert {stage: found[f"trainable_{stage}"] for stage in trainable} == trainable


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    recipe = from_config_dict(config("llava15", "tiny"))
    recipe.stages["pretrain"].trainable = ("conector/**",)
    with pytest.raises(UserError, match=r"stages.pretrain.trainable: 'conector/\*\*' matches no parameter.*connector/\*\*"):
        plan.run(recipe, tmp_path)


def test_command_keeps_the_figures_of_other_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "results.json").write_text('{"accuracy": 0.5}')
    assert main(["--config=configs/llava15.py:tiny", "--job=plan", f"--workdir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["accuracy"] == 0.5 and found["trainable_pretrain"] > 0


def test_shapes_stand_in_for_absent_weights_in_a_plan_and_never_in_training(tmp_path):
    recipe = from_config_dict(config("llava15", ""))
    recipe.model.llm.path = recipe.model.vision.path = "owner/never-downloaded"
    plan.run(recipe, tmp_path)
    with pytest.raises(UserError, match="model.llm.path: owner/never-downloaded is neither a directory nor in the local"):
        assemble(recipe, tmp_path)
