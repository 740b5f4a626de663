"""Otter (Li et al., arXiv 2305.03726; MIMIC-IT, arXiv 2306.05425): OpenFlamingo that follows instructions, with examples before them.

    python -m mmjax.main --config=configs/otter.py            # OpenFlamingo's training, then instructions; on MPT-7B
    python -m mmjax.main --config=configs/otter.py:llama      # on LLaMA-7B
    python -m mmjax.main --config=configs/otter.py:tiny       # the same path in a minute, on drawn data

What it is     OpenFlamingo-9B. A row is examples with their pictures, "<image>User:{instruction} GPT:<answer>{answer}<|endofchunk|>", the
               last of which is the question.
Stages         train      as configs/openflamingo.py has it
               instruct   resampler, gated blocks, embeddings and head on MIMIC-IT's instructions, each behind its in-context examples;
                          the answers, each with its <|endofchunk|>, and the end token are learned; learning rate 2e-5, 1 % warm-up,
                          cosine, 64 samples a step, 3 epochs
Trained (MPT / LLaMA)   1,178,847,248 (train); 1,385,416,720 and 1,441,003,536 (instruct) parameters.
Cost           8 GPUs; the authors tell of fine-tuning on four RTX 3090.

Needs openai/clip-vit-large-patch14 and MPT-7B or LLaMA-7B (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and MIMIC-IT below data/. From weights of OpenFlamingo or Otter one goes on with
configs/continue_from_hf.py and --config.model.path=DIR.
Differs from the authors' scripts: samples are padded to 1,024 tokens, none is longer; pictures are normalised with CLIP's mean and
deviation unrounded.
"""

import dataclasses

from configs import openflamingo
from mmjax.catalogue import LLAMA1, MPT_7B
from mmjax.config import Mesh, Optimizer, Recipe, Source, Stage, parse_arguments, to_config_dict
from mmjax.tiny import tiny

MIMIC_IT = Source(
    kind="mimic_it", path="data/mimic_it/LA_instructions.json", images="data/mimic_it/LA.json", options={"shots": 3}
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"llm": ("mpt", "llama"), "tiny": False})
    instruct = Stage(
        trainable=("connector/**", "llm/plugs/**", "llm/embed/**", *(("llm/head/**",) if chosen.llm == "llama" else ())),
        sources={"mimic_it": MIMIC_IT},
        epochs=3.0,
        rows=64,
        length=1024,
        packing=False,
        tiles=4,
        optimizer=Optimizer(learning_rate=2e-5, warmup_ratio=0.01),
        dtype="bfloat16",
        remat="full",
    )
    llm = {"mpt": MPT_7B, "llama": LLAMA1["7b"]}[chosen.llm]
    model = openflamingo.model(llm, 4, ("<|endofchunk|>", "<image>", "<answer>"))
    recipe = Recipe(
        name=f"otter_{chosen.llm}",
        model=dataclasses.replace(model, template="otter"),
        stages={"train": openflamingo.stage(("connector/**", "llm/plugs/**", "llm/embed/new_rows")), "instruct": instruct},
        run=("train", "instruct"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
