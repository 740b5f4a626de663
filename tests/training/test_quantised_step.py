"""Training adapters over a base held in few bits (QLoRA): what trains, what stays as it is, what stands in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mmjax import config, tree
from mmjax.errors import UserError
from mmjax.models import multimodal, quantised
from mmjax.models.quantised import Quantisation
from mmjax.models.tuning_config import LoraConfig
from mmjax.parallel.sharding import table
from mmjax.training.loop import hold
from mmjax.training.trainable import select
from tests.training import tiny
from tests.training.test_step import ONE, STAGE, Run

LORA = LoraConfig("tune", rank=2, alpha=4.0, targets=("llm/layers/**",))
BLOCK = dataclasses.replace(tiny.LLM.block, width=128, head_dim=64, mlp_width=256)
DENSE = dataclasses.replace(
    tiny.CONFIG,
    llm=dataclasses.replace(tiny.LLM, layers=8, block=BLOCK),
    connector=dataclasses.replace(tiny.CONFIG.connector, out_width=128),
    adapters=(LORA,),
)
QLORA = dataclasses.replace(DENSE, quantisation=Quantisation("nf4", block=32))
ADAPTERS = dataclasses.replace(STAGE, trainable=("llm/**/lora_*",), steps=50)
BATCH = tiny.batch(rows=8, length=8, groups=8)


def quantised_run(params, sizes=ONE, dtype="float32"):
    """A compiled step over the frozen leaves of these parameters, held as the loop holds them."""
    run = Run(ADAPTERS, sizes, QLORA)
    flat, held = tree.flatten(run.frozen), tree.flatten(params)
    frozen = tree.unflatten({path: jax.device_put(held[path], leaf.sharding) for path, leaf in flat.items()})
    run.frozen = hold(frozen, dtype, whole=set())
    return run


@pytest.fixture(scope="module")
def params():
    return quantised.converted(tiny.params(DENSE), QLORA.quantisation)


@pytest.fixture(scope="module")
def one(params):
    return quantised_run(params)


def test_adapters_alone_train_and_frozen_bits_stay(one):
    state = one.fresh()
    assert set(tree.flatten(state.trainable)) == {path for path in tree.flatten(multimodal.shapes(QLORA)) if "/lora_" in path}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert held == 2 * 4 * one.selection.count(multimodal.shapes(QLORA))  # two float32 moments of each trained number
    before = {path: np.array(leaf) for path, leaf in tree.flatten(one.frozen).items()}
    batch = one.put(BATCH)
    losses = []
    for _ in range(50):
        state, metrics = one.step(state, one.frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 1
    for path, leaf in tree.flatten(one.frozen).items():
        np.testing.assert_array_equal(np.array(leaf).view(np.uint8), before[path].view(np.uint8), path)


def test_a_quantised_base_trains_as_its_dense_numbers_do(one, params):
    dense = Run(ADAPTERS, ONE, DENSE)
    dense.trainable = one.trainable
    flat = tree.flatten(quantised.dequantised(params))
    dense.frozen = tree.unflatten({path: flat[path] for path in tree.flatten(dense.frozen)})
    np.testing.assert_allclose(one.losses([BATCH] * 2), dense.losses([BATCH] * 2), rtol=1e-5)


def test_divided_codes_are_one_device(one, params):
    run = quantised_run(params, config.Mesh(data=2, fsdp=2, tensor=2))
    kernel = run.frozen["llm"]["layers"]["mlp"]["down"]["kernel"]
    assert kernel["codes"].sharding.spec == kernel["absmax_codes"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert kernel["nested_absmax"].sharding.is_fully_replicated
    np.testing.assert_allclose(run.losses([BATCH]), one.losses([BATCH]), rtol=1e-5)


def test_no_shard_ends_within_a_block():
    mesh = Run(ADAPTERS, config.Mesh(data=1, fsdp=8), QLORA).mesh
    rows = {row.path: row for row in table(multimodal.shapes(QLORA), mesh)}
    codes = rows["llm/layers/attention/query/kernel/codes"]  # 128 inputs are 64 rows of codes, but 4 blocks
    assert codes.spec == PartitionSpec(None, None, "tensor") and "4 is not divisible by fsdp=8" in codes.note
    assert rows["llm/layers/mlp/down/kernel/codes"].spec == PartitionSpec(None, "tensor", "fsdp")


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_no_dequantised_stack_stands_in_memory(format):
    llm = dataclasses.replace(DENSE.llm, layers=24)
    model = dataclasses.replace(DENSE, llm=llm, quantisation=Quantisation(format, block=32))
    run, shapes = Run(ADAPTERS, ONE, model), multimodal.shapes(model)
    made = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in tree.flatten(shapes).items()}
    run.frozen = hold(tree.unflatten({path: made[path] for path in tree.flatten(run.frozen)}), "bfloat16", whole=set())
    kernels = tree.flatten(quantised.dense_shapes(shapes))
    stack = 2 * sum(leaf.size for path, leaf in kernels.items() if path.startswith("llm/layers") and path.endswith("/kernel"))
    temporaries = run.compiled(tiny.batch(rows=1, length=8, groups=1)).memory_analysis().temp_size_in_bytes
    assert temporaries < stack / 2, (temporaries, stack)


def test_a_glob_that_would_train_a_quantised_kernel_says_so():
    with pytest.raises(UserError, match=r"stage: 'llm/\*\*' would train llm/layers/.*/kernel, which is quantised"):
        select(multimodal.shapes(QLORA), ("llm/**",), "stage")
    select(multimodal.shapes(QLORA), ("llm/**/lora_*", "llm/**/scale", "connector/**"), "stage")
