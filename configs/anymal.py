"""AnyMAL-style (after Moon et al., AnyMAL: An Efficient and Scalable Any-Modality Augmented Language Model, arXiv 2309.16058), images.

    python -m mmjax.main --config=configs/anymal.py                # 7B: align the resampler, then tune it with LoRA
    python -m mmjax.main --config=configs/anymal.py:70b            # also 13b
    python -m mmjax.main --config=configs/anymal.py:flamingo       # Flamingo's resampler in place of one with sublayers of its own
    python -m mmjax.main --config=configs/anymal.py:tiny           # the same path in a minute, on drawn data

What it is     CLIP ViT-L/14 (256 patches and the class token), a perceiver resampler of 6 layers that makes 64 tokens, Llama 2 chat.
               The authors' code and weights were never published. The resampler is, by argument, that of an open code base
               (`cross_self`: cross-attention, self-attention and MLP at the LLM's width) or Flamingo's (`flamingo`, at CLIP's width).
Stages         align     resampler alone on image captions (200M of LAION-2B); 2,048 samples a step, 100,000 steps
               instruct  resampler and LoRA (rank 64, alpha 16) on multimodal instructions (60K by people, 150K generated); learning
                         rate 1e-5, 128 samples a step, 3,000 steps
Trained (7B)   1,615,597,568; 1,775,505,408 parameters (the resampler is as wide as the LLM).
Cost           the authors align the 70B on one 80 GB GPU with 4 samples at a time, its weights in 4 or 8 bits.
Results (as published, 70B)   COCO captions CIDEr 95.9 without examples, VQAv2 64.2 (67.8 with instructions), TextVQA 32.9,
               VizWiz 33.8 (41.3), ScienceQA 70.8.

Not published, so chosen here: which of CLIP's states is read (the last one, before its norm, with the class token), the learning rate of
align (2e-4 with 1,000 steps of warm-up and a cosine) and LoRA's dropout (0.05), which are the open code base's.
Differs from the paper: the frozen LLM is held in bfloat16. No weights are claimed to agree.
Needs meta-llama/Llama-2-7b-chat-hf and openai/clip-vit-large-patch14 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data below data/.
"""

from typing import Any

from mmjax.catalogue import CLIP_L_224, LLAMA2_CHAT
from mmjax.config import (
    Adapter,
    Connector,
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

RESAMPLERS = {
    "cross_self": Connector(kind="cross_self_perceiver", depth=6, latents=64, heads=16),
    "flamingo": Connector(kind="perceiver", depth=6, latents=64, heads=8, head_dim=64, hidden_width=1024, bias=False),
}


def get_config(argument: str = ""):
    known: dict[str, Any] = {"size": ("7b", "13b", "70b"), "resampler": tuple(RESAMPLERS), "tiny": False}
    chosen = parse_arguments(argument, known)
    align = Stage(
        trainable=("connector/**",),
        sources={"captions": Source(kind="pairs", path="data/laion_200m/*.tar")},
        steps=100_000,
        rows=2048,
        length=128,  # 64 for the picture, the rest for its caption
        packing=False,
        template="plain",
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=1000),
        dtype="bfloat16",
        remat="full",
    )
    instruct = Stage(
        trainable=("connector/**", "llm/**/lora_*"),
        sources={"instructions": Source(path="data/mm_it.json", images="data/mm_it_images")},
        steps=3_000,
        rows=128,
        length=512,
        packing=False,
        optimizer=Optimizer(learning_rate=1e-5),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"anymal_{chosen.size}" + ("_flamingo" if chosen.resampler == "flamingo" else ""),
        model=Model(
            llm=LLAMA2_CHAT[chosen.size],
            vision=CLIP_L_224,
            connector=RESAMPLERS[chosen.resampler],
            feature_layers=(-1,),
            keep_class_token=True,
            image=Image(aspect="crop"),
            template="llava_llama_2",
            adapters={"default": Adapter(rank=64, alpha=16.0, dropout=0.05, targets=("llm/layers/**",))},
            dtype="bfloat16",
        ),
        stages={"align": align, "instruct": instruct},
        run=("align", "instruct"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
