"""RobustGER (Hu et al., Large Language Models are Efficient Learners of Noise-Robust Speech Recognition, arXiv 2401.10446).

    python -m mmjax.main --config=configs/robust_ger.py                  # LLaMA-2 7B
    python -m mmjax.main --config=configs/robust_ger.py:chime4           # with CHiME-4's learning rate
    python -m mmjax.main --config=configs/robust_ger.py:plain            # without the noise embedding: prompts alone
    python -m mmjax.main --config=configs/robust_ger.py:lora             # HyPoradise's baseline: LoRA, clean speech (arXiv 2309.15701)
    python -m mmjax.main --config=configs/robust_ger.py:tiny             # the same path in a minute, on drawn data

What it is     From the five best hypotheses of a speech recogniser the LLM writes what was said. 20 prompts in each layer but the first two,
               with zero-init attention; their keys and values are moved by a noise embedding, 20 differences between the sentence
               embeddings of the hypotheses, through a Linear, a norm and gates. MINE, a small network, learns to tell noisy from clean
               audio by that embedding, and has it know the noise.
Stages         correct   prompts, gates and embedding at 5e-3 (chime4: 1e-2), MINE at a tenth of that; weight 0.5 of the distillation, 32
                         samples a step, 2 epochs, weight decay 0.02, warm-up over a fifth of the first epoch, then constant
               lora      rank 16 on queries, keys, values and outputs, 1e-4, 256 samples a step, 10 epochs
Trained        correct 109,454,528 (of these MINE 7,340,288); plain 2,458,560; lora 16,777,216 parameters.
Results (word errors in per cent, as published)   lora, before -> after: WSJ 4.5 -> 2.2, ATIS 8.3 -> 1.9, CHiME-4 11.1 -> 6.6, TED 8.5 -> 4.6,
               CommonVoice 14.8 -> 11.0, SwitchBoard 15.7 -> 14.1, LRS2 10.1 -> 8.8, CORAAL 21.4 -> 19.2. RobustGER: up to 53.9 % fewer errors
               than the recogniser's in noise.

How the embeddings were made was never released: all-MiniLM-L6's 384 channels, differences of each of the 10 pairs of hypotheses, once of
whole sentences and once of tokens, aligned by edit distance and summed. They are read from a file beside the data, with the means over time
of Whisper-large's 1,280 channels for noisy and clean speech: mmjax.data.instructions says how it is laid out. The list's others are
joined by ". ", as far as is known. An early version of the authors' code subtracts the embedding, where this adds it; the gates' sign
makes up for it. MINE is updated together with the adapter, not before it.
Needs meta-llama/Llama-2-7b-hf (in the local Hugging Face cache, or --config.model.llm.path=DIR), and the data below data/robust_hp.
"""

from typing import Any

from mmjax.catalogue import LLAMA2
from mmjax.config import (
    Adapter,
    Evaluation,
    Export,
    Mesh,
    Model,
    Optimizer,
    Recipe,
    Source,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"way": ("robust", "plain", "lora"), "chime4": False, "tiny": False})
    beside = "data/robust_hp/{}_embeddings.npz" if chosen.way == "robust" else ""

    def source(split: str) -> Source:
        return Source(kind="hypotheses", path=f"data/robust_hp/{split}.json", images=beside.format(split))

    common: dict[str, Any] = {"sources": {"hypotheses": source("train")}, "length": 1024, "packing": False, "dtype": "bfloat16", "remat": "full"}
    rate = 1e-2 if chosen.chime4 else 5e-3
    optimizer = Optimizer(learning_rate=rate, schedule="constant", warmup_ratio=0.1, weight_decay=0.02)
    if chosen.way == "lora":
        targets = ("llm/layers/attention/*",)
        adapters = {"default": Adapter(rank=16, alpha=16.0, targets=targets)}
        optimizer = Optimizer(learning_rate=1e-4)
        stage = Stage(trainable=("llm/**/lora_*",), epochs=10.0, rows=256, optimizer=optimizer, **common)
    elif chosen.way == "plain":
        adapters = {"prompts": Adapter(kind="adaption_prompt", length=20, depth=30, gate_fn="identity")}
        stage = Stage(trainable=("llm/plugs/**",), epochs=2.0, rows=32, optimizer=optimizer, **common)
    else:
        adapters = {"prompts": Adapter(kind="noise_prompt", length=20, depth=30, channels=384, audio=1280)}
        optimizer.multipliers = {"mine/**": 0.1}
        stage = Stage(
            trainable=("llm/plugs/**", "mine/**"), epochs=2.0, rows=32, optimizer=optimizer, noise_distillation=0.5, **common
        )
    recipe = Recipe(
        name=f"robust_ger{'' if chosen.way == 'robust' else f'_{chosen.way}'}{'_chime4' if chosen.chime4 else ''}",
        model=Model(llm=LLAMA2["7b"], template="hypotheses", adapters=adapters, dtype="bfloat16"),
        stages={"correct": stage},
        run=("correct",),
        evaluations={"test": Evaluation(source=source("test"), metrics=("wer",), max_new_tokens=150)},
        mesh=Mesh(data=1, fsdp=-1),
        export=Export(format="hf" if chosen.way == "lora" else "original"),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
