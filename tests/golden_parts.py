"""Goldens of parts of systems: the package's functions behind its key tables. All that is done here is to map names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

import jax
import numpy as np

import mmjax
from mmjax import export
from mmjax.batch import Batch
from mmjax.checkpoints import weights
from mmjax.data.encoding import IGNORED, Encoder, Example
from mmjax.data.messages import Sample
from mmjax.data.templates import Segment, Template
from mmjax.errors import UserError
from mmjax.families import anymal, flamingo, keys, lavin, moondream_2024, open_flamingo, reading, vila
from mmjax.families import minigpt4 as minigpt4_family
from mmjax.families import robust_ger as robust_ger_family
from mmjax.models import (
    connectors,
    gated_cross_attention,
    image_text,
    mine,
    modality_mixture,
    multimodal,
    perceiver,
    plugged,
    vit,
)
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, GatedCrossAttentionConfig, ViTConfig
from mmjax.models.tuning_config import ModalityMixtureConfig
from mmjax.preprocessing import read_tokenizer

Arrays = dict[str, Any]
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "sqrelu": "squared_relu"}
GELU: dict[str, Any] = {"erf": "gelu", "tanh": "gelu_tanh"}


def vila_projector(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features = inputs["image_features"]
    widths = config["mm_hidden_size"], config["hidden_size"]
    order: Any = "columns" if config["token_order"].startswith("transposed") else "rows"
    shape = vila.projector(config["mm_projector_type"], *widths, features.shape[1], order)
    params = _connector(directory, shape, vila.projector_rules(shape))
    return {
        "downsampled": connectors.group(shape, features),
        "connector_output": connectors.connect(params, shape, features),
    }


def anymal_linear(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    if config["pool_type"]:
        raise UserError(f"pool_type {config['pool_type']} is not supported")
    features = inputs["image_features"]
    shape = anymal.projector(config["num_layers"], config["input_dim"], config["output_dim"], features.shape[1])
    params = _connector(directory, shape, anymal.projector_rules(shape))
    return {"connector_output": connectors.connect(params, shape, features)}


def anymal_perceiver(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features = inputs["image_features"]
    shape = ConnectorConfig(
        "cross_self_perceiver",
        config["input_dim"],
        config["output_dim"],
        features.shape[1],
        depth=config["num_layers"],
        latents=config["num_latents"],
        heads=config["num_heads"],
    )
    params = _connector(directory, shape, anymal.resampler_rules(shape))
    return {"connector_output": connectors.connect(params, shape, features)}


def flamingo_perceiver(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features, layout = inputs["image_features"], config["implementation"]
    shape = ConnectorConfig(
        "perceiver",
        config["dim"],
        config["dim"],
        features.shape[-2],
        depth=config["depth"],
        activation=ACTIVATIONS[config["act"]],  # type: ignore[arg-type]
        bias=False,
        latents=config["num_latents"],
        heads=config["heads"],
        head_dim=config["dim_head"],
        frames=config.get("num_time_embeds") or config.get("max_num_frames") or 0,
        media=config.get("max_num_media") or 0,
    )
    params = _connector(directory, shape, flamingo.resampler_rules(shape, layout))
    if layout == "flamingo_mini":  # one medium a row: [rows, frames, positions, width]
        return {"connector_output": perceiver.resample(params, shape, features[:, None])[:, 0]}
    return {"connector_output": perceiver.resample(params, shape, features)}


def gated_cross_attention_block(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    shape = GatedCrossAttentionConfig(
        BlockConfig(
            width=config["dim"],
            heads=config["heads"],
            kv_heads=config["heads"],
            head_dim=config["dim_head"],
            mlp_width=config["dim"] * config["ff_mult"],
            activation=ACTIVATIONS[config["act"]],  # type: ignore[arg-type]
            norm="layer",
            norm_eps=1e-5,
            gated_mlp=False,
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            memory_width=config["dim_visual"],
        ),
        last_media_only=config["only_attend_immediate_media"],
    )
    shapes = {"block": jax.eval_shape(lambda: gated_cross_attention.init(jax.random.key(0), shape))}
    rules = flamingo.gated_cross_attention_rules(config["implementation"], path="block/")
    params = reading.load(weights.read(directory), rules, shapes, dtype="float32", where=directory)["block"]
    x, media, locations = inputs["text_features"], inputs["visual_features"], inputs["media_locations"]
    held = gated_cross_attention.keys_values(params, shape, media)

    def memory(begun: jax.Array) -> gated_cross_attention.Memory:
        return (*held, gated_cross_attention.media_mask(shape, begun, media.shape[1], media.shape[2]))

    begun = gated_cross_attention.media_begun(locations)
    following = gated_cross_attention.media_begun(locations, following=True)
    found = {
        "output": gated_cross_attention.cross(params, shape, x, memory(begun)),
        "output_attend_previous_false": gated_cross_attention.cross(params, shape, x, memory(following)),
        "attn_output_before_gate": gated_cross_attention.read(params, shape, x, memory(begun)),
        "cached_last_token_output": gated_cross_attention.cross(params, shape, x[:, -1:], memory(begun[:, -1:])),
        "keys": held[0].swapaxes(1, 2),
        "values": held[1].swapaxes(1, 2),
    }
    return {name: found[name] for name in wanted if name in found}


def moondream1_projection(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features = inputs["image_features"]
    widths = config["image_embedding_dim"], config["model_dim"]
    shape = moondream_2024.residual_projection(*widths, features.shape[1], GELU[config["gelu"]])
    params = _connector(directory, shape, moondream_2024.residual_rules())
    return {"connector_output": connectors.connect(params, shape, features)}


def moondream2_may2024_vision(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """Pictures of whole tiles, normalised; their overview is the picture made smaller without smoothing."""
    sizes = ("embed_dim", "num_heads", "ff_dim", "depth", "grid", "patch_size", "model_dim")
    shape = moondream_2024.vision(*(config[name] for name in sizes), GELU[config["gelu"]])
    rules = moondream_2024.vision_rules()
    params = reading.load(weights.read(directory), rules, multimodal.shapes(shape), dtype="float32", where=directory)
    side, run, found = shape.vision.image_size, Execution(), {}
    for name in sorted(inputs):
        picture = inputs[name].transpose(1, 2, 0)
        rows, columns = (length // side for length in picture.shape[:2])
        tiles = picture.reshape(rows, side, columns, side, -1).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
        overview = jax.image.resize(picture, (side, side, 3), "bilinear", antialias=False)
        grid = (rows, columns) if rows * columns > 1 else (0, 0)
        batch = Batch(images=np.concatenate([overview[None], tiles])[None], grids=np.array([[(0, *grid)]]))
        k = name.removeprefix("image_")
        found[f"connector_output_{k}"] = multimodal.encode_media(params, shape, batch, run)[0]
        if grid == (0, 0):
            found[f"image_features_{k}"] = multimodal.vision_features(params, shape, overview[None], run)
    return {**found, "connector_output_batched": np.concatenate([found[f"connector_output_{k}"] for k in range(len(inputs))])}


# Where a text was put to one picture after another, only parts of large outputs were recorded: name -> (the output, what was kept of it
# given the length of the text); and the answer to the last one.
SAMPLES: dict[str, tuple[str, Callable[[Any, int], Any]]] = {
    "crops_uint8_every_7th_pixel": ("crops_uint8", lambda crops, text: crops[:, ::7, ::7]),
    "global_features_first_64": ("global_features", lambda features, text: features[:64]),
    "reconstructed_shape": ("reconstructed", lambda grid, text: np.array(grid.shape)),
    "reconstructed_mean_over_grid": ("reconstructed", lambda grid, text: grid.mean((0, 1))),
    "connector_output_every_9th_token": ("connector_output", lambda tokens, text: tokens[0, ::9]),
    "logits_prompt_positions": ("logits", lambda logits, text: logits[:, -text:]),
    "logits_every_81st_image_position": ("logits", lambda logits, text: logits[:, :-text:81]),
}


def with_samples(found: Arrays, wanted: set[str], inputs: Arrays) -> Arrays:
    """The outputs, and the recorded parts of them that are wanted."""
    made: Arrays = {}
    for name in wanted - set(found):
        kind, _, number = name.rpartition("_")
        if kind in SAMPLES and f"{SAMPLES[kind][0]}_{number}" in found:
            whole, part = SAMPLES[kind]
            made[name] = part(found[f"{whole}_{number}"], inputs["input_ids"].shape[1])
    if made and "generated_ids" in found:
        made["generated_ids"] = found["generated_ids"][-1:]
    return {**found, **made}


def lavis_qformer(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    model = mmjax.load(directory)
    found = dict(model(inputs))
    if "generated_ids" in wanted:  # of the first picture
        shape = model.config.connector
        assert shape is not None
        first, start = found["image_features"][:1], config["bos_token_id"]
        found["generated_ids"] = image_text.write(model.params["connector"], shape, first, 8, start)
    return found


@dataclasses.dataclass(frozen=True)
class Written(Template):
    """A template that writes texts as they were recorded, with <ImageHere> for a picture."""

    def segments(self, messages, generation_prompt=False):
        found = []
        for message in messages:
            for number, text in enumerate(message["content"][0]["text"].split("<ImageHere>")):
                found += [Segment(image={"type": "image"})] * bool(number)
                found += [Segment(text, message["role"] == "assistant")] * bool(text)
        return found


def minigpt4(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """The recorded texts go through the package's encoder; an answer has max_txt_len tokens at most."""
    model = mmjax.load(directory)
    tokenizer = read_tokenizer(directory.parent / config["tokenizer"])
    template = Written("minigpt4", "supervised", (), apart=True)
    encoder = Encoder(tokenizer, template, model.config.tokens_per_tile)

    def sample(turns: list[str]) -> Sample:
        roles = ("user", "assistant") * len(turns)
        return Sample("", [{"role": role, "content": [{"type": "text", "text": t}]} for role, t in zip(roles, turns)])

    def fields(examples: list[Example]) -> Arrays:
        # The reference pads what is asked and what is answered each to its longest.
        first = [int(np.argmax(e.labels != IGNORED)) or len(e.ids) for e in examples]
        length = max(first) + max(len(e.ids) - at for e, at in zip(examples, first))
        filled = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
        rows = {name: np.full((len(examples), length), fill) for name, fill in filled.items()}
        for r, e in enumerate(examples):
            here = r, slice(len(e.ids))
            rows["input_ids"][here] = np.where(e.media >= 0, minigpt4_family.IMAGE, e.ids)
            rows["labels"][here], rows["attention_mask"][here] = e.labels, 1
        return rows

    examples = []
    for turns in _turns(config):
        whole = encoder.encode(sample(turns))
        limit = int(np.argmax(whole.labels != IGNORED)) + config["max_txt_len"]
        examples.append(dataclasses.replace(encoder, max_length=limit).encode(sample(turns)))
    found: Arrays = dict(model({**inputs, **fields(examples)}))
    if "generated_ids" in wanted:
        asked = encoder.encode(sample([config["generate_prompt"]]), generation_prompt=True)
        prompt = {**fields([asked]), "image": inputs["image"][: len(asked.images)]}
        del prompt["labels"]
        found["generate_prompt_embeds"] = model(prompt)["inputs_embeds"]
        found["generated_ids"] = model.generate(prompt, max_new_tokens=16, ignore_eos=True)
    return found


def adapted(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """A model with its adapter, and without."""
    model = mmjax.load(directory)
    found, base = model(inputs), export.without_adapters(model)(inputs)
    return {**found, **{f"base_{name}": value for name, value in base.items()}}


def llama_adapter(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """What was generated goes on from the first row's first six tokens."""
    model = mmjax.load(directory)
    found: Arrays = dict(model(inputs))
    if "generated_ids" in wanted:
        first = {name: value[:1] for name, value in inputs.items() if name in ("tokens", "imgs")}
        first["tokens"] = first["tokens"][:, :6]
        found["generated_ids"] = model.generate(first, max_new_tokens=16, ignore_eos=True)
    return found


def robust_ger(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """What was generated goes on from the first row."""
    model = mmjax.load(directory)
    found: Arrays = dict(model(inputs))
    if "generated_ids" in wanted:
        first = {name: value[:1] for name, value in inputs.items()}
        found["generated_ids"] = model.generate(first, max_new_tokens=16, ignore_eos=True)
    return found


def robust_ger_mine(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    widths = config["input_dim1"], config["input_dim2"], config["n_state"]
    shapes = jax.eval_shape(lambda: mine.init(jax.random.key(0), *widths))
    params = reading.load(weights.read(directory), robust_ger_family.mine_rules(), shapes, dtype="float32", where=directory)
    audio = inputs["audio_features"]
    return {
        "raw": mine.score(params, inputs["emb_diff"], audio, raw=True),
        "raw_negated": mine.score(params, -inputs["emb_diff"], audio, raw=True),
        "mid": mine.score(params, inputs["mid"], audio, raw=False),
    }


def _mixture(config: Arrays, groups: int = 2) -> ModalityMixtureConfig:
    places = ("attention", "mlp") if "block" in config.get("method", "") else ("attention",)
    groups, scale, temperature = config.get("groups", groups), float(config["scale"]), float(config["t"])
    return ModalityMixtureConfig("x", config["hidden_dim"], groups, temperature, scale, 0.0, places=places, parts=("vision",))  # type: ignore[arg-type]


def lavin_adapter(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """The adapter alone. The first position routes a row."""
    adapter, width = _mixture(config), config["in_features"]
    shapes = jax.eval_shape(lambda: {"plugs": modality_mixture.init(jax.random.key(0), adapter, width, 1)})
    rules = lavin.mixture_rules(adapter, "{i}.", "plugs/", {"attention": "x"})
    stored = {f"0.x.{name}": tensor for name, tensor in weights.read(directory).items()}
    found = reading.load(stored, rules, shapes, dtype="float32", where=directory)["plugs"]["attention"]
    leaves = jax.tree.map(lambda leaf: leaf[0], found)
    x, made = inputs["x"], {}
    made["router_weights"] = modality_mixture.weigh(leaves, adapter, x[:, 0])
    made["output"] = modality_mixture.adapt(leaves, adapter, x, made["router_weights"][:, None])
    if "weights" in inputs:
        made["output_fixed_weights"] = modality_mixture.adapt(leaves, adapter, x, inputs["weights"][:, None])
    return made


def lavin_clip_block(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """Blocks of CLIP with adapters, in the authors' order of axes: positions, pictures, channels."""
    stored = weights.read(directory)
    width, layers = config["width"], 1 + max(int(name.split(".")[0]) for name in stored)
    heads = config["heads"]
    block = BlockConfig(width, heads, heads, width // heads, 4 * width, "quick_gelu", "layer", 1e-5, False, True, True, True)
    shape = ModelConfig(vision=ViTConfig(14, 14, layers, block), adapters=(_mixture(config),))
    table = open_flamingo.tower_rules(shape.vision)  # type: ignore[arg-type]
    prefix = "transformer.resblocks."
    rules = [dataclasses.replace(r, name=r.name.removeprefix(prefix)) for r in table if r.name.startswith(prefix)]
    rules += lavin.mixture_rules(shape.adapters[0], "{i}.", "vision/plugs/x/")  # type: ignore[arg-type]
    params = reading.load(stored, rules, multimodal.shapes(shape), dtype="float32", where=directory)["vision"]
    plugs = plugged.plugs(shape, "vision")
    last, _ = vit.run_blocks(params, shape.vision, inputs["x_lnd"].swapaxes(0, 1), None, layers, False, Execution(), (), plugs)
    return {"output_lnd": last.swapaxes(0, 1)}


def _turns(config: Arrays) -> list[list[str]]:
    """What the user and the model say in each row, in turn, as the reference writes it before it tokenises."""
    samples, end, asks = config["samples"], config["end_sym"], config["prompt_template"].format
    if "conv_q" in samples:
        between = samples["connect_sym"][0]
        talks = [(q.split(between), a.split(between)) for q, a in zip(samples["conv_q"], samples["conv_a"])]
        begins = lambda turn: "<s>" if turn else ""  # noqa: E731
        return [[t for i, (q, a) in enumerate(zip(*talk)) for t in (begins(i) + asks(q), a + end)] for talk in talks]
    asked = samples.get("instruction_input") or ["<ImageHere>"] * len(samples["answer"])
    asked = [asks(text) for text in asked] if config["chat_template"] else asked
    return [[question, answer + end] for question, answer in zip(asked, samples["answer"])]


def beside_weights(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """An adapter in peft's layout: the model with it, under it, and with it merged; what is generated goes on from the first row."""
    model = mmjax.load(directory)
    found: Arrays = dict(model(inputs))
    found["base_logits"] = model(inputs, adapters=[])["logits"]
    if "merged_logits" in wanted:
        found["merged_logits"] = model.merge()(inputs)["logits"]
    if "generated_ids" in wanted:
        real = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))[0] != 0
        found["generated_ids"] = model.generate({"input_ids": inputs["input_ids"][:1, real]}, max_new_tokens=16, ignore_eos=True)
    return found


def in_front(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """A prompt or prefix, or prompts in the layers, in peft's layout over its base; what is generated goes on from the first row."""
    model, base = mmjax.load(directory), mmjax.load(directory / config["base_dir"])
    found: Arrays = dict(model(inputs))
    found["base_logits"] = base({name: value for name, value in inputs.items() if name != "task_ids"})["logits"]
    if "generated_ids" in wanted:
        real = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))[0] != 0
        prompt = {"input_ids": inputs["input_ids"][:1, real]}
        prompt |= {"task_ids": inputs["task_ids"][:1]} if "task_ids" in inputs else {}
        found["generated_ids"] = model.generate(prompt, max_new_tokens=16, ignore_eos=True)
    return found


def _connector(directory: Path, config: ConnectorConfig, rules: list[keys.Rule]) -> Arrays:
    shapes = multimodal.shapes(ModelConfig(connector=config))
    return reading.load(weights.read(directory), rules, shapes, dtype="float32", where=directory)["connector"]


PARTS = {
    "anymal_linear": anymal_linear,
    "anymal_perceiver": anymal_perceiver,
    "flamingo_gated_xattn": gated_cross_attention_block,
    "flamingo_perceiver": flamingo_perceiver,
    "lavin_adapter": lavin_adapter,
    "lavin_clip_block": lavin_clip_block,
    "lavis_qformer": lavis_qformer,
    "llama_adapter_v1": llama_adapter,
    "llama_adapter_v2": llama_adapter,
    "minigpt4": minigpt4,
    "moondream1_projection": moondream1_projection,
    "moondream2_may2024_vision": moondream2_may2024_vision,
    "otter_gated_xattn": gated_cross_attention_block,
    "otter_perceiver": flamingo_perceiver,
    "peft_bottleneck_adapter": adapted,
    "robust_ger": robust_ger,
    "robust_ger_mine": robust_ger_mine,
    "vila_projector": vila_projector,
    **dict.fromkeys(("peft_prompt_tuning", "peft_p_tuning", "peft_prefix_tuning", "peft_multitask_prompt_tuning"), in_front),
    "peft_adaption_prompt": in_front,
}
