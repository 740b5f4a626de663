"""Checkpoints come back as they were; damaged ones are found out and passed over; a changed base is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import config, tree
from mmjax.checkpoints.store import Store, fault_of, newest, overlay
from mmjax.errors import UserError
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import param_shardings
from mmjax.training.state import init_state, state_shapes, state_shardings

MODEL = tree.unflatten(
    {
        "vision/layers/mlp/up/kernel": jnp.zeros((4, 8, 16), jnp.bfloat16),
        "connector/layers_0/kernel": jnp.zeros((8, 16)),
        "llm/embed/embedding": jnp.zeros((24, 8), jnp.bfloat16),
    }
)
OPTIMIZER = optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.scale_by_learning_rate(lambda step: 0.1))
BASES = {"models/base": "abc"}


def _state(mesh, value: float):
    trainable = tree.unflatten(
        {"vision/layers/mlp/up/kernel": jnp.full((2, 8, 16), value), "connector/layers_0/kernel": jnp.full((8, 16), value)}
    )
    return init_state(trainable, OPTIMIZER, mesh)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture
def saved(tmp_path, mesh):
    """Three checkpoints, of steps 1 to 3, with values 1 to 3."""
    store = Store(tmp_path, config.Checkpoint(keep=3, keep_best=1), BASES)
    own = {"llm/embed/embedding": jnp.full((24, 8), 7, jnp.bfloat16)}
    for step in (1, 2, 3):
        state = _state(mesh, float(step))
        store.save("tune", step, state, own, {"vision/layers/mlp/up/kernel": (1, 3)}, validation_loss=1.0 / step)
    store.close()
    return tmp_path


def test_leaves_and_optimizer_come_back_on_any_mesh(saved, mesh):
    found = newest(saved, ("align", "tune"))
    assert (found.stage, found.step, found.ended) == ("tune", 3, False)
    other = make_mesh(config.Mesh(data=1, fsdp=8))
    for shardings in (None, param_shardings(MODEL, other)):
        flat = tree.flatten(overlay(dict(MODEL), found, shardings))
        np.testing.assert_array_equal(np.unique(flat["llm/embed/embedding"]), 7)
        assert flat["llm/embed/embedding"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(flat["connector/layers_0/kernel"], 3)
        np.testing.assert_array_equal(flat["vision/layers/mlp/up/kernel"][:, 0, 0], [0, 3, 3, 0])
    state = _state(mesh, 3.0)
    restored = found.optimizer(
        state_shapes(state.trainable, OPTIMIZER).optimizer, state_shardings(state.trainable, OPTIMIZER, other).optimizer
    )
    assert jax.tree.structure(restored) == jax.tree.structure(state.optimizer)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state.optimizer)):
        np.testing.assert_array_equal(new, old)
        assert new.dtype == old.dtype


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "no manifest", "manifest flipped"])
def test_damage_is_found_and_the_one_before_is_used(saved, damage, caplog):
    newest_path = saved / "checkpoints" / "tune" / "00000003"
    files = sorted(file for file in newest_path.rglob("*") if file.is_file() and file.stat().st_size > 100)
    data = next(file for file in files if "params" in file.parts and "d" in file.parts)
    manifest = newest_path / "manifest.json"
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "missing":
        data.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        file = manifest if damage == "manifest flipped" else data
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    found = newest(saved, ("tune",))
    assert found.step == 2
    assert "00000003" in caplog.text and "not used" in caplog.text
    store = Store(saved, config.Checkpoint(), BASES)
    assert store.resume(("tune",)).step == 2
    assert (saved / "checkpoints" / "tune" / "00000003.broken").exists() and not newest_path.exists()
    store.close()


def test_every_file_is_covered_by_the_manifest(saved):
    path = saved / "checkpoints" / "tune" / "00000003"
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert present == listed | {"manifest.json"}
    assert fault_of(path) is None


def test_without_any_sound_checkpoint_the_stage_before_is_used(saved, mesh):
    shutil.copytree(saved / "checkpoints" / "tune", saved / "checkpoints" / "later")
    for manifest in (saved / "checkpoints" / "later").glob("*/manifest.json"):
        manifest.unlink()
    assert newest(saved, ("tune", "later")).stage == "tune"
    assert newest(saved, ("elsewhere",)) is None


def test_the_newest_the_best_and_nothing_else_are_kept(tmp_path, mesh):
    store = Store(tmp_path, config.Checkpoint(keep=2, keep_best=1, asynchronous=False), BASES)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0], start=1):
        store.save("tune", step, _state(mesh, 1.0), {}, {"vision/layers/mlp/up/kernel": (1, 3)}, validation_loss=loss)
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "tune").iterdir()) == [
        "00000002",
        "00000004",
        "00000005",
    ]
    assert store.best("tune").step == 2
    store.close()


def test_a_changed_base_and_a_changed_shape_are_refused_by_name(saved, mesh):
    store = Store(saved, config.Checkpoint(), {"models/base": "xyz"})
    with pytest.raises(UserError, match="models/base has changed"):
        store.resume(("tune",))
    store.close()
    found = newest(saved, ("tune",))
    wider = tree.merge(MODEL, {"connector": {"layers_0": {"kernel": jnp.zeros((8, 32))}}})
    with pytest.raises(UserError, match=r"connector/layers_0/kernel.*\[8, 16\].*\[8, 32\]"):
        overlay(wider, found)
    with pytest.raises(UserError, match="another optimizer"):
        other = optax.sgd(0.1, momentum=0.9)
        state = state_shapes(_state(mesh, 1.0).trainable, other)
        found.optimizer(state.optimizer, state_shardings(state.trainable, other, mesh).optimizer)
