"""EVA-CLIP's ViT (arXiv 2211.07636) as LAVIS and MiniGPT-4 name it: `visual_encoder`, with the norm behind it at `ln_vision`.

Keys have no bias, and that norm has an epsilon of its own.
"""

from __future__ import annotations

from mmjax.errors import UserError
from mmjax.families.family import Config
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, linear, norm, patches, rule, transposed
from mmjax.families.towers import norm_rules
from mmjax.models.block_config import BlockConfig
from mmjax.models.encoder_config import ViTConfig


def read(fields: Fields) -> ViTConfig:
    """A vision_config with the names of LAVIS's arguments; what is absent is ViT-g's."""
    width, heads = fields.get("embed_dim", 1408), fields.get("num_heads", 16)
    if width % heads:
        raise UserError(f"{fields.where}: embed_dim = {width} is not a multiple of num_heads = {heads}")
    return ViTConfig(
        image_size=fields.square("img_size", 224),
        patch_size=fields.square("patch_size", 14),
        layers=fields.get("depth", 39),
        block=BlockConfig(
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            mlp_width=int(width * fields.get("mlp_ratio", 4.3637)),
            activation="gelu",
            norm="layer",
            norm_eps=fields.get("block_norm_eps", 1e-6),
            gated_mlp=False,
            qkv_bias=fields.get("qkv_bias", True),
            output_bias=True,
            mlp_bias=True,
            key_bias=False,
        ),
        class_token=True,
        post_norm="states",
        post_norm_eps=fields.get("ln_vision_eps", 1e-5),
    )


def write(encoder: ViTConfig, base: Config) -> Config:
    """The vision_config of `read`."""
    block = encoder.block
    ratio = base.get("mlp_ratio", 4.3637)
    return {
        **base,
        "img_size": encoder.native_size or encoder.image_size,
        "patch_size": encoder.patch_size,
        "depth": encoder.layers,
        "embed_dim": block.width,
        "num_heads": block.heads,
        "mlp_ratio": ratio if int(block.width * ratio) == block.mlp_width else block.mlp_width / block.width,
        "qkv_bias": block.qkv_bias,
        "block_norm_eps": block.norm_eps,
        "ln_vision_eps": encoder.post_norm_eps or block.norm_eps,
    }


def rules(encoder: ViTConfig) -> list[Rule]:
    """The tower's tensors and those of the norm behind it."""
    theirs, ours = "visual_encoder.blocks.{i}.", "vision/layers/"
    query_key_value = [f"{ours}attention/{name}/kernel" for name in ("query", "key", "value")]
    table = [
        rule("visual_encoder.cls_token", "vision/class_embedding", form=leading(2)),
        rule("visual_encoder.pos_embed", "vision/positions", form=leading(1)),
        rule("visual_encoder.patch_embed.proj.weight", "vision/patch/kernel", form=patches(encoder.channels)),
        rule("visual_encoder.patch_embed.proj.bias", "vision/patch/bias"),
        *norm_rules(theirs, ours, ("norm1", "norm2")),
        rule(theirs + "attn.qkv.weight", *query_key_value, form=transposed),
        *linear(theirs + "attn.proj", ours + "attention/output"),
        *linear(theirs + "mlp.fc1", ours + "mlp/up"),
        *linear(theirs + "mlp.fc2", ours + "mlp/down"),
        *norm("ln_vision", "vision/post_norm"),
    ]
    if encoder.block.qkv_bias:
        table.append(rule(theirs + "attn.q_bias", f"{ours}attention/query/bias"))
        table.append(rule(theirs + "attn.v_bias", f"{ours}attention/value/bias"))
    return table
