"""LLaVA-1.5 (Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744), 7B and 13B.

    python -m mmjax.main --config=configs/llava15.py                 # pretrain, then full finetuning, 7B
    python -m mmjax.main --config=configs/llava15.py:13b,peft=lora   # pretrain, then LoRA, 13B
    python -m mmjax.main --config=configs/llava15.py:peft=dora       # or qlora, ia3, prompt, ptuning, prefix, adapter
    python -m mmjax.main --config=configs/llava15.py:tiny            # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/llava15.py --job=plan      # parameters, bytes and FLOPs, without any weights

What it is     CLIP ViT-L/14 at 336 pixels, its last block but one without the class token (576 tokens), a two-layer MLP, Vicuna v1.5.
Stages         pretrain        MLP alone on 558K captions; learning rate 1e-3, 256 samples a step, 1 epoch
               finetune        MLP and LLM on the 665K instruction mixture; 2e-5, 128 samples a step, 1 epoch
               finetune_lora   LoRA (rank 128, alpha 256, dropout 0.05, every Linear of the LLM but the head) at 2e-4, MLP at 2e-5
               finetune_qlora  the same over a language model in nf4 with double quantisation, in both stages (QLoRA, arXiv 2305.14314)
               finetune_...    the other ways of tuning (PEFT below), which the authors do not have: DoRA as in its paper's section on LLaVA-1.5
                               (arXiv 2402.09353), the others with learning rates of this library, tried on small models alone
               AdamW without weight decay, 3 % warm-up, cosine to 0, bfloat16 activations.
Trained (7B)   20,979,712; 6,759,395,328; 340,795,392 parameters. With the MLP's 20,979,712: dora 342,155,264; ia3 21,594,112; prompt
               21,061,632; ptuning 71,405,568; prefix 28,844,032; adapter 88,227,840.
Cost (7B)      16.6, 34.7 and 25.1 TFLOP a sample; the authors took 3.5 and 10 hours on 8 A100s.
Results (7B / 13B, as published)   VQAv2 78.5 / 80.0, GQA 62.0 / 63.3, TextVQA 58.2 / 61.3, POPE 85.9 / 85.9, MMBench 64.3 / 67.7;
               with LoRA 79.1 / 80.0, 63.0 / 63.3, 58.2 / 60.2, 86.4 / 86.7, 66.1 / 68.5.

Needs lmsys/vicuna-7b-v1.5 and openai/clip-vit-large-patch14-336 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data of the LLaVA-1.5 repository below data/.
Differs from the authors' scripts: finetuning packs samples into rows of 2,048 tokens (56 rows hold about 128 samples) where they pad;
pretraining pads pictures to a square as finetuning does, where they crop.
"""

import dataclasses

from mmjax.catalogue import CLIP_L_336, LCS_558K, MIX_665K, VICUNA_V15
from mmjax.config import (
    Adapter,
    Connector,
    Mesh,
    Model,
    Optimizer,
    Quantise,
    Recipe,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

LORA = Adapter(rank=128, alpha=256.0, dropout=0.05, targets=("llm/layers/**",))
BESIDE = "llm/**/adapters/default/**"
# name -> (what is added, what of it is trained, its learning rate)
PEFT = {
    "lora": (LORA, "llm/**/lora_*", 2e-4),
    "qlora": (LORA, "llm/**/lora_*", 2e-4),
    "dora": (dataclasses.replace(LORA, dora=True), "llm/**/lora_*", 2e-4),
    "ia3": (Adapter(kind="ia3", targets=("llm/layers/*/{key,value,down}",), feedforward=("llm/layers/mlp/down",)), BESIDE, 3e-3),
    "prompt": (Adapter(kind="prompt", tokens=20), "llm/prompts/default/**", 3e-2),
    "ptuning": (Adapter(kind="p_tuning", tokens=20), "llm/prompts/default/**", 1e-3),
    "prefix": (Adapter(kind="prefix", tokens=30), "llm/plugs/default/**", 1e-3),
    "adapter": (Adapter(kind="bottleneck", reduction=16.0), "llm/plugs/default/**", 1e-4),
}


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("7b", "13b"), "peft": ("full", *PEFT), "tiny": False})
    adapter, added, rate = PEFT.get(chosen.peft, (None, "llm/**", 2e-5))
    last = "finetune" if adapter is None else f"finetune_{chosen.peft}"
    pretrain = Stage(
        trainable=("connector/**",),
        idle=() if adapter is None else ("default",),
        sources={"captions": LCS_558K},
        epochs=1.0,
        rows=256,
        length=640,  # 576 for the picture, the rest for its caption
        packing=False,
        template="plain",
        optimizer=Optimizer(learning_rate=1e-3),
        dtype="bfloat16",
        remat="full",
    )
    finetune = Stage(
        trainable=(added, "connector/**"),
        sources={"mixture": MIX_665K},
        epochs=1.0,
        rows=56,
        length=2048,
        tiles=3,
        optimizer=Optimizer(learning_rate=rate, multipliers={} if adapter is None else {"connector/**": 2e-5 / rate}),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"llava15_{chosen.size}" + ("" if adapter is None else f"_{chosen.peft}"),
        model=Model(
            llm=VICUNA_V15[chosen.size],
            vision=CLIP_L_336,
            connector=Connector(kind="mlp2x_gelu"),
            feature_layers=(-2,),
            template="v1",
            adapters={} if adapter is None else {"default": adapter},
            quantise=Quantise("nf4" if chosen.peft == "qlora" else ""),
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, last: finetune},
        run=("pretrain", last),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
