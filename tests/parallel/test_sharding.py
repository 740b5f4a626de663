"""Every leaf has a PartitionSpec; what an axis does not divide stays whole and is said; optimizer state follows."""

import jax
import optax
import pytest
from jax.sharding import PartitionSpec

from mmjax import config, tree
from mmjax.models import multimodal
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import batch_shardings, format_table, optimizer_shardings, param_shardings, table
from tests.training import tiny


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def shapes():
    return multimodal.shapes(tiny.CONFIG)


def test_every_leaf_is_covered_and_divided_as_its_layer_needs(mesh, shapes):
    rows = {row.path: row for row in table(shapes, mesh)}
    assert list(rows) == list(tree.flatten(shapes))
    specs = {path: row.spec for path, row in rows.items()}
    assert specs["llm/layers/attention/query/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["llm/layers/attention/output/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["llm/layers/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["llm/layers/mlp/up/adapters/tune/lora_b"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["llm/layers/attention_norm/scale"] == PartitionSpec(None, None)
    assert specs["llm/embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["vision/layers/mlp/up/bias"] == PartitionSpec(None, "tensor")
    for row in rows.values():
        jax.sharding.NamedSharding(mesh, row.spec).shard_shape(row.shape)  # raises where it does not divide


def test_what_does_not_divide_stays_whole_and_is_said(mesh):
    leaf = jax.ShapeDtypeStruct((33, 32), "float32")
    (row,) = table({"llm": {"embed": {"embedding": leaf}}}, mesh)
    assert row.spec == PartitionSpec(None, "fsdp") and "33 is not divisible by tensor=2" in row.note
    assert row.note in format_table([row])


@pytest.mark.parametrize(
    "optimizer, followers", [(optax.adamw(1e-3), 2.0), (optax.adafactor(1e-3, min_dim_size_to_factor=4), 0.1)]
)
def test_optimizer_state_follows_its_leaves(mesh, shapes, optimizer, followers):
    state = jax.eval_shape(optimizer.init, shapes)
    placed = optimizer_shardings(state, shapes, mesh)
    wanted = tree.flatten(param_shardings(shapes, mesh))
    sizes = {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}
    followed = []
    for (keys, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(placed)):
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        if path and leaf.shape == sizes[path]:
            assert sharding == wanted[path]
            followed.append(path)
        else:
            assert sharding.spec == PartitionSpec()
    assert len(followed) >= followers * len(sizes)


def test_rows_and_media_go_to_the_data_axes(mesh):
    batch = tiny.batch()
    placed = jax.device_put(batch, batch_shardings(batch, mesh))
    assert placed.tokens.addressable_shards[0].data.shape == (2, 16)
    assert placed.images.addressable_shards[0].data.shape == (2, 1, 8, 8, 3)
    assert batch_shardings(batch, mesh).classes is None
