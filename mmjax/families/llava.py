"""LLaVA (arXiv 2304.08485, 2310.03744) in transformers' layout: a vision tower, a two-layer MLP, a language model.

`input_ids` hold as many placeholders for an image as it has tokens; the images of all rows stand one after another in
`pixel_values`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import language, parts, vision
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, prefixed
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, Merge, ViTConfig
from mmjax.tree import Params

PLACEHOLDER = 32000
# Names of CLIP's and SigLIP's tensors, which may stand below `vision_model.` or not; other towers' never do.
TOWER = r"(?=embeddings\.(class|patch|position)_embedding\b|pre_layrnorm\.|encoder\.layers\.|post_layernorm\.|head\.)"
FIXED_SIZE = ("clip_vision_model", "siglip_vision_model", "vit")
ANY_SIZE = ("dinov2", "dinov2_with_registers", "internvl_vision")
"""Towers that transformers' llava can be made of. Only those of ANY_SIZE interpolate positions in it."""


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    """text_config and vision_config. Whatever head the tower was published with is not part of the whole."""
    fields = Fields(config, where)
    image = fields.part("vision_config", "clip_vision_model")
    return fields.part("text_config", "llama"), {k: v for k, v in image.items() if k != "architectures"}


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    text, image = _parts(config, where)
    llm = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config").llm
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    assert llm is not None and tower.vision is not None
    if why := unsuited(llm, text):
        raise UserError(f"{where}: text_config does not fit this layout: {why}")
    layers = fields.get("vision_feature_layer", -2)
    spec = FeatureSpec(
        layers=tuple(layers) if isinstance(layers, (list, tuple)) else (layers,),
        keep_class_token=_keeps_class_token(fields, tower),
        keep_registers=True,
    )
    if fields.get("tie_word_embeddings", False) and not llm.tied_head:
        raise UserError(f"{where}: tie_word_embeddings differs between the whole and its text_config")
    vision_config = tower.vision
    return ModelConfig(
        llm=llm,
        vision=vision_config,
        connector=ConnectorConfig(
            kind="mlp",
            in_width=vision_config.feature_width * len(spec.layers),
            out_width=llm.input_width,
            positions=spec.positions(vision_config),
            activation=fields.activation("projector_hidden_act", "gelu"),
            bias=fields.get("multimodal_projector_bias", True),
        ),
        features=spec,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        image_aspect=tower.image_aspect,
    )


def _class_token(config: ModelConfig) -> bool:
    return isinstance(config.vision, ViTConfig) and config.vision.class_token


def _keeps_class_token(fields: Fields, tower: ModelConfig) -> bool:
    strategy = fields.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UserError(
            f"{fields.where}: vision_feature_select_strategy = {strategy!r} is not supported (only default, full)"
        )
    if strategy == "default" and not _class_token(tower):
        raise UserError(
            f"{fields.where}: vision_feature_select_strategy = 'default' drops the first position, but this vision "
            "tower has no class token: a patch would be lost. Set it to 'full'."
        )
    return strategy == "full"


def expressible(config: ModelConfig, text: Config, image: Config, merge: Merge = "flat") -> str:
    """Why this layout (or its kin with this merge) cannot hold a model with this text_config and vision_config; "" if it can."""
    c = config.connector
    if config.llm is None or not isinstance(config.vision, ViTConfig) or c is None:
        return "it needs a language model, a vision transformer and a connector"
    if config.mask != "causal":
        return f"its mask is causal, not {config.mask!r}"
    if config.cross_attention is not None:
        return "its language model reads media as tokens of the text, not between its blocks"
    if c.kind != "mlp" or c.depth != 2 or c.hidden_width not in (0, c.out_width) or c.grid or _normed(c):
        return "its connector is a two-layer MLP as wide as the language model, over every position"
    if image["model_type"] not in FIXED_SIZE + ANY_SIZE:
        return f"transformers has no llava around a {image['model_type']}"
    if config.vision.registers and not config.features.keep_registers:
        return "its connector reads the encoder's registers as well"
    if c.merge != merge:
        return f"it puts the tokens of a picture's tiles together as {merge!r}, not {c.merge!r}"
    if config.features.joined or config.features.scales != (1,):
        return "its connector reads every position of one tile, at one scale"
    if config.features.post_norm:
        return "its connector reads the encoder's states before the last norm"
    return unsuited(config.llm, text)


def _normed(connector: ConnectorConfig) -> bool:
    return connector.input_norm or connector.output_norm or bool(connector.squeeze_width or connector.frames)


def unsuited(llm: DecoderConfig, text: Config) -> str:
    """Why transformers' llava cannot hold this language model; "" if it can. It has a plain head of its own over the states of
    a model that keeps its embeddings at `embed_tokens`."""
    names = [r.name for r in parts.language(text, "text_config").rules(ModelConfig(llm=llm), text)]
    if "model.embed_tokens.weight" not in names or "lm_head.bias" in names:
        return f"transformers has no llava around a {text['model_type']}, or none with a bias on its head"
    if llm.logit_softcap or llm.logit_scale != 1.0:
        return "its language model's logits are what the head gives"
    if llm.input_width != llm.block.width:
        return "its language model's embeddings are as wide as its blocks"
    return ""


def _write(config: ModelConfig, base: Config) -> Config:
    return {**written(config, base), "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}


def written(config: ModelConfig, base: Config, merge: Merge = "flat") -> Config:
    """The fields that this layout and its kin share. Raises UserError for a model that they cannot hold."""
    text, image = _parts(base, "the model's config")
    if why := expressible(config, text, image, merge):
        raise UserError(f"the model does not fit the Hugging Face llava layout: {why}")
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    layers = config.features.layers
    keeps = config.features.keep_class_token or not config.vision.class_token
    text = parts.language(text, "text_config").write_config(config, text)
    return {
        **base,
        "text_config": text,
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
        "image_token_index": placeholder(base),
        "image_seq_length": config.connector.tokens,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "full" if keeps else "default",
        "projector_hidden_act": activation_name(config.connector.activation, base.get("projector_hidden_act")),
        "multimodal_projector_bias": config.connector.bias,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    text, image = _parts(foreign, "the model's config")
    return [
        *prefixed("language_model.", parts.language(text, "text_config").rules(config, text)),
        *prefixed("vision_tower.", parts.vision(image, "vision_config").rules(config, image)),
        *linear("multi_modal_projector.linear_1", "connector/layers_0", config.connector.bias),
        *linear("multi_modal_projector.linear_2", "connector/layers_1", config.connector.bias),
    ]


def placeholder(config: Config) -> int:
    """The id that stands for one image token."""
    for name in ("image_token_index", "image_token_id"):
        if config.get(name) is not None:
            return int(config[name])
    return PLACEHOLDER


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """The batch of foreign inputs. Raises UserError where placeholders and images do not agree in number."""
    return spliced(config, language.text_batch(config, inputs, placeholder(foreign)), inputs)


def spliced(config: ModelConfig, rows: Batch, inputs: Inputs) -> Batch:
    """The rows with the pictures whose tokens they hold. Raises UserError where the two do not agree in number."""
    found = int((np.asarray(rows.media) >= 0).sum())
    images = vision.pixels(inputs) if "pixel_values" in inputs else None
    tokens = config.tokens_per_tile if images is None else config.for_pictures(*images.shape[1:3]).tokens_per_tile
    needed = 0 if images is None else len(images) * tokens
    if found != needed:
        given = f"{0 if images is None else len(images)} images of {tokens} tokens"
        raise UserError(f"input_ids hold {found} image tokens, but {given} are given")
    return with_images(rows, images)


def with_images(rows: Batch, images: np.ndarray | None) -> Batch:
    fields: dict[str, Any] = dict(vars(rows))
    if images is not None and len(images):
        fields["images"] = images[None]
        fields["tiles"] = np.ones((1, len(images)), bool)
    return Batch(**fields)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    found = language.run_language(params, batch(config, foreign, inputs), config=config, run=run, states=states)
    return in_rows(found)


def in_rows(found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The outputs with the connector's as rows of tokens, as transformers has them."""
    if "connector_output" in found:
        connected = found["connector_output"]
        found["connector_output"] = found["image_hidden_states"] = connected.reshape(-1, connected.shape[-1])
    return found


def _copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    return tied if config.llm.tied_head else {}


FAMILY = Family(
    model_types=("llava",),
    about="LLaVA 1.5 and its kin (arXiv 2310.03744)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*language.INPUTS, "pixel_values"),
    outputs=_outputs,
    prompt=batch,
    # Published files; transformers 5 leaves out `vision_model.`; and both with the names that modules have in memory.
    spellings=(
        (r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)", ""),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^language_model\.(?!(model|lm_head)\.)", "language_model.model."),
        (r"^vision_tower\." + TOWER, "vision_tower.vision_model."),
    ),
    copies=_copies,
    unneeded=("vision/head/**", "vision/projection/**"),
    modules=(
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
)
