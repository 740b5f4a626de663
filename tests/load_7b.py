"""What loading a model costs, measured: `python -m tests.load_7b DIR` (to be run by hand; it takes 14 GB on disk and in memory).

Writes a Llama of 7B parameters in bfloat16 to DIR, tensor by tensor, in several shards; loads it in a fresh process of each
library in bfloat16, and prints the largest anonymous memory seen meanwhile (what is mapped from the files does not count: the
system can drop it at any time), as a share of the weights. `--small` tries it with 1/40 of the size. DIR is deleted afterwards.

Fails where mmjax takes more than 1.15 times the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from mmjax.checkpoints import safetensors
from mmjax.checkpoints.safetensors import Tensor

ALLOWED = 1.15
SAMPLE_SECONDS = 0.01
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16, "vocab_size": 8000},
}
LOADERS: dict[str, str] = {
    "mmjax": "import mmjax, jax; began = clock(); model = mmjax.load(path, dtype='bfloat16'); jax.block_until_ready(model.params)",
    "transformers": (
        "import torch, transformers; began = clock(); "
        "model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)"
    ),
}
LOADERS["mmjax as its jobs run, keeping freed memory"] = f"import mmjax.allocator; mmjax.allocator.keep_freed_memory(); {LOADERS['mmjax']}"


def write(directory: Path, sizes: dict[str, int]) -> int:
    """A checkpoint of drawn numbers in at least three shards; returns its bytes. One tensor is in memory at a time."""
    directory.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps({**config, **sizes, "tie_word_embeddings": False}))
    width, hidden, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        def make() -> np.ndarray:  # bits of numbers of either sign between 1/64 and 1/32
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            bits &= 0x807F
            bits |= 0x3C80
            return bits.view(dtype)

        return Tensor(name, shape, dtype, make)

    tensors = [tensor(name, shape) for name, shape in shapes.items()]
    total = sum(t.bytes for t in tensors)
    safetensors.write(tensors, directory, shard_bytes=total // 3 + 1)
    return total


def measure(loader: str, directory: Path) -> tuple[int, float]:
    """(largest anonymous memory in bytes, seconds of the load) of a fresh process."""
    program = f"from time import perf_counter as clock; path = {str(directory)!r}; {LOADERS[loader]}; print('seconds', clock() - began)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(SAMPLE_SECONDS)
    assert process.stdout is not None
    said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{loader} failed (exit code {process.returncode})")
    return peak, float(said.split("seconds")[-1])


def anonymous(pid: int | str) -> int:
    """RssAnon of a process, in bytes; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--small", action="store_true", help="1/40 of the size")
    chosen = parser.parse_args()
    if chosen.directory.exists():
        raise SystemExit(f"{chosen.directory} exists already; name one that does not, it is deleted in the end")
    try:
        began = time.perf_counter()
        size = write(chosen.directory, SIZES["small" if chosen.small else "7b"])
        shards = len(list(chosen.directory.glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB of weights in {shards} shards, written in {time.perf_counter() - began:.0f} s", flush=True)
        ratios = {}
        for loader in LOADERS:
            peak, seconds = measure(loader, chosen.directory)
            ratios[loader] = peak / size
            print(f"{loader}: {peak / 1e9:.2f} GB at most, {ratios[loader]:.3f} times the weights; {seconds:.1f} s", flush=True)
    finally:
        shutil.rmtree(chosen.directory, ignore_errors=True)
    worst = max(ratio for loader, ratio in ratios.items() if loader.startswith("mmjax"))
    if not chosen.small and worst > ALLOWED:
        raise SystemExit(f"mmjax takes {worst:.3f} times the weights; {ALLOWED} are allowed")


if __name__ == "__main__":
    main()
