"""Models whose frozen kernels are held in few bits: loaded so, used, adapted, kept and written; AWQ's published layouts."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import mmjax
from mmjax import config, tree
from mmjax.checkpoints import awq, safetensors, weights
from mmjax.checkpoints.safetensors import Tensor
from mmjax.errors import UserError
from mmjax.export import save_adapters
from mmjax.models import adapters, multimodal, number_formats, quantised
from mmjax.models.quantised import Quantisation
from mmjax.models.tuning_config import LoraConfig
from tests import load_7b, small_workdir

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
IDS = {"input_ids": np.arange(1, 11).reshape(2, 5)}
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "llama"
    load_7b.write(directory, SIZES)
    return directory


@pytest.fixture(scope="module")
def nf4(llama):
    return mmjax.load(llama, quantise="nf4")


def test_7b_fits_four_gibibytes():
    """LLaMA-7B (arXiv 2302.13971) with the Linears of its blocks in nf4 with double quantisation, the rest (norms, embeddings, head) in
    bfloat16: 3.600 GiB."""
    from mmjax.families import llama

    shapes = llama.FAMILY.read_config(LLAMA_7B, "config.json")
    leaves = tree.flatten(multimodal.shapes(dataclasses.replace(shapes, quantisation=quantised.NAMED["nf4"])))
    assert {path.split("/kernel/")[0] for path in leaves if quantised.is_part(path)} == {
        f"llm/layers/{linear}"
        for linear in (*(f"attention/{n}" for n in ("query", "key", "value", "output")), "mlp/gate", "mlp/up", "mlp/down")
    }
    held = sum(leaf.size * (leaf.dtype.itemsize if quantised.is_part(path) else 2) for path, leaf in leaves.items())
    assert held == 3_865_592_704 <= 4.2 * 2**30
    assert quantised.count(tree.unflatten(leaves)) == 6_738_415_616


def test_kernels_are_quantised_while_they_are_read(llama, nf4):
    dense, spec = mmjax.load(llama), quantised.NAMED["nf4"]
    whole = dense.quantised(spec)
    assert tree.flatten(whole.params).keys() == tree.flatten(nf4.params).keys() == tree.flatten(multimodal.shapes(nf4.config)).keys()
    for path, leaf in tree.flatten(nf4.params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(whole.params)[path], path)
    assert not any(quantised.is_part(path) for path in tree.flatten(nf4.params) if "layers/" not in path or "norm" in path)
    np.testing.assert_array_equal(nf4.params["llm"]["head"]["kernel"], dense.params["llm"]["head"]["kernel"])
    kernel, found = dense.params["llm"]["layers"]["mlp"]["down"]["kernel"], nf4.dequantised().params["llm"]["layers"]["mlp"]["down"]["kernel"]
    assert 0 < np.abs(kernel - found).max() < 0.2 * np.abs(kernel).max()


def test_outputs_are_those_of_the_dense_numbers(nf4):
    dense = nf4.dequantised()
    np.testing.assert_allclose(nf4(IDS)["logits"], dense(IDS)["logits"], rtol=1e-5, atol=1e-5)
    with_cache = nf4.generate(IDS, max_new_tokens=6, ignore_eos=True)
    np.testing.assert_array_equal(with_cache, dense.generate(IDS, max_new_tokens=6, ignore_eos=True))
    grown = np.concatenate([IDS["input_ids"], with_cache[:, :3]], 1)
    np.testing.assert_array_equal(np.asarray(nf4({"input_ids": grown})["logits"])[:, -1].argmax(-1), with_cache[:, 3])


def test_an_adapter_over_a_quantised_base(nf4, llama, tmp_path):
    lora = LoraConfig("default", 4, 8.0, ("llm/layers/**",))
    dora = dataclasses.replace(lora, targets=("llm/layers/mlp/down",), dora=True)
    magnitudes = adapters.add(jax.random.key(0), nf4.params, dataclasses.replace(nf4.config, adapters=(dora,)))
    found = magnitudes["llm"]["layers"]["mlp"]["down"]["adapters"]["default"]["lora_magnitude"]
    kernel = nf4.dequantised().params["llm"]["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(found, np.linalg.norm(kernel, axis=1), rtol=1e-5)  # of what the codes stand for
    shapes = dataclasses.replace(nf4.config, adapters=(lora,))
    params = adapters.add(jax.random.key(0), nf4.params, shapes)
    model = dataclasses.replace(nf4, config=shapes, params=params, bases={str(llama): ""})
    np.testing.assert_array_equal(model(IDS)["logits"], nf4(IDS)["logits"])  # at its init
    flat = {path: leaf + 0.05 if path.endswith("lora_b") else leaf for path, leaf in tree.flatten(params).items()}
    model = dataclasses.replace(model, params=tree.unflatten(flat))
    with pytest.raises(UserError, match="held in nf4.*default.*Dequantise first"):
        model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="'default' cannot be merged into llm/layers/.*, which is quantised.*Dequantise first"):
        adapters.merge(model.params, model.config)
    save_adapters(model, tmp_path / "adapter")
    again = mmjax.load(tmp_path / "adapter", quantise="nf4")
    np.testing.assert_allclose(again(IDS)["logits"], model(IDS)["logits"], atol=1e-5)
    model.dequantised().save_pretrained(tmp_path / "merged")
    merged = mmjax.load(tmp_path / "merged")
    np.testing.assert_allclose(merged(IDS)["logits"], model(IDS)["logits"], rtol=1e-4, atol=1e-4)


def test_a_workdir_keeps_its_quantisation(tmp_path):
    """A recipe with a fresh language model in nf4: its codes are among what a checkpoint keeps; here the seed gives them again."""
    recipe = dataclasses.replace(small_workdir.RECIPE, model=dataclasses.replace(small_workdir.RECIPE.model, quantise=config.Quantise("nf4")))
    config.write_recipe(recipe, tmp_path)
    model, again = mmjax.load(tmp_path), mmjax.load(tmp_path, "bfloat16")
    assert model.config.quantisation == Quantisation("nf4") and config.read_recipe(tmp_path).model.quantise.format == "nf4"
    for path, leaf in tree.flatten(again.params).items():
        if quantised.is_part(path):
            np.testing.assert_array_equal(leaf, tree.flatten(model.params)[path])
        else:
            assert leaf.dtype == "bfloat16"


def published_in(layout, llama, directory):
    """The llama's checkpoint with the Linears of its blocks packed, and the dense weights that the codes stand for."""
    shutil.copytree(llama, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    arrays = {name: np.array(tensor.read(), np.float32) for name, tensor in weights.read(llama).items()}
    made, dense = {}, {}
    for name, array in arrays.items():
        dense[name] = made[name] = array.astype(np.float16)
        if "_proj" in name:
            leaves = number_formats.to_int4(array.T, 64)
            codes = np.asarray(number_formats.unpacked(leaves["codes"])).T
            scales, zeros = np.asarray(leaves["scales"], np.float16).T, np.asarray(leaves["zeros"]).T
            dense[name] = awq.dequantised({"codes": codes, "scales": scales, "zeros": zeros})
            del made[name]
            made |= {f"{name.removesuffix('weight')}{end}": a for end, a in layout(codes, scales, zeros).items()}
    safetensors.write([Tensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in made.items()], directory)
    return dense


@pytest.mark.parametrize("layout", [awq.gemm, awq.llm_awq])
def test_published_awq_is_taken_over_code_by_code(layout, llama, tmp_path):
    dense = published_in(layout, llama, tmp_path / "awq")
    file = tmp_path / "awq" / "config.json"
    fields = json.loads(file.read_text())
    version = {"version": "gemm"} if layout is awq.gemm else {"version": "gemv", "backend": "llm-awq"}
    method = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, **version}
    file.write_text(json.dumps({**fields, "quantization_config": method}))
    model = mmjax.load(tmp_path / "awq")
    spec = model.config.quantisation
    assert spec.format == "int4" and spec.block == 64 and len(spec.targets) == 7
    assert {p: leaf.shape for p, leaf in tree.flatten(model.params).items()} == {
        p: leaf.shape for p, leaf in tree.flatten(multimodal.shapes(model.config)).items()
    }
    found = model.dequantised().params["llm"]["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(found[1], dense["model.layers.1.mlp.down_proj.weight"].T, rtol=1e-6, atol=1e-7)
    assert np.isfinite(model(IDS)["logits"]).all()
    model.save_pretrained(tmp_path / "again")  # in AutoAWQ's layout, whichever it was read in
    again = mmjax.load(tmp_path / "again")
    assert again.config == model.config
    for path, leaf in tree.flatten(model.params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(again.params)[path], path)
    with pytest.raises(UserError, match="in int4 already"):
        mmjax.load(tmp_path / "awq", quantise="nf4")
    file.write_text(json.dumps({**fields, "quantization_config": {**method, "bits": 3}}))
    with pytest.raises(UserError, match="bits = 3"):
        mmjax.load(tmp_path / "awq")


def test_what_cannot_be_quantised_is_said(llama):
    with pytest.raises(UserError, match="quantise = 'fp3' is unknown; there are 'int8', 'nf4', 'int4'"):
        mmjax.load(llama, quantise="fp3")
    with pytest.raises(UserError, match="the (64|192) inputs of llm/layers/.* do not fall into groups of 128"):
        mmjax.load(llama, quantise="int4")
    with pytest.raises(UserError, match="'llm/embed/.*' matches no linear layer that can be quantised"):
        mmjax.load(llama, quantise=Quantisation("int8", ("llm/embed/**",)))
