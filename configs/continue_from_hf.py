"""Go on training any supported vision-language model: a Hugging Face directory and a JSONL of messages are all it takes.

    python -m mmjax.main --config=configs/continue_from_hf.py:model=DIR,data=FILE.jsonl
    python -m mmjax.main --config=configs/continue_from_hf.py:model=DIR,data=FILE.jsonl,full,template=tokenizer,epochs=3
    python -m mmjax.main --config=configs/continue_from_hf.py:tiny      # the same path in a minute: a fresh model, drawn data

model      a LLaVA model in transformers' layout or in LLaVA's own, or the workdir or export of an earlier run
data       one JSON object a line: {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"},
           {"type": "text", "text": "What is this?"}]}, {"role": "assistant", "content": "A cat."}]}
images     the folder (or .tar) that the image paths are relative to; the folder of `data` unless given
lora|full  LoRA (rank 16, alpha 32, every Linear of the LLM but the head; learning rate 2e-4), or all of LLM and connector (2e-5)
template   the chat template the model was made with; v1 is LLaVA-1.5's, `tokenizer` the one its tokenizer carries

Afterwards the model, its LoRA merged, stands in WORKDIR/export in transformers' layout; --job=export --config.export.format=peft
writes the adapter alone.
"""

from pathlib import Path

from mmjax.config import (
    Adapter,
    Export,
    Model,
    Optimizer,
    Part,
    Recipe,
    Source,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

SMALL_LLAVA = Model(
    llm=Part(
        config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
    ),
    vision=Part(
        config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 84,
            "patch_size": 14,
        }
    ),
)


def get_config(argument: str = ""):
    chosen = parse_arguments(
        argument,
        {"model": "", "data": "", "images": "", "peft": ("lora", "full"), "template": "v1", "epochs": 1.0, "tiny": False},
    )
    lora = chosen.peft == "lora"
    source = Source(kind="messages", path=chosen.data, images=chosen.images or (str(Path(chosen.data).parent) if chosen.data else ""))
    finetune = Stage(
        trainable=("llm/**/lora_*",) if lora else ("llm/**", "connector/**"),
        sources={"data": source},
        epochs=chosen.epochs,
        rows=16,
        length=2048,
        tiles=3,
        accumulate=4,
        optimizer=Optimizer(learning_rate=2e-4 if lora else 2e-5, clip_norm=1.0),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name="continue_from_hf" if lora else "continue_from_hf_full",
        model=Model(
            path=chosen.model,
            llm=SMALL_LLAVA.llm if chosen.tiny else Part(),
            vision=SMALL_LLAVA.vision if chosen.tiny else Part(),
            template=chosen.template,
            adapters={"default": Adapter(rank=16, alpha=32.0, targets=("llm/layers/**",))} if lora else {},
            dtype="bfloat16" if lora else "float32",
        ),
        stages={"finetune": finetune},
        run=("finetune",),
        export=Export(after_training=True),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
