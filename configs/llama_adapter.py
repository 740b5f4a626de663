"""LLaMA-Adapter V1 (Zhang et al., arXiv 2303.16199) and V2 (Gao et al., arXiv 2304.15010): learned prompts behind gates that begin closed.

    python -m mmjax.main --config=configs/llama_adapter.py                   # V1, instructions, 7B
    python -m mmjax.main --config=configs/llama_adapter.py:v1_multimodal     # V1 with pictures, ScienceQA
    python -m mmjax.main --config=configs/llama_adapter.py:v2                # V2 with pictures as released, in two stages, 7B
    python -m mmjax.main --config=configs/llama_adapter.py:v2_early          # V2 with early fusion as in the paper
    python -m mmjax.main --config=configs/llama_adapter.py:v2_chat           # V2 without pictures, 65B
    python -m mmjax.main --config=configs/llama_adapter.py:tiny              # the same path in a minute, on drawn data

What it is     v1              10 prompts in each of the 30 topmost layers of a frozen LLaMA, read in a softmax of their own, which a gate
                               for each head opens from 0.
               v1_multimodal   CLIP's pooled state through an MLP, added to every prompt.
               v2              10 learned queries and CLIP's 257 projected states through 8 blocks; the queries are added to the prompts of
                               the 31 topmost layers, and stand nowhere in the text.
               v2_early        20 such queries are the prompts of the first layer; those of the 31 topmost are learned.
               v2_chat         no prompts: every Linear is W (x * scale) + bias.
Stages         instruct        v1: prompts and gates, on 52K instructions of Alpaca, 5 epochs (2 of warm-up), 32 samples a step, learning rate
                               1.125e-3, weight decay 0.02; v2_chat: scales, biases and the layers' norms, on ShareGPT's 80K talks
               pretrain        v2: prompts, gates and the whole projector on captions, 150 epochs (5), 32 samples a step, 1.25e-5, 0.05
               finetune        v2: biases (of all Linears but keys and values) and norms, on LLaVA's, GPT-4-LLM's and Alpaca's
                               instructions, 4 epochs (1), 1.25e-4, 0.02
               AdamW (0.9, 0.95), cosine to 0.
Trained        v1 1,229,760; v1_multimodal 1,807,408; v2 61,731,552, then 1,363,968; v2_chat 13,803,520 (published: 1.2M, 1.8M, 61.7M and 1.4M,
               13.80M).
Cost (v1)      less than an hour on 8 A100s.
Results (as published)   v1_multimodal: ScienceQA 85.19 % (78.31 % without pictures; 83.85 % on the validation set at 30 layers; with gates
               that begin at random 40.77 %). v2: COCO CIDEr 122.2, BLEU-4 36.2; its later weights MME 1326.1 / 356.4.

Where the authors' code and papers differ, this follows the code, which loads the released weights: learning rates are a base rate times
samples a step / 256 (V1's paper: 9e-3 at 64 samples); v2 adds queries to prompts, and has biases alone (the paper: early fusion, which is
v2_early, and scale * (W x + bias), which is model.adapters.affine.order="output"). In v2_early the two kinds of data, whose leaves have
nothing in common, are learned one after the other, where the paper takes turns. V1's released weights are read without the gates' tanh
(mmjax.load says so, for a model_type llama_adapter_v1). v1_multimodal was never released: its projector's width, 112, and the number of its
scales, 1, are chosen for the published 1.8M, and it is not verified against weights. A text without a picture sees the prompts as they
are, where v2's authors show it a black one; pictures are not cropped at random.
Needs huggyllama/llama-7b (or -65b) and openai/clip-vit-large-patch14 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data sets below data/.
"""

from typing import Any

from mmjax.catalogue import ALPACA_52K, CLIP_L_224, CLIP_L_224_PROJECTED, INSTRUCT_158K, LLAMA1
from mmjax.config import (
    Adapter,
    Connector,
    Evaluation,
    Export,
    Image,
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

CAPTIONS = Source(
    kind="captions",
    path="data/coco/captions_train2017.jsonl",
    images="data/coco/train2017",
    options={"prompt": "Generate caption of this image"},
)
BIASED = ("llm/layers/attention/{query,output}", "llm/layers/mlp/*")
NORMS = ("llm/layers/*_norm/scale", "llm/final_norm/scale")


def get_config(argument: str = ""):
    known: dict[str, Any] = {"system": ("v1", "v1_multimodal", "v2", "v2_early", "v2_chat"), "tiny": False}
    chosen = parse_arguments(argument, known)
    model, stages, evaluations = {
        "v1": _v1,
        "v1_multimodal": _v1_multimodal,
        "v2": _v2,
        "v2_early": _v2_early,
        "v2_chat": _v2_chat,
    }[chosen.system]()
    recipe = Recipe(
        name=f"llama_adapter_{chosen.system}",
        model=model,
        stages=stages,
        run=tuple(stages),
        evaluations=evaluations,
        mesh=Mesh(data=1, fsdp=-1),
        export=Export(format="original"),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)


def _v1():
    model = _model(adapters={"prompts": Adapter(kind="adaption_prompt", length=10, depth=30)})
    stage = _stage(("llm/plugs/**",), {"alpaca": ALPACA_52K}, 5.0, 2.0, 1.125e-3, 0.02)
    return model, {"instruct": stage}, {}


def _v1_multimodal():
    model = _model(
        vision=CLIP_L_224,
        connector=Connector(kind="mlp2x_gelu", hidden_width=112),
        pooled=True,
        adapters={"prompts": Adapter(kind="adaption_prompt", length=10, depth=30, media="added")},
    )
    questions = {"scienceqa": Source(path="data/scienceqa/train.json", images="data/scienceqa/images")}
    held_out = Source(path="data/scienceqa/test.json", images="data/scienceqa/images")
    stage = _stage(("llm/plugs/**", "connector/**"), questions, 5.0, 2.0, 1.125e-3, 0.02)
    return model, {"instruct": stage}, {"scienceqa": Evaluation(source=held_out, blind=True)}


def _v2():
    prompts = Adapter(kind="adaption_prompt", length=10, depth=31, media="added", adapted=False)
    model = _model(
        vision=CLIP_L_224_PROJECTED,
        **_clip(latents=10),
        adapters={"affine": Adapter(kind="affine", targets=BIASED, order="bias"), "prompts": prompts},
    )
    return model, _two_stages(("llm/plugs/**", "connector/**"), ("llm/**/affine_bias", *NORMS)), {}


def _v2_early():
    adapters = {
        "affine": Adapter(kind="affine", targets=("llm/layers/**",), order="output"),
        "early": Adapter(kind="adaption_prompt", depth=1, bottom=True, media="alone"),
        "prompts": Adapter(kind="adaption_prompt", length=10, depth=31),
    }
    model = _model(vision=CLIP_L_224_PROJECTED, **_clip(latents=20), adapters=adapters)
    late = ("llm/plugs/prompts/**", "llm/**/affine_*", *NORMS)
    return model, _two_stages(("llm/plugs/early/**", "connector/**"), late), {}


def _v2_chat():
    model = _model("65b", adapters={"affine": Adapter(kind="affine", targets=("llm/layers/**",), order="input")}, template="vicuna_v1")
    talks = {"sharegpt": Source(path="data/sharegpt_80k.json")}
    stage = _stage(("llm/**/affine_*", "llm/layers/*_norm/scale"), talks, 3.0, 1.0, 1.25e-4, 0.02, length=2048)
    return model, {"instruct": stage}, {}


def _model(size: str = "7b", **fields) -> Model:
    return Model(llm=LLAMA1[size], image=Image(aspect="crop"), dtype="bfloat16", **{"template": "alpaca", **fields})


def _clip(latents: int) -> dict:
    """CLIP as V2 reads it: the class token and all patches, normed and projected."""
    blocks = Connector(kind="visual_blocks", depth=8, hidden_width=768, latents=latents, heads=16)
    return {"connector": blocks, "feature_layers": (-1,), "keep_class_token": True, "post_norm": True, "projected": True}


def _two_stages(first: tuple[str, ...], second: tuple[str, ...]) -> dict[str, Stage]:
    gpt4 = Source(kind="alpaca", path="data/alpaca_gpt4_data.json")
    instructions = {"llava": INSTRUCT_158K, "gpt4": gpt4, "alpaca": ALPACA_52K}
    return {
        "pretrain": _stage(first, {"captions": CAPTIONS}, 150.0, 5.0, 1.25e-5, 0.05, length=96),
        "finetune": _stage(second, instructions, 4.0, 1.0, 1.25e-4, 0.02),
    }


def _stage(
    trainable: tuple[str, ...],
    sources: dict[str, Source],
    epochs: float,
    warm: float,
    rate: float,
    decay: float,
    length: int = 512,
) -> Stage:
    return Stage(
        trainable=trainable,
        sources=sources,
        epochs=epochs,
        rows=32,
        length=length,
        packing=False,
        optimizer=Optimizer(learning_rate=rate, warmup_ratio=warm / epochs, b2=0.95, weight_decay=decay),
        dtype="bfloat16",
        remat="full",
    )
