"""LaVIN (arXiv 2305.15023) in its authors' layout: LLaMA as its authors name it, OpenAI's CLIP below `backbone.visual.`, and the adapters.

Inputs: `examples` [rows, length], ids that begin with the start of the text, all of them real; `labels`, 0 where nothing is to be predicted;
`images` [rows, 3, height, width], normalised; `img_indicators` [rows], whether a row has one; `prefix_img` and `prefix_nonimg`, ids that are
put behind the first one, with the image's tokens behind them, where there is one. As in the authors' code a modality token is put in front,
and what reaches beyond `length` is cut off. Outputs: `logits` [rows, length, vocab], with labels `loss` [1]; `clip_cls_taps` and
`image_embeds` [rows, taps, width] before and behind the projector.

The authors route pictures by the first one of a batch (see mmjax.models.modality_mixture), the blank one of a row without a picture included.

A published file holds `{'model': ...}` with the adapters alone; beside it a config.json says where the rest is: `llama_path` and `clip_path`.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import language, open_flamingo, original_llama
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Form, Rule, linear, prefixed, rule, same, transposed
from mmjax.families.llama_adapter import openai_clip
from mmjax.models import modality_mixture, multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.models.tuning_config import ModalityMixtureConfig
from mmjax.tree import Params

EVERY = 4  # blocks of the encoder, behind each of which the class token is read
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, not CLIP's
TEXT, PICTURES = "text", "pictures"  # names of the two adapters of a model that is read
PLACES: dict[str, tuple[Any, ...]] = {
    "attn": ("attention",),
    "block": ("attention", "mlp"),
    "router": ("attention",),
    "router_block": ("attention", "mlp"),
}
NAMES = {"attention": "adapter_attn", "mlp": "adapter_mlp"}


def mixtures(
    width: int, scale: float, temperature: float, places: tuple[Any, ...], picture_places: tuple[Any, ...], groups: int = 2
) -> tuple[ModalityMixtureConfig, ModalityMixtureConfig]:
    """The adapters of the language model and of the encoder."""
    in_text = ModalityMixtureConfig(TEXT, width, groups, temperature, scale, places=places, parts=("llm",))
    return in_text, ModalityMixtureConfig(PICTURES, width, groups, temperature, scale, places=picture_places, parts=("vision",))


def taps(layers: int) -> tuple[int, ...]:
    """The blocks behind which the class token is read."""
    return tuple(range(EVERY, layers + 1, EVERY))


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    sizes = Fields(fields.part("params", ""), f"{where}: params")
    sizes.only("drop_path", 0.0)
    llm = original_llama.read_decoder(sizes)
    tower = openai_clip(Fields(fields.part("clip", "clip"), f"{where}: clip"), fields.get("clip_vision_head_dim", 64))
    layers = taps(tower.layers)
    if not layers:
        raise UserError(f"{where}: the class token is read behind every {EVERY}th block, and the encoder has {tower.layers}")
    for name, known in (("adapter_type", ("attn", "block")), ("visual_adapter_type", ("router", "router_block"))):
        fields.only(name, *known)
    added = mixtures(
        fields.get("adapter_dim", 8),
        float(fields.get("adapter_scale", 1.0)),
        float(fields.get("temperature", 10.0)),
        PLACES[fields.get("adapter_type", "attn")],
        PLACES[fields.get("visual_adapter_type", "router")],
        fields.get("groups", 2),
    )
    features = FeatureSpec(layers, class_tokens=True)
    return ModelConfig(
        llm=llm,
        vision=tower,
        connector=projector(tower, features, sizes.get("hidden_proj", 128), llm.block.width),
        features=features,
        adapters=added,
        image_mean=MEAN,
        image_std=STD,
        image_aspect="squash",
    )


def projector(tower: ViTConfig, features: FeatureSpec, hidden: int, width: int) -> ConnectorConfig:
    return ConnectorConfig(
        "mlp", tower.block.width, width, features.positions(tower), depth=2, hidden_width=hidden, activation="silu"
    )


def _mixture(config: ModelConfig, part: str) -> ModalityMixtureConfig | None:
    return next((a for a in config.adapters if isinstance(a, ModalityMixtureConfig) and part in a.parts), None)


def expressible(config: ModelConfig) -> str:
    """Why this layout cannot hold a model; "" if it can."""
    text, pictures, tower, c = _mixture(config, "llm"), _mixture(config, "vision"), config.vision, config.connector
    if config.llm is None or text is None or pictures is None or len(config.adapters) != len({text.name, pictures.name}):
        return "it is a LLaMA and a CLIP with a mixture of modality adapters each, and no other adapters"
    alike = all(getattr(text, name) == getattr(pictures, name) for name in ("width", "scale", "groups", "temperature"))
    if text.layers or pictures.layers or not alike:
        return "its adapters sit in all layers, and have one width, one scale, one temperature and as many groups in text and pictures"
    if pictures.visual_router != "released":
        return "its pictures are routed by the first one of a batch"
    if not isinstance(tower, ViTConfig) or tower.block.activation != "quick_gelu" or not tower.pre_norm or tower.patch_bias:
        return "its encoder is OpenAI's CLIP"
    if c is None or c != projector(tower, config.features, c.inner_width, config.llm.block.width):
        return "its connector is Linear, SiLU, Linear"
    if config.features != FeatureSpec(taps(tower.layers), class_tokens=True):
        return f"its connector reads the class token behind every {EVERY}th block"
    return ""


def _write(config: ModelConfig, base: Config) -> Config:
    if why := expressible(config):
        raise UserError(f"the model does not fit LaVIN's layout: {why}")
    text, pictures, tower, c = _mixture(config, "llm"), _mixture(config, "vision"), config.vision, config.connector
    assert text is not None and pictures is not None and isinstance(tower, ViTConfig) and c is not None
    sizes = original_llama.write_decoder(config.language, base.get("params", {}))
    return {
        **{key: value for key, value in base.items() if not key.endswith("_path")},
        "model_type": "lavin",
        "clip_vision_head_dim": tower.block.head_dim,
        "temperature": text.temperature,
        **({"groups": text.groups} if text.groups != 2 else {}),
        "adapter_dim": text.width,
        "adapter_scale": text.scale,
        "adapter_type": "block" if "mlp" in text.places else "attn",
        "visual_adapter_type": "router_block" if "mlp" in pictures.places else "router",
        "params": {**sizes, "hidden_proj": c.inner_width, "drop_path": 0.0},
        "clip": {
            **base.get("clip", {}),
            "embed_dim": tower.projection,
            "image_resolution": tower.native_size or tower.image_size,
            "vision_layers": tower.layers,
            "vision_width": tower.block.width,
            "vision_patch_size": tower.patch_size,
        },
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert isinstance(config.vision, ViTConfig)
    text, pictures = _mixture(config, "llm"), _mixture(config, "vision")
    assert text is not None and pictures is not None
    blocks = "backbone.visual.transformer.resblocks.{i}."
    return [
        *original_llama.rules(config.language),
        *prefixed("backbone.visual.", open_flamingo.tower_rules(config.vision)),
        *mixture_rules(text, "layers.{i}.", f"llm/plugs/{text.name}/"),
        *mixture_rules(pictures, blocks, f"vision/plugs/{pictures.name}/"),
        rule("adapter_modality_embedding.weight", f"{modality_mixture.path(text.name)}/modality"),
        *linear("adapter_proj.conv_A", "connector/layers_0"),
        *linear("adapter_proj.conv_B", "connector/layers_1"),
    ]


def mixture_rules(adapter: ModalityMixtureConfig, theirs: str, ours: str, names: Mapping[str, str] = NAMES) -> list[Rule]:
    """The key table of an adapter's leaves at `ours`, in layers called `theirs`."""
    table = []
    for place in adapter.places:
        for name, leaf in (("conv_A", "down"), ("conv_B", "first"), ("conv_D", "second"), ("expert_weights", "router")):
            module, form = f"{theirs}{names[place]}.{name}", transposed if leaf == "router" else convolved
            table += [
                rule(f"{module}.weight", f"{ours}{place}/{leaf}", form=form),
                rule(f"{module}.bias", f"{ours}{place}/{leaf}_bias", form=same),
            ]
    return table


convolved = Form(lambda shape: (*shape[::-1], 1), lambda a: a[..., 0].T, lambda a: a.T[..., None])
"""A convolution over one position: [out, in, 1]; ours [in, out]."""


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs, room: int = 0) -> Batch:
    """Rows without their modality tokens, cut to `room` positions (0 = whole), on the left of which the shorter ones are padded."""
    if "examples" not in inputs:
        raise UserError("examples are missing")
    examples = np.asarray(inputs["examples"])
    shown = np.asarray(inputs.get("img_indicators", np.zeros(len(examples)))).reshape(-1) > 0
    if shown.any() and "images" not in inputs:
        raise UserError("img_indicators say that rows have images, but there are none")
    labels, tokens, rows = inputs.get("labels"), config.tokens_per_tile, []
    for row, ids in enumerate(examples):
        before = np.asarray(inputs.get("prefix_img" if shown[row] else "prefix_nonimg", ())).reshape(-1).astype(np.int64)
        pictures = np.arange(tokens) + row * tokens if shown[row] else np.zeros(0, int)
        inserted = len(before) + len(pictures)
        text = np.concatenate([ids[:1], before, np.zeros(len(pictures), int), ids[1:]])
        media = np.concatenate([np.full(1 + len(before), -1), pictures, np.full(len(ids) - 1, -1)])
        wanted = np.zeros(len(text), int)
        if labels is not None:
            wanted = np.concatenate([labels[row][:1], np.zeros(inserted, int), labels[row][1:]])
        rows.append([part[: room or None] for part in (text, media, wanted)])
    length = max(len(text) for text, _, _ in rows)

    def padded(parts: list[np.ndarray], fill: int) -> np.ndarray:
        return np.stack([np.concatenate([np.full(length - len(part), fill), part]) for part in parts]).astype(np.int32)

    text, media, wanted = (padded([row[k] for row in rows], fill) for k, fill in ((0, 0), (1, -1), (2, 0)))
    real = padded([np.ones(len(row[0]), int) for row in rows], 0)
    found: dict[str, Any] = {"tokens": text, "media": media, "segments": real, "positions": np.maximum(np.cumsum(real, 1) - 1, 0)}
    if labels is not None:
        found |= language.targets(np.where(wanted == 0, language.IGNORED, wanted))
    if "images" in inputs:
        pixels = np.asarray(inputs["images"], np.float32).transpose(0, 2, 3, 1)
        found |= {"images": pixels[None], "tiles": np.ones((1, len(pixels)), bool)}
    return Batch(**found)


def _prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return _batch(config, foreign, {name: value for name, value in inputs.items() if name != "labels"})


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    if "labels" in inputs and np.asarray(inputs["labels"]).shape != np.asarray(inputs["examples"]).shape:
        raise UserError("labels have the shape of examples")
    batch = _batch(config, foreign, inputs, room=np.shape(inputs["examples"])[1] - 1)
    found = language.run_language(params, batch, config=config, run=run, states=False)
    kept = {"logits": found["logits"]}
    if "loss" in found:
        kept["loss"] = found["loss"].reshape(1)
    for ours, theirs in (("image_features", "clip_cls_taps"), ("connector_output", "image_embeds")):
        if ours in found:
            kept[theirs] = found[ours]
    # What the modality tokens predict, which stand in front of the rows there.
    first = _of_tokens(params, config=config, run=run)
    shown = (np.asarray(inputs.get("img_indicators", np.zeros(len(batch.tokens)))).reshape(-1) > 0).astype(int)
    kept["logits"] = jnp.concatenate([first[shown][:, None], kept["logits"]], 1)
    return kept


def _of_tokens(params: Params, config: ModelConfig, run: Execution) -> jax.Array:
    """float32 logits [modality, vocab] of the modality tokens."""

    @jax.jit
    def predict(params: Params) -> jax.Array:
        routed = multimodal.route(params, config, Batch(segments=jnp.ones((1, 1), jnp.int32)), run)
        assert routed is not None
        return multimodal.head(params, config, routed.last)[:, 0]

    return predict(params)


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    return {**config, "params": original_llama.with_vocabulary(config.get("params", {}), stored)}


def _external(config: Config) -> dict[str, str]:
    named: dict[str, Any] = {"llm": config.get("llama_path"), "vision": config.get("clip_path")}
    return {part: name for part, name in named.items() if name}


FAMILY = Family(
    model_types=("lavin",),
    about="LaVIN (arXiv 2305.15023)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("examples", "labels", "images", "prefix_img", "prefix_nonimg", "img_indicators"),
    outputs=_outputs,
    prompt=_prompt,
    # Releases that name the projector's layers by number, and parallel training.
    spellings=((r"^module\.", ""), (r"^adapter_proj\.0\.", "adapter_proj.conv_A."), (r"^adapter_proj\.2\.", "adapter_proj.conv_B.")),
    complete=_complete,
    unused=(
        r"rope\.freqs$",
        r"^backbone\.(token_embedding|positional_embedding|text_projection|ln_final|logit_scale|transformer)\b",
    ),
    external=_external,
    partial=("llm", "vision"),
    keeps_adapters=(ModalityMixtureConfig,),
)
