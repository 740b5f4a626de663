"""Which leaves a stage trains, and the split of the parameters into a trainable and a frozen tree.

Gradients, norms, clipping and optimizer state exist for the trainable tree only, so nothing can read a frozen gradient
by accident (reading one costs its computation and a copy of the frozen weights).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.errors import UserError
from mmjax.models import quantised
from mmjax.tree import Params


@dataclasses.dataclass(frozen=True)
class Selection:
    """The trainable leaves: path -> None for a whole leaf, (start, stop) for layers of a stacked one."""

    leaves: Mapping[str, tuple[int, int] | None]

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        return {path: layers for path, layers in self.leaves.items() if layers is not None}

    def count(self, params: Params) -> int:
        """Number of trainable parameters; `params` may be shapes."""
        total = 0
        for path, leaf in tree.flatten(params).items():
            if path in self.leaves:
                layers = self.leaves[path]
                size = _size(leaf.shape)
                total += size if layers is None else size // leaf.shape[0] * (layers[1] - layers[0])
        return total


def select(params: Params, globs: Sequence[str], key: str) -> Selection:
    """The leaves that `globs` name. `params` may be shapes; `key` is the recipe's key, for the message.

    Raises UserError for a glob that matches nothing or a quantised kernel, and for layer ranges that are empty or leave a gap."""
    flat = tree.flatten(params)
    chosen: dict[str, tuple[int, int] | None] = {}
    for glob in globs:
        paths = [path for path in flat if tree.matches(path, glob)]
        require_match(paths, glob, flat, key)
        if held := [path for path in paths if quantised.is_part(path)]:
            raise UserError(
                f"{key}: {glob!r} would train {quantised.kernel_of(held[0])}, which is quantised and therefore frozen. Train adapters "
                "(a glob such as 'llm/**/lora_*'), or leave that kernel dense (model.quantise.targets)."
            )
        for path in paths:
            layers = _layers(glob, path, flat[path].shape, key)
            chosen[path] = _union(chosen[path], layers, path, key) if path in chosen else layers
    if not chosen:
        raise UserError(f"{key} is empty: a stage must train something.")
    return Selection({path: chosen[path] for path in flat if path in chosen})


def require_match(found: Sequence[str], glob: str, paths: Iterable[str], key: str) -> None:
    """Raises UserError, naming the key and the nearest paths, where a glob found nothing."""
    if found:
        return
    candidates: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        candidates.update(dict.fromkeys("/".join(parts[:i]) + "/**" for i in range(1, len(parts))))
        candidates[path] = None
    near = difflib.get_close_matches(glob, list(candidates), n=4, cutoff=0.3) or list(candidates)[:4]
    raise UserError(f"{key}: {glob!r} matches no parameter. Near it there are: {', '.join(near)}")


def split(params: Params, selection: Selection, dtype: str) -> tuple[Params, Params]:
    """(trainable, frozen): trainable leaves in `dtype`, a layer range as a leaf of its own; frozen leaves as they are.

    A leaf that is trained in part stays whole in the frozen tree. Leaves that need no cast are not copied: once the
    trainable tree is donated to a step, `params` must not be used again."""
    trainable, frozen = {}, {}
    for path, leaf in tree.flatten(params).items():
        layers = selection.leaves.get(path)
        if path not in selection.leaves or layers is not None:
            frozen[path] = leaf
        if path in selection.leaves:
            part = leaf if layers is None else leaf[layers[0] : layers[1]]
            trainable[path] = part.astype(dtype)
    return tree.unflatten(trainable), tree.unflatten(frozen)


def shapes(params: Params, selection: Selection, dtype: str) -> Params:
    """What `split` would make the trainable tree, from shapes alone."""
    return jax.eval_shape(lambda params: split(params, selection, dtype)[0], params)


def join(trainable: Params, frozen: Params, selection: Selection) -> Params:
    """The model's parameters. Trained layers are laid over their stack (which copies it, in the wider dtype)."""
    flat = tree.flatten(frozen)
    for path, leaf in tree.flatten(trainable).items():
        layers = selection.leaves[path]
        if layers is not None:
            stack = flat[path].astype(jnp.promote_types(flat[path].dtype, leaf.dtype))
            leaf = jax.lax.dynamic_update_slice_in_dim(stack, leaf.astype(stack.dtype), layers[0], axis=0)
        flat[path] = leaf
    return tree.unflatten(flat)


def layer_rank(path: str, leaf: Any) -> int:
    """The rank of one layer's leaf: a stacked norm [layers, d] is a vector."""
    return len(leaf.shape) - tree.is_stacked(path)


def _layers(glob: str, path: str, shape: tuple[int, ...], key: str) -> tuple[int, int] | None:
    chosen = tree.layer_range(glob)
    if chosen is None:
        return None
    if not tree.is_stacked(path):
        raise UserError(f"{key}: {glob!r} chooses layers of {path}, which is not stacked.")
    start, stop, _ = slice(*chosen).indices(shape[0])
    beyond = any(bound is not None and abs(bound) > shape[0] for bound in chosen)
    if start >= stop or beyond:
        raise UserError(f"{key}: {glob!r} chooses no layers: {path} has layers 0 to {shape[0] - 1}.")
    return None if (start, stop) == (0, shape[0]) else (start, stop)


def _union(
    first: tuple[int, int] | None, second: tuple[int, int] | None, path: str, key: str
) -> tuple[int, int] | None:
    if first is None or second is None:
        return None
    if max(first[0], second[0]) > min(first[1], second[1]):
        raise UserError(f"{key}: layers {first} and {second} of {path} leave a gap; name one run of layers.")
    return (min(first[0], second[0]), max(first[1], second[1]))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size
