"""MobileNetV2 (arXiv 1801.04381) in transformers' layout, with its ImageNet classifier or without.

`pixel_values` [images, channels, height, width] (normalised) to `last_hidden_state` [images, channels, rows, columns],
`pooler_output`, `logits` where there is a classifier, and on request the maps of the sixteen blocks as `hidden_states_i`.
The step counters of torch's batch norms are passed over, and written as 0.
"""

from __future__ import annotations

import functools

import jax

from mmjax.errors import UserError
from mmjax.families import vision
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, convolution, counter, linear, rule
from mmjax.models import adapters, mobilenet_v2
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import MobileNetV2Config
from mmjax.tree import Params

CLASSIFIER = "MobileNetV2ForImageClassification"
MEAN = STD = (0.5, 0.5, 0.5)
NAMES = {"first": "first_conv", "expand": "expand_1x1", "depthwise": "conv_3x3", "reduce": "reduce_1x1"}
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    kinds = fields.get("architectures") or ["MobileNetV2Model"]
    if kinds[0] not in (CLASSIFIER, "MobileNetV2Model"):
        raise UserError(f"{where}: architectures = {kinds!r} is not supported (only {CLASSIFIER} and MobileNetV2Model)")
    activation = fields.get("hidden_act", "relu6")
    if activation not in mobilenet_v2.ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act = {activation!r} is not supported (only {', '.join(mobilenet_v2.ACTIVATIONS)})"
        )
    fields.only("output_stride", 8, 16, 32)
    encoder = MobileNetV2Config(
        image_size=fields.square("image_size", 224),
        depth_multiplier=fields.get("depth_multiplier", 1.0),
        depth_divisible_by=fields.get("depth_divisible_by", 8),
        min_depth=fields.get("min_depth", 8),
        expand_ratio=fields.get("expand_ratio", 6.0),
        output_stride=fields.get("output_stride", 32),
        first_layer_is_expansion=fields.get("first_layer_is_expansion", True),
        finegrained_output=fields.get("finegrained_output", True),
        tf_padding=fields.get("tf_padding", True),
        activation=activation,
        norm_eps=fields.get("layer_norm_eps", 0.001),
        channels=fields.get("num_channels", 3),
        classes=_classes(fields) if kinds[0] == CLASSIFIER else 0,
    )
    return ModelConfig(vision=encoder, image_mean=MEAN, image_std=STD)


def _classes(fields: Fields) -> int:
    """transformers counts the labels where they are named; a config that names none means two."""
    labels = fields.get("id2label")
    return len(labels) if labels is not None else fields.get("num_labels", 2)


def _write(config: ModelConfig, base: Config) -> Config:
    encoder = _encoder(config)
    written = {
        **base,
        "model_type": "mobilenet_v2",
        "architectures": [CLASSIFIER if encoder.classes else "MobileNetV2Model"],
        "image_size": encoder.image_size,
        "depth_multiplier": encoder.depth_multiplier,
        "depth_divisible_by": encoder.depth_divisible_by,
        "min_depth": encoder.min_depth,
        "expand_ratio": encoder.expand_ratio,
        "output_stride": encoder.output_stride,
        "first_layer_is_expansion": encoder.first_layer_is_expansion,
        "finegrained_output": encoder.finegrained_output,
        "tf_padding": encoder.tf_padding,
        "hidden_act": encoder.activation,
        "layer_norm_eps": encoder.norm_eps,
        "num_channels": encoder.channels,
    }
    if encoder.classes and len(base.get("id2label") or ()) != encoder.classes:
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(encoder.classes)}
        written["label2id"] = {name: int(i) for i, name in written["id2label"].items()}
    return written


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    encoder, table = _encoder(config), []
    prefix = "mobilenet_v2." if encoder.classes else ""
    for block in mobilenet_v2.network(encoder):
        for c in block.convolutions:
            theirs, ours = prefix + _name(c.path), f"vision/{c.path}"
            table.append(rule(f"{theirs}.convolution.weight", f"{ours}/kernel", form=convolution))
            table += [rule(f"{theirs}.normalization.{name}", f"{ours}/norm/{leaf}") for leaf, name in NORM.items()]
            table.append(rule(f"{theirs}.normalization.num_batches_tracked", f"{ours}/norm/mean", form=counter))
    return table + linear("classifier", "vision/head") if encoder.classes else table


def _name(path: str) -> str:
    """transformers' name of the convolution at one of our paths."""
    if path == "final":
        return "conv_1x1"
    block, part = path.split("/")
    return ("conv_stem" if block == "stem" else block.replace("blocks_", "layer.")) + "." + NAMES[part]


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict:
    found = _run(adapters.merge(params, config)[0]["vision"], vision.pixels(inputs), config=_encoder(config), run=run)
    hidden = found.pop("hidden_states")
    return {**found, **{f"hidden_states_{i}": state for i, state in enumerate(hidden)}} if states else found


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _run(params: Params, images: jax.Array, *, config: MobileNetV2Config, run: Execution) -> dict:
    maps = mobilenet_v2.maps(params, config, images, run)
    state = mobilenet_v2.pooled(maps[-1])
    foreign = [m.transpose(0, 3, 1, 2) for m in maps]
    found = {"last_hidden_state": foreign[-1], "pooler_output": state, "hidden_states": foreign[1:-1]}
    return {**found, "logits": mobilenet_v2.logits(params, config, state)} if config.classes else found


def _encoder(config: ModelConfig) -> MobileNetV2Config:
    assert isinstance(config.vision, MobileNetV2Config)
    return config.vision


FAMILY = Family(
    model_types=("mobilenet_v2",),
    about="MobileNetV2 (arXiv 1801.04381)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=_outputs,
)
