"""The plan for slices that nobody here owns: compiled by libtpu where it is installed, from shapes where it is not."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import flops
from mmjax.architecture import model_config
from mmjax.config import Part, from_config_dict
from mmjax.errors import UserError
from mmjax.jobs import plan
from mmjax.planning import chips
from mmjax.planning.compiled import compiled
from mmjax.planning.hlo import Program
from mmjax.planning.stages import plan_stage
from tests import load_7b, processes_7b
from tests.configs.expand import config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which has the compiler for TPUs")


def figures(name: str, argument: str, workdir, **settings):
    recipe = from_config_dict(config(name, argument))
    for key, value in settings.items():
        setattr(recipe.plan, key, value)
    plan.run(recipe, workdir)
    return json.loads((workdir / "results.json").read_text())


@needs_libtpu
def test_a_recipe_is_compiled_for_a_slice(tmp_path, capsys):
    with jax.default_matmul_precision("default"):  # the tests' own has no kernels in bfloat16
        found = figures("llava15", "tiny", tmp_path, topology="v5e:2x4", stage="finetune")
    assert found["fits"] is True and found["devices"] == 8 and found["rows"] == 8
    assert found["hbm_bytes"] == int(15.75 * 2**30) and 0 < found["bytes_per_device"] < 2**26
    assert found["model_flops"] == found["flops_per_step_finetune"]
    assert found["compile_seconds"] > 0 and found["predicted_compute_seconds"] > 0 and 0 < found["predicted_mfu"] < 1
    assert found["predicted_mfu_with_communication_least"] <= found["predicted_mfu_with_communication_most"] <= found["predicted_mfu"]
    assert found["bytes_all_gather"] > 0  # the weights are divided over fsdp
    assert found["kernel_flops"] > 0 and found["predicted_mfu_without_pallas"] > 0
    printed = capsys.readouterr().out
    assert "The compiler's word" in printed and "it fits" in printed and "all-gather" in printed and "without Pallas" in printed
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@needs_libtpu
@pytest.mark.parametrize("topology, share", [("v5e:2x4", 0.88), ("v5p:2x2x1", 0.90), ("v4:2x2x1", 0.93)])
def test_cycles_of_a_large_product_are_near_the_peak_and_below_it(topology, share):
    target = chips.target(topology)
    assert target.devices is not None
    mesh = Mesh(np.array(target.devices[:1]), ("x",))
    side = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    seconds = Program(compiled(jax.jit(jnp.matmul), (side, side)).text).cycles() / target.chip.clock
    assert 2 * 8192**3 / (seconds * target.chip.flops) == pytest.approx(share, abs=0.01)


def test_without_a_compiler_shapes_say_what_they_can(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    found = figures("llava15", "", tmp_path, topology="v5e:16x16")
    # frozen weights in bfloat16; trained ones and both moments in float32, divided over all chips
    assert found["bytes_trained_per_device_finetune"] == pytest.approx(4 * 6_759_395_328 / 256, rel=0.02)
    assert found["bytes_optimizer_per_device_finetune"] == pytest.approx(8 * 6_759_395_328 / 256, rel=0.02)
    assert "fits" not in found and "predicted_mfu" not in found
    printed = capsys.readouterr().out
    assert "libtpu, which has the compiler, is not installed" in printed and "planned with --config.stages.finetune.rows=256" in printed


def test_what_cannot_fit_is_said_without_a_compiler_too(tmp_path, capsys):
    found = figures("llava15", "", tmp_path, topology="h100:1")
    assert found["fits"] is False and found["fits_finetune"] is False and "fits_pretrain" not in found
    printed = capsys.readouterr().out
    assert "IT DOES NOT FIT" in printed and "train fewer weights (LoRA)" in printed


@pytest.mark.parametrize("topology, says", [("v5e", "KIND:SHAPE"), ("v9:2x2", "kinds: v5e"), ("v5e:3x7", "no slice that libtpu knows")])
def test_unknown_machines_are_refused(topology, says):
    if "libtpu" in says and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    with pytest.raises(UserError, match=says):
        chips.target(topology)


def test_every_chip_has_a_peak():
    assert all(chip.flops for name, chip in chips.CHIPS.items() if name != "cpu")
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("TPU v5") == 459e12


def test_bfloat16_on_cpus_casts_no_stack_of_weights(tmp_path):
    """The recipe of tests.processes_7b at 1/40 of its size: what a step takes beside its arguments is less than the frozen weights are."""
    recipe = processes_7b.recipe(tmp_path)
    recipe.model.llm = Part(config={"model_type": "llama", **load_7b.SIZES["small"], "num_hidden_layers": 8})
    found = plan_stage(recipe, "align", model_config(recipe), chips.target("cpu:4"), recipe.mesh, 1e9, compare=False)
    assert found.compiled is not None and found.compiled.memory["temporaries"] < found.held["frozen"] / 2
