"""Adapters beside weights: how they begin, how layers get to read them, how they are merged. Where they stand is said in
mmjax.models.adapter_places.

`bound` makes of the parameters what layers read: rows for all layers, those without the adapter getting what changes nothing; replaced
leaves in their places; and the weights of the call. These stand at `adapter_weights/NAME` among the parameters, one number or one for
each row of the batch; an adapter without one counts in full, and one that is not in config.adapters not at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.errors import UserError
from mmjax.models import elementwise, linear_port, lora, plugged, prefix, prompts, quantised
from mmjax.models.adapter_places import (
    BESIDE,
    EMBED,
    HEAD,
    OWN,
    WEIGHTS,
    Place,
    cut,
    has_port,
    originals,
    places,
    weight_at,
    with_tied_head,
)
from mmjax.models.config import ModelConfig
from mmjax.models.kernels import stored
from mmjax.models.tuning_config import Adapter, AffineConfig, Ia3Config, LoraConfig, PrefixConfig
from mmjax.parallel import placement

Params = dict[str, Any]
Leaves = dict[str, Any]
DROPPED = ("llm/layers/", "llm/encoder/layers/")  # what is run with the dropout of adapters
_NOTHING = {"ia3": 1.0, "ia3_input": 1.0, "affine_scale": 1.0}  # what changes nothing, where that is not 0


def add(key: jax.Array, params: Params, config: ModelConfig) -> Params:
    """The parameters with fresh float32 leaves for each of config.adapters that has none yet, at their published init: the adapted model
    equals the base."""
    return settle(draw(key, params, config), params, config)


def draw(key: jax.Array, params: Params, config: ModelConfig) -> Params:
    """What `add` makes of shapes alone: leaves that follow from weights are still empty, for `settle` to fill.

    Raises ValueError for targets that choose nothing, and for dropout where there is none.
    """
    flat = with_tied_head(tree.flatten(quantised.dense_shapes(params)), config)
    fresh: Leaves = {}
    for number, adapter in enumerate(config.adapters):
        if isinstance(adapter, PrefixConfig | prompts.Prompt):
            key, own = jax.random.split(key)
            made = _in_front(own, adapter, config)
            fresh |= {} if made.keys() <= flat.keys() else made
        if (plugs := plugged.init(jax.random.fold_in(key, number), adapter, config)) is not None:
            fresh |= {path: leaf for path, leaf in tree.flatten(plugs).items() if path not in flat}
        for place in places(params, config, adapter):
            leaves = {name: jnp.zeros(cut(flat[of].shape, place)) for name, of in originals(place).items()}
            shape = () if leaves else cut(flat[weight_at(place.path)].shape, place)
            if place.rank and f"{place.at}/lora_a" not in flat:
                key, own = jax.random.split(key)
                assert isinstance(adapter, LoraConfig)
                if adapter.dropout and not place.path.startswith(DROPPED):
                    raise ValueError(
                        f"adapter {adapter.name!r} has dropout, which acts in the blocks of the language model alone, not at {place.path}: "
                        "give that an adapter of its own, without"
                    )
                leaves = lora.draw(own, adapter, shape, place.rank, table=place.path == EMBED)
            elif isinstance(adapter, Ia3Config | AffineConfig) and not leaves:
                leaves = elementwise.draw(adapter, place.path, shape)
            fresh |= {f"{place.at}/{name}": leaf for name, leaf in leaves.items() if f"{place.at}/{name}" not in flat}
    return tree.merge(params, tree.unflatten(fresh))


def _in_front(key: jax.Array, adapter: prompts.Prompt | PrefixConfig, config: ModelConfig) -> Leaves:
    """Fresh leaves, by path, of what stands in front of the text."""
    prompts.require_writer(config)
    if isinstance(adapter, PrefixConfig):
        return prefix.init(key, adapter, config.language)
    return tree.flatten(prompts.init(key, adapter, config.language.input_width), prompts.path(adapter.name) + "/")


def settle(params: Params, before: Params, config: ModelConfig) -> Params:
    """`draw`'s parameters with the leaves that follow from weights: copies, and DoRA's magnitudes. Leaves that were there `before` stay
    as they are."""
    flat, old = with_tied_head(tree.flatten(params), config), tree.flatten(before)
    flat |= {path: quantised.node(params, path) for path in quantised.kernels(params)}
    made: Leaves = {}
    for adapter in config.adapters:
        for place in places(params, config, adapter):
            follow: Leaves = {name: _copy(flat[of], place) for name, of in originals(place).items()}
            if isinstance(adapter, LoraConfig) and adapter.dora and place.rank:
                leaves = {name: flat[f"{place.at}/{name}"] for name in ("lora_a", "lora_b")}
                leaves["factor"] = jnp.full(leaves["lora_a"].shape[:-2], adapter.scale_of(place.rank, place.alpha))
                follow = {"lora_magnitude": lora.magnitudes(_copy(flat[weight_at(place.path)], place), leaves, adapter)}
            made |= {f"{place.at}/{name}": leaf for name, leaf in follow.items() if f"{place.at}/{name}" not in old}
    return tree.merge(params, tree.unflatten(made))


def bound(params: Params, config: ModelConfig, part: str, rows: int | None = None) -> Params:
    """params[part] as its layers read it (see above), for a batch of so many rows; None where the part reads no rows of text.

    A Linear that is run without its adapters (has_port) gets them merged into its kernel, for this step.
    """
    if part not in params:
        return {}
    flat = tree.flatten({part: params[part]})
    if not any("/adapters/" in path for path in flat):
        return params[part]
    bare, found = _bind(flat, config, params.get(WEIGHTS, {}), rows)
    for path, present in found.items():
        if has_port(path):
            bare |= {f"{path}/adapters/{adapter.name}/{name}": leaf for adapter, leaves in present for name, leaf in leaves.items()}
        else:
            _merge_into(bare, path, present, jnp.float32)
    return tree.unflatten(bare)[part]


def merge(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The parameters with every adapter that stands beside weights merged into them (in float32, stored in the dtype they had), and
    their shapes; the others stay. An adapter counts by its weight, if it has one. A tied head of which only one side is changed gets a
    kernel of its own; a Linear may get a bias."""
    if not config.adapters:
        return params, config
    bare, found, config = _to_merge(params, config)
    for path, present in found.items():
        _merge_into(bare, path, present)
    return tree.unflatten(bare), config


def merge_by_layer(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig, Callable[[str, int | None, Any], Any]]:
    """The same for who writes layer after layer: the parameters with copies in their places alone, the shapes, and what makes of
    (path, layer or None, that layer of the leaf) what is to be written, in the same dtype."""
    bare, found, config = _to_merge(params, config)

    def row(leaf: Any, i: int | None) -> np.ndarray:
        return np.asarray(placement.row(leaf, i), np.float32)

    def change(path: str, i: int | None, leaf: Any) -> Any:
        site, _, name = path.rpartition("/")
        if site not in found or path not in (weight_at(site), f"{site}/bias"):
            return leaf
        if name == "bias":
            kernel: Any = row(bare[weight_at(site)], i) if any("lora_bias" in leaves for _, leaves in found[site]) else 0.0
            wide: tuple[Any, Any] = np.broadcast_to(kernel, bare[weight_at(site)].shape[-2:]), np.asarray(leaf, np.float32)
        else:
            wide = np.asarray(leaf, np.float32), None
        present = [(adapter, {key: row(value, i) for key, value in leaves.items()}) for adapter, leaves in found[site]]
        return np.asarray(linear_port.merged(*wide, present)[name == "bias"]).astype(leaf.dtype)

    return tree.unflatten(bare), config, change


def _to_merge(params: Params, config: ModelConfig) -> tuple[Leaves, dict[str, list[tuple[Adapter, Leaves]]], ModelConfig]:
    """The leaves with copies in their places, what changes Linears and tables (see _bind), and the shapes of the whole when merged."""
    flat = {path: leaf for path, leaf in tree.flatten(params).items() if not path.startswith(f"{WEIGHTS}/")}
    bare, found = _bind(flat, config, params.get(WEIGHTS, {}), None)
    for path in found:
        if f"{path}/kernel/codes" in flat:
            raise UserError(quantised.UNMERGED.format(names=", ".join(repr(adapter.name) for adapter, _ in found[path]), linear=path))
    for path, leaf in bare.items():
        if path in flat and leaf is not flat[path]:
            bare[path] = leaf.astype(stored(flat[path]).dtype)
    left = tuple(adapter for adapter in config.adapters if not isinstance(adapter, BESIDE))
    config = dataclasses.replace(config, adapters=left)
    if config.llm is not None and config.llm.has_head and config.llm.tied_head:
        if found.keys() & {EMBED, HEAD}:
            bare.setdefault(f"{HEAD}/kernel", bare[f"{EMBED}/embedding"].T)
        if f"{HEAD}/kernel" in bare:
            config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, tied_head=False))
            if f"{EMBED}/new_rows" in bare:
                bare.setdefault(f"{HEAD}/new_rows", bare[f"{EMBED}/new_rows"])
    for path, present in found.items():
        if f"{path}/bias" not in bare and any(leaves.keys() & {"lora_bias", "affine_bias"} for _, leaves in present):
            shape = bare[weight_at(path)].shape
            bare[f"{path}/bias"] = jnp.zeros((*shape[:-2], shape[-1]))
    return bare, found, config


def leaves_of(params: Params, names: Sequence[str]) -> Params:
    """The leaves of the adapters of these names, wherever they stand."""
    places = tuple(f"/{port}/{name}/" for name in names for port in ("adapters", "plugs", "prompts"))
    starts = tuple(f"mine/{name}/" for name in names)
    flat = tree.flatten(params)
    return tree.unflatten({p: leaf for p, leaf in flat.items() if p.startswith(starts) or any(place in p for place in places)})


def _copy(leaf: Any, place: Place) -> Any:
    some = place.rows or place.layers
    if isinstance(leaf, Mapping):  # quantised: its numbers are made layer by layer
        return leaf if some is None else jax.tree.map(lambda part: part[np.array(some)], leaf)
    leaf = leaf if some is None or some == tuple(range(len(leaf))) else leaf[np.array(some)]
    return stored(leaf).astype(jnp.float32)


def _bind(
    leaves: Leaves, config: ModelConfig, weights: Mapping[str, Any], rows: int | None
) -> tuple[Leaves, dict[str, list[tuple[Adapter, Leaves]]]]:
    """The leaves under the adapters, with copies in their places; and path of a Linear or table -> the adapters that change it, in their
    order, with their leaves: rows for all layers, with what tells the layers and the rows of the batch apart."""
    bare = {path: leaf for path, leaf in leaves.items() if "/adapters/" not in path}
    nested, flat = tree.unflatten(leaves), with_tied_head(leaves, config)
    shapes = with_tied_head(tree.flatten(quantised.dense_shapes(nested)), config)
    found: dict[str, list[tuple[Adapter, Leaves]]] = {}
    instead: dict[str, list[tuple[jax.Array, Any]]] = {}
    for adapter in config.adapters:

        def weight(adapter: Adapter = adapter) -> jax.Array | None:
            return _weight(weights.get(adapter.name), adapter, rows)

        groups: dict[str, list[tuple[Place, Leaves]]] = {}
        for place in places(nested, config, adapter, strict=False):
            for name, of in originals(place).items():
                if (path := f"{place.at}/{name}") in flat:
                    instead.setdefault(of, []).append((_laid_over(flat[of], flat[path], place), weight()))
                    if of == f"{EMBED}/embedding" and not place.rows and f"{HEAD}/kernel" in flat:
                        bare[f"{HEAD}/kernel"] = flat[f"{HEAD}/kernel"]  # a tied head stays with the table under the copy
            own = {} if place.copies else {name: flat[path] for name in OWN if (path := f"{place.at}/{name}") in flat}
            if own:
                groups.setdefault(place.path, []).append((place, own))
        for path, group in groups.items():
            depth = shapes[weight_at(path)].shape[0] if tree.is_stacked(path) else None
            found.setdefault(path, []).append((adapter, _for_all_layers(depth, adapter, group, weight())))
    for path, news in instead.items():
        bare[path] = _replaced(flat[path], news, path)
    return bare, found


def _weight(weight: Any, adapter: Adapter, rows: int | None) -> jax.Array | None:
    """Of an adapter in this call: (), or [rows]; None where it counts in full."""
    if weight is None or jnp.ndim(weight) == 0:
        return weight
    if rows is None:
        raise UserError(
            f"adapter {adapter.name!r} changes more than the language model, whose rows alone can have weights of their own: give it one "
            "weight for all rows"
        )
    if rows % len(weight):
        raise UserError(f"adapter {adapter.name!r} has weights for {len(weight)} rows; the batch has {rows}")
    return jnp.repeat(weight, rows // len(weight))  # copies of a row (beams) stand one after another


def _laid_over(original: jax.Array, copy: jax.Array, place: Place) -> jax.Array:
    """The copy of some layers or rows, with the others as they are."""
    some = place.rows or place.layers
    if some is None or some == tuple(range(len(original))):
        return copy
    wide = jnp.asarray(stored(original))
    return wide.astype(jnp.promote_types(wide.dtype, copy.dtype) if place.layers else wide.dtype).at[np.array(some)].set(copy)


def _replaced(original: jax.Array, news: list[tuple[jax.Array, Any]], path: str) -> jax.Array:
    """A leaf with what takes its place: the copies of several adapters, or weighed ones, add their differences from it."""
    if len(news) == 1 and news[0][1] is None:
        return news[0][0]
    under = stored(original).astype(jnp.float32)
    layer_rank = under.ndim - tree.is_stacked(path)
    total: Any = under
    for new, weight in news:
        change = new.astype(jnp.float32) - under
        if weight is not None and weight.ndim:
            if layer_rank != 1:
                raise UserError(f"{path} is trained whole by an adapter, which so has one weight for all rows of a batch")
            total, change = (x if x.ndim > under.ndim else x[..., None, :] for x in (total, change))
            change = change * weight[:, None]
        elif weight is not None:
            change = change * weight
        if total.ndim > change.ndim:
            change = change[..., None, :]
        total = total + change
    return total


def _for_all_layers(depth: int | None, adapter: Adapter, group: list[tuple[Place, Leaves]], weight: Any) -> Leaves:
    """The leaves of one Linear's adapter with a row for each of its `depth` layers, beside a `factor` (LoRA's scale, where it is not
    the adapter's own) and a `weight` where there is one for the call, or layers that the others must tell from those without."""
    some = [place.layers or () for place, _ in group]
    everywhere = depth is None or some == [tuple(range(depth))]
    made: Leaves = dict(group[0][1])
    if not everywhere:
        for name, leaf in group[0][1].items():
            shapes = [leaves[name].shape[1:] for _, leaves in group]
            whole = jnp.full((depth, *(max(sizes) for sizes in zip(*shapes))), _NOTHING.get(name, 0.0), leaf.dtype)
            for layers, (_, leaves) in zip(some, group):
                at = (np.array(layers), *(slice(size) for size in leaves[name].shape[1:]))
                whole = whole.at[at].set(leaves[name])
            made[name] = whole
    if isinstance(adapter, LoraConfig):
        scales = [adapter.scale_of(place.rank, place.alpha) for place, _ in group]
        if scales != [adapter.scale]:
            made["factor"] = jnp.float32(scales[0]) if depth is None else _spread(depth, some, scales)
        if adapter.dora and not everywhere:
            assert depth is not None
            present = _spread(depth, some, [1.0] * len(some))
            weight = present if weight is None else present * weight if weight.ndim == 0 else present[:, None] * weight
            return {**made, "weight": weight}
    if weight is not None:
        made["weight"] = weight if depth is None else jnp.broadcast_to(weight, (depth, *weight.shape))
    return made


def _spread(depth: int, layers: list[tuple[int, ...]], values: list[float]) -> jax.Array:
    whole = np.zeros(depth, np.float32)
    for some, value in zip(layers, values):
        whole[list(some)] = value
    return jnp.asarray(whole)


def _merge_into(bare: Leaves, path: str, found: list[tuple[Adapter, Leaves]], dtype: Any = None) -> None:
    """Puts the changes of a Linear or table into its leaves, layer by layer; they stay in the dtype that they have, or get this one."""
    adapters = [adapter for adapter, _ in found]

    def one(inputs: tuple[jax.Array, jax.Array | None, list[Leaves]]) -> tuple[jax.Array, jax.Array | None]:
        kernel, bias, leaves = inputs
        made, more = linear_port.merged(
            stored(kernel).astype(jnp.float32), None if bias is None else bias.astype(jnp.float32), list(zip(adapters, leaves))
        )
        made = made.astype(dtype or stored(kernel).dtype)
        return made, more if more is None else more.astype(dtype or (jnp.float32 if bias is None else bias.dtype))

    inputs = bare[weight_at(path)], bare.get(f"{path}/bias"), [leaves for _, leaves in found]
    made, more = jax.lax.map(one, inputs) if tree.is_stacked(path) else one(inputs)
    bare[weight_at(path)] = made
    if more is not None:
        bare[f"{path}/bias"] = more
