import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mmjax import tree
from mmjax.checkpoints import safetensors
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import keys, reading, writing
from mmjax.families.keys import rule


def stored(**arrays) -> dict[str, Stored]:
    return {name: Stored(name, a.shape, a.dtype, None, lambda a=a: a) for name, a in arrays.items()}


@pytest.mark.parametrize(
    "form, shape",
    [
        (keys.same, (3, 4)),
        (keys.transposed, (3, 4)),
        (keys.convolution, (3, 3, 2, 5)),
        (keys.patches(3), (2 * 2 * 3, 5)),
        (keys.leading(2), (4,)),
        (keys.leading(1), ()),
    ],
)
def test_forms_are_their_own_inverses(form, shape):
    ours = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    foreign = form.foreign(ours)
    assert foreign.shape == form.shape(shape)
    assert np.array_equal(form.ours(foreign), ours)


def test_patches_are_rows_columns_channels():
    convolution = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    image = np.random.default_rng(0).integers(0, 9, (2, 2, 3))
    dense = image.reshape(-1) @ keys.patches(3).ours(convolution)
    assert np.array_equal(dense, np.einsum("hwc,ochw->o", image, convolution))


def test_stacked_fused_and_transposed_leaves_round_trip():
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}.qkv": rng.standard_normal((8, 5)).astype(np.float32) for i in range(3)} | {
        "e": np.ones(4, np.float32)
    }
    rules = [rule("layer.{i}.qkv", "l/q", "l/k", "l/v", form=keys.transposed), rule("e", "e")]
    shapes = {
        "l": {"q": np.zeros((3, 5, 4)), "k": np.zeros((3, 5, 2)), "v": np.zeros((3, 5, 2))},
        "e": np.zeros(4),
    }
    params = reading.load(stored(**arrays), rules, shapes, dtype="float32")
    assert np.array_equal(params["l"]["k"][1], arrays["layer.1.qkv"][4:6].T)
    written = {t.name: t.make() for t in writing.tensors(params, rules)}
    assert all(np.array_equal(written[name], array) for name, array in arrays.items()) and len(written) == 4


def test_every_leaf_needs_a_key():
    with pytest.raises(ValueError, match="no key for the leaves b"):
        writing.tensors({"a": np.zeros(1), "b": np.zeros(1)}, [rule("x", "a")])
    with pytest.raises(ValueError, match="two rules fill a"):
        writing.tensors({"a": np.zeros(1)}, [rule("x", "a"), rule("y", "a")])


def test_two_spellings_of_one_tensor_are_refused():
    both = stored(**{"model.a": np.zeros(1), "a": np.zeros(1)})
    with pytest.raises(UserError, match="model.a and a|a and model.a"):
        keys.renamed({n: Stored(n, t.shape, t.dtype, "file", t.read) for n, t in both.items()}, [(r"^model\.", "")])


def test_kernels_held_as_bits_are_written_as_numbers():
    numbers = np.arange(6).astype(ml_dtypes.bfloat16).reshape(1, 2, 3)
    [tensor] = writing.tensors({"a": numbers.view(np.uint16)}, [rule("x.{i}", "a")])
    assert tensor.dtype == ml_dtypes.bfloat16 and np.array_equal(tensor.make(), numbers[0])


LOAD = """
    import sys, threading, time
    import mmjax
    mmjax.load(sys.argv[1] + "/small")

    def anonymous():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

    before, peak, done = anonymous(), [0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    model = mmjax.load(sys.argv[1] + "/large")
    done.append(1)
    thread.join()
    print(before, peak[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_host_never_holds_a_second_copy(tmp_path):
    """Peak memory while loading: the weights and one leaf, not the weights twice."""
    from mmjax.families.llama import FAMILY
    from mmjax.models import multimodal
    from mmjax.published import read_json

    fields = {"model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 8, "tie_word_embeddings": False}
    for name, width in (("small", 16), ("large", 512)):
        (tmp_path / name).mkdir()
        config = {**fields, "vocab_size": 40 * width, "hidden_size": width, "intermediate_size": 3 * width}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        model = FAMILY.read_config(read_json(tmp_path / name / "config.json"), "config.json")
        shapes = tree.flatten(multimodal.shapes(model))
        params = tree.unflatten({path: np.ones(leaf.shape, np.float32) for path, leaf in shapes.items()})
        safetensors.write(writing.tensors(params, FAMILY.rules(model, {})), tmp_path / name)
    sizes = sorted(leaf.size * 4 // 1024 for leaf in shapes.values())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )
    before, peak = map(int, done.stdout.split())
    assert sum(sizes) > 150_000  # KiB
    assert peak - before < sum(sizes) + 1.1 * sizes[-1] + 20_000, (before, peak, sum(sizes), sizes[-1])


def _environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
