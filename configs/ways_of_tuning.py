"""One small model, one data set, every way of tuning: what each trains, costs and reaches.

    python -m tests.ways_of_tuning                                          # all of them: a table and a picture
    python -m mmjax.main --config=configs/ways_of_tuning.py:base            # what they all start from
    python -m mmjax.main --config=configs/ways_of_tuning.py:lora            # one of them, on top of workdirs/ways_of_tuning_base

The base is the quickstart's (configs/quickstart.py), shown and asked all but three kinds of question: it sees, and answers where a digit
is and whether it is there. Each way of tuning then teaches it, on scenes of real handwriting, to count, to find the largest and to add up,
with everything else frozen; `full` trains all of the language model. Learning rates are one for each way, chosen among a few by the loss
at the end of training. LaVIN's mixture of modalities (configs/lavin.py) is not among them: it puts a token of its own into the text.
"""

from __future__ import annotations

import dataclasses

from configs import quickstart
from mmjax.config import (
    Adapter,
    Evaluation,
    Export,
    Model,
    Recipe,
    Source,
    Stage,
    from_config_dict,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

KNOWN, NEW = ("position", "contains", "position", "order"), ("count", "largest", "sum")
STEPS = 200
BASE = "workdirs/ways_of_tuning_base"
LINEARS, NORMS = ("llm/layers/**",), ("llm/layers/*_norm", "llm/final_norm")
BESIDE, BEFORE, WITHIN = ("llm/**/adapters/tune/**",), ("llm/prompts/tune/**",), ("llm/plugs/tune/**",)

# name -> (what is added, what is trained, learning rate)
WAYS: dict[str, tuple[Adapter | None, tuple[str, ...], float]] = {
    "lora": (Adapter(rank=8, alpha=16.0, targets=LINEARS), BESIDE, 4e-3),
    "dora": (Adapter(rank=8, alpha=16.0, targets=LINEARS, dora=True), BESIDE, 4e-3),
    "ia3": (Adapter(kind="ia3", targets=("llm/layers/*/{key,value,down}",), feedforward=("llm/layers/mlp/down",)), BESIDE, 8e-2),
    "affine": (Adapter(kind="affine", targets=LINEARS), BESIDE, 4e-2),
    "norm": (Adapter(kind="norm", targets=NORMS), BESIDE, 8e-2),
    "prompt": (Adapter(kind="prompt", tokens=16), BEFORE, 1e-1),
    "p_tuning": (Adapter(kind="p_tuning", tokens=16, encoder="mlp"), BEFORE, 4e-3),
    "prefix": (Adapter(kind="prefix", tokens=16), WITHIN, 3e-2),
    "llama_adapter": (Adapter(kind="adaption_prompt", length=16, depth=3), WITHIN, 1.5e-1),
    "houlsby": (Adapter(kind="bottleneck", width=16, places=("attention", "mlp"), reads="output"), WITHIN, 1.2e-2),
    "pfeiffer": (Adapter(kind="bottleneck", width=16), WITHIN, 1.2e-2),
    "parallel": (Adapter(kind="bottleneck", width=16, reads="input"), WITHIN, 1.2e-2),
    "full": (None, ("llm/layers/**", "llm/final_norm/**", "llm/embed/**"), 1e-3),
}


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"way": ("base", *WAYS), "path": BASE, "tiny": False})
    recipe = base() if chosen.way == "base" else tuned(chosen.way, chosen.path)
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)


def base() -> Recipe:
    """The quickstart without the new kinds of question, and without adapters."""
    whole = from_config_dict(quickstart.get_config())
    stages = {name: dataclasses.replace(stage, sources=_of_kinds(stage, KNOWN)) for name, stage in whole.stages.items()}
    stages["instruct"] = dataclasses.replace(stages["instruct"], trainable=("connector/**",), steps=200)
    evaluations = {"known": _evaluation(whole, KNOWN)}
    model = dataclasses.replace(whole.model, adapters={})
    return dataclasses.replace(
        whole, name="ways_of_tuning_base", model=model, stages=stages, evaluations=evaluations, export=Export()
    )


def tuned(way: str, path: str) -> Recipe:
    """The quickstart's last stage on the base, with the new kinds alone."""
    whole = from_config_dict(quickstart.get_config())
    adapter, trainable, rate = WAYS[way]
    stage = whole.stages["instruct"]
    stage = dataclasses.replace(
        stage,
        trainable=trainable,
        sources=_of_kinds(stage, NEW),
        optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate),
        steps=STEPS,
        cache_features=True,
    )
    return dataclasses.replace(
        whole,
        name=f"ways_of_tuning_{way}",
        model=Model(path=path, system="", adapters={"tune": adapter} if adapter else {}),
        stages={"instruct": stage},
        run=("instruct",),
        evaluations={"new": _evaluation(whole, NEW)},
        export=Export(),
    )


def _of_kinds(stage: Stage, kinds: tuple[str, ...]) -> dict[str, Source]:
    return {
        name: dataclasses.replace(source, options={**source.options, "kinds": kinds}) if "kinds" in source.options else source
        for name, source in stage.sources.items()
    }


def _evaluation(whole: Recipe, kinds: tuple[str, ...]) -> Evaluation:
    evaluation = whole.evaluations["scenes"]
    source = dataclasses.replace(evaluation.source, options={**evaluation.source.options, "kinds": kinds, "size": 200 * len(kinds)})
    return dataclasses.replace(evaluation, source=source, report_apart=(), blind=False)
