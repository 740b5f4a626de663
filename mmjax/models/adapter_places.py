"""Where the leaves of an adapter that stands beside weights are: which Linears, norms and tables its targets choose, in which layers.

They stand beside what they change, `PATH/adapters/NAME/...`:

    of a Linear               see mmjax.models.lora and mmjax.models.elementwise; where ranks or alphas differ between its layers, those
                              of one rank and alpha below `rankR_alphaA/`
    kernel, bias, scale, ...  named like a leaf at PATH: a copy of it, which takes its place (norm tuning, LoRA's biases)
    rows                      copies of the rows `token_ids` of the embedding table at PATH

A leaf covers the layers that its targets choose, k rows for k layers, and is stored, trained and counted at that size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Mapping

import jax

from mmjax import tree
from mmjax.models import quantised
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import Adapter, AffineConfig, Ia3Config, LoraConfig, NormConfig

Params = dict[str, Any]
Leaves = dict[str, Any]
Layers = tuple[int, ...] | None  # of a stack; None where there is none
WEIGHTS = "adapter_weights"  # where those of a call stand among the parameters; they are of no part
BESIDE = (LoraConfig, Ia3Config, AffineConfig, NormConfig)  # the kinds whose leaves stand beside weights
EMBED, HEAD = "llm/embed", "llm/head"
OWN = ("lora_a", "lora_b", "lora_bias", "lora_magnitude", "ia3", "ia3_input", "affine_scale", "affine_bias")  # beside a Linear


@dataclasses.dataclass(frozen=True)
class Place:
    """Leaves of an adapter that stand together.

    path         the Linear, norm or table that they change
    at           the path below which they stand
    layers       the layers that they cover
    rank, alpha  of LoRA's two matrices; 0 where there are none
    copies       names of leaves at `path` of which they are copies
    rows         rows of the table of which they are copies
    """

    path: str
    at: str
    layers: Layers = None
    rank: int = 0
    alpha: float = 0.0
    copies: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


def places(params: Params, config: ModelConfig, adapter: Adapter, strict: bool = True) -> list[Place]:
    """Where an adapter's leaves stand. `params` may be shapes, or, if not `strict`, those of some parts of the model.

    Raises ValueError, if `strict`, for a target that chooses nothing.
    """
    if not isinstance(adapter, BESIDE):
        return []
    flat, found = under(params, config), []
    what = f"adapter {adapter.name!r}: target"
    if isinstance(adapter, NormConfig):
        norms = {path.removesuffix("/scale"): leaf.shape for path, leaf in flat.items() if path.endswith("/scale")}
        for path, layers in _chosen(norms, adapter.targets, what, "norm", strict).items():
            names = tuple(name for name in ("scale", "bias") if f"{path}/{name}" in flat)
            found.append(Place(path, f"{path}/adapters/{adapter.name}", layers, copies=names))
    else:
        linears = _linears(flat, isinstance(adapter, LoraConfig))
        chosen = _chosen(linears, adapter.targets, what, "linear layer", strict)
        for path, layers in chosen.items():
            found += _of_linear(path, layers, linears[path][0], adapter)
            if isinstance(adapter, LoraConfig) and adapter.bias == "lora_only" and f"{path}/bias" in flat:
                found.append(Place(path, f"{path}/adapters/{adapter.name}", layers, copies=("bias",)))
    return found + list(_copied(flat, adapter, strict))


def names(place: Place, flat: Mapping[str, Any]) -> list[str]:
    """The names of a place's leaves, of which `flat` has the paths."""
    return list(originals(place)) if place.copies else [name for name in OWN if f"{place.at}/{name}" in flat]


def has_port(path: str) -> bool:
    """Whether the Linear at a path is run with its adapters: those of blocks, plugs and connectors, the head, and the table of tokens."""
    return tree.is_stacked(path) or path.startswith("connector/") or path in (EMBED, HEAD)


def under(params: Params, config: ModelConfig) -> Leaves:
    """The leaves that adapters may change: all but those of adapters, and the kernel of a tied head as if it were a leaf."""
    own = tuple(f"/{port}/{adapter.name}/" for adapter in config.adapters for port in ("plugs", "prompts"))
    flat = tree.flatten({part: leaves for part, leaves in params.items() if part != WEIGHTS})
    flat = {path: leaf for path, leaf in flat.items() if "/adapters/" not in path and not any(name in path for name in own)}
    return with_tied_head(tree.flatten(quantised.dense_shapes(tree.unflatten(flat))), config)


def with_tied_head(flat: Leaves, config: ModelConfig) -> Leaves:
    table = flat.get(f"{EMBED}/embedding")
    if table is None or config.llm is None or not (config.llm.has_head and config.llm.tied_head):
        return flat
    turned = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype) if isinstance(table, jax.ShapeDtypeStruct) else table.T
    return {**flat, f"{HEAD}/kernel": turned}


def _linears(flat: Leaves, tables: bool) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the kernels that have a port: not those of convolutions, experts and routers; the `tables` of tokens among them."""
    found = {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in flat.items()
        if path.endswith("/kernel") and len(leaf.shape) == 2 + tree.is_stacked(path) and "/router" not in path
    }
    if tables and f"{EMBED}/embedding" in flat:
        found[EMBED] = flat[f"{EMBED}/embedding"].shape
    return found


def _chosen(
    found: Mapping[str, tuple[int, ...]], globs: tuple[str, ...], what: str, kind: str, strict: bool
) -> dict[str, Layers]:
    """Path -> layers of what the globs name. `**` does not reach what stands alone, outside of stacks and connectors: heads, tables."""
    chosen: dict[str, set[int] | None] = {}
    for glob in globs:
        matching = [path for path in found if tree.matches(path, glob)]
        matching = [path for path in matching if "**" not in glob or kind == "norm" or (has_port(path) and path not in (EMBED, HEAD))]
        if not matching and strict:
            raise ValueError(f"{what} {glob!r} matches no {kind}; there are {', '.join(found)}")
        for path in matching:
            if not tree.is_stacked(path):
                chosen[path] = None
                continue
            start, stop = tree.layer_range(glob) or (None, None)
            some = range(found[path][0])[start:stop]
            if not some and strict:
                raise ValueError(f"{what} {glob!r} chooses no layers: {path} has layers 0 to {found[path][0] - 1}")
            chosen[path] = {*(chosen.get(path) or ()), *some}
    return {path: None if (layers := chosen[path]) is None else tuple(sorted(layers)) for path in found if path in chosen}


def _of_linear(path: str, layers: Layers, depth: int, adapter: Adapter) -> Iterator[Place]:
    """The places of its matrices or factors: one for each rank and alpha."""
    at = f"{path}/adapters/{adapter.name}"
    if not isinstance(adapter, LoraConfig):
        yield Place(path, at, layers)
        return

    def named(pattern: tuple[tuple[str, Any], ...], layer: int, default: Any) -> Any:
        for glob, value in pattern:
            start, stop = tree.layer_range(glob) or (None, None)
            if tree.matches(path, glob) and (layers is None or layer in range(depth)[start:stop]):
                return value
        return default

    groups: dict[tuple[int, float], list[int]] = {}
    for layer in (0,) if layers is None else layers:
        kind = named(adapter.rank_pattern, layer, adapter.rank), named(adapter.alpha_pattern, layer, adapter.alpha)
        groups.setdefault(kind, []).append(layer)
    for (rank, alpha), some in groups.items():
        own = at if len(groups) == 1 else f"{at}/rank{rank}_alpha{alpha:g}"
        yield Place(path, own, None if layers is None else tuple(some), rank, alpha)


def _copied(flat: Leaves, adapter: Adapter, strict: bool) -> Iterator[Place]:
    """The places of copies that do not depend on the targets."""
    whole: dict[str, None] = {}
    for glob in getattr(adapter, "whole", ()):
        paths = [path for path in flat if tree.matches(path, glob)]
        if not paths and strict:
            raise ValueError(f"adapter {adapter.name!r}: whole {glob!r} matches no leaf")
        whole.update(dict.fromkeys(paths))
    if isinstance(adapter, LoraConfig) and adapter.bias == "all":
        whole.update(dict.fromkeys(path for path in flat if path.endswith("/bias")))
    if isinstance(adapter, LoraConfig) and adapter.token_ids and f"{EMBED}/embedding" in flat:
        yield Place(EMBED, f"{EMBED}/adapters/{adapter.name}", copies=("embedding",), rows=adapter.token_ids)
    for path in whole:
        site, name = path.rsplit("/", 1)
        layers = tuple(range(flat[path].shape[0])) if tree.is_stacked(path) else None
        yield Place(site, f"{site}/adapters/{adapter.name}", layers, copies=(name,))


def originals(place: Place) -> dict[str, str]:
    """Name of a copy -> the leaf that it copies."""
    return {"rows" if place.rows else name: f"{place.path}/{name}" for name in place.copies}


def weight_at(path: str) -> str:
    """The kernel of the Linear, or the table, at a path."""
    return f"{path}/embedding" if path == EMBED else f"{path}/kernel"


def cut(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Of a leaf that covers some of the layers, or of the rows."""
    some = place.rows or place.layers
    return tuple(shape) if some is None else (len(some), *shape[1:])
