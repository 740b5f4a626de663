"""LaVIN's mixture-of-modality adapters (arXiv 2305.15023) on the block port: what attention reads, behind its norm, passes an adapter whose
two branches are weighed by the modality.

    x + scale * (w[0] * up_first(a) + w[1] * up_second(a)),    a = dropout(down(x)),    w = softmax(router(state) / temperature)

Nothing in it is nonlinear. The branches are Linears in `groups`: each share of the channels reads its own share of `a`. They begin at 0, so
that a fresh one is the identity.

Of a language model the router reads the state of a *modality token*, one of two learned vectors (a text alone; a text with pictures), which
the authors put in front of every text and let nobody else see. It sees itself alone, so its way through the layers depends on nothing but
the modality: here it is not in the text at all, but is run by itself, once for each modality (`route`), and every layer's router is handed
what came of it. Packed samples, caches and lengths know nothing of it. With rotary embedding the text's logits are the same; learned
positions count from 0 where the authors' would count from 1.

Of a vision transformer (`visual_router`) the router reads

    "released"         at each position the state at that position of the batch's first picture (of a group's: a data shard's). So the
                       authors' code does, whose pictures are the second axis where the adapter takes them for the first: what a
                       picture becomes depends on the batch it is in
    "per_sample_cls"   the picture's own class token

Leaves, one row for each layer: `PLACE/{down,first,second,router}` and `..._bias`; the tokens at llm/prompts/NAME/modality [2, width].
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.config import ModelConfig
from mmjax.models.kernels import dropped, matmul
from mmjax.models.tuning_config import ModalityMixtureConfig

Params = dict[str, Any]
EXPERTS = ("first", "second")
MODALITIES = 2  # a text alone, a text with pictures
Router = Callable[[Mapping[str, jax.Array], Mapping[str, Any], str, jax.Array], jax.Array]
"""(the leaves of a place, those of all places, the place, what is adapted) -> weights float32 [..., 2]."""


class Routed(NamedTuple):
    """`modality` int [rows, T], 1 where a sample has pictures; the routers' `weights` by place, float32 [layers that have the adapter, modality,
    2]; what the tokens became, `last` [modality, 1, width]."""

    modality: jax.Array
    weights: dict[str, jax.Array]
    last: jax.Array

    def at_end(self) -> Routed:
        """The same for what follows the text."""
        return self._replace(modality=self.modality[:, -1:])

    def repeated(self, times: int) -> Routed:
        """Every row so many times, one after another."""
        return self._replace(modality=jnp.repeat(self.modality, times, 0))


def of(config: ModelConfig) -> ModalityMixtureConfig | None:
    """The mixture in the language model, if there is one."""
    return next((a for a in config.adapters if isinstance(a, ModalityMixtureConfig) and "llm" in a.parts), None)


def notices(config: ModelConfig) -> list[str]:
    """What one must know before training."""
    return [
        f"adapter {a.name!r}: visual_router='released' routes every picture of a batch by the batch's first one, as the authors' code does: "
        "losses and answers depend on how pictures are batched. 'per_sample_cls' does not"
        for a in config.adapters
        if isinstance(a, ModalityMixtureConfig) and "vision" in a.parts and a.visual_router == "released"
    ]


def path(name: str) -> str:
    """Where the modality tokens stand."""
    return f"llm/prompts/{name}"


def init(key: jax.Array, adapter: ModalityMixtureConfig, width: int, layers: int) -> Params:
    """Fresh float32 leaves for so many layers of blocks `width` wide: `down` Xavier-uniform, the router as torch starts a Linear, the rest 0."""
    hidden, params = adapter.width, {}
    if hidden % adapter.groups or width % adapter.groups:
        raise ValueError(f"adapter {adapter.name!r}: {adapter.groups} groups do not divide {hidden} and {width} channels")
    for place, draw in zip(adapter.places, jax.random.split(key, len(adapter.places))):
        first, second, third = jax.random.split(draw, 3)
        bound, torch = (6 / (width + hidden)) ** 0.5, width**-0.5
        params[place] = {
            "down": jax.random.uniform(first, (layers, width, hidden), minval=-bound, maxval=bound),
            "down_bias": jnp.zeros((layers, hidden)),
            **{name: jnp.zeros((layers, hidden // adapter.groups, width)) for name in EXPERTS},
            **{f"{name}_bias": jnp.zeros((layers, width)) for name in EXPERTS},
            "router": jax.random.uniform(second, (layers, width, 2), minval=-torch, maxval=torch),
            "router_bias": jax.random.uniform(third, (layers, 2), minval=-torch, maxval=torch),
        }
    return params  # type: ignore[return-value]


def init_tokens(key: jax.Array, width: int) -> Params:
    """The two modality tokens, as torch starts an embedding."""
    return {"modality": jax.random.normal(key, (MODALITIES, width))}


def adapt(
    leaves: Mapping[str, jax.Array], adapter: ModalityMixtureConfig, x: jax.Array, weights: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """x [..., T, width] under weights [..., T or 1, 2]."""
    a = matmul(x, leaves["down"]) + leaves["down_bias"].astype(x.dtype)
    if adapter.dropout and key is not None:
        a = dropped(a, adapter.dropout, key)
    shares = a.reshape(*a.shape[:-1], adapter.groups, -1)
    change: Any = 0
    for number, name in enumerate(EXPERTS):
        kernel = leaves[name].astype(x.dtype)
        kernel = kernel.reshape(kernel.shape[0], adapter.groups, -1)
        up = jnp.einsum("...gh,hgo->...go", shares, kernel).reshape(x.shape) + leaves[f"{name}_bias"].astype(x.dtype)
        change = change + weights[..., number, None].astype(x.dtype) * up
    return x + change * jnp.asarray(adapter.scale, x.dtype)


def weigh(leaves: Mapping[str, jax.Array], adapter: ModalityMixtureConfig, state: jax.Array) -> jax.Array:
    """The router's weights of states [..., width], float32 [..., 2]."""
    logits = matmul(state, leaves["router"]).astype(jnp.float32) + leaves["router_bias"].astype(jnp.float32)
    return jax.nn.softmax(logits / adapter.temperature, -1)


def asking(adapter: ModalityMixtureConfig, layers: int) -> ports.Plug:
    """The adapter for the modality tokens themselves, a row each: what the routers make of them is told, by place [modality, 1, 2]."""
    tells: dict[str, jax.Array] = {place: jnp.zeros((MODALITIES, 1, 2)) for place in adapter.places}

    def call(params: Params, where: str, x: jax.Array, *, tell: Callable, key: jax.Array | None = None) -> jax.Array:
        if where not in adapter.places:
            return x
        weights = weigh(params[where], adapter, x)
        tell(where, weights)
        return adapt(params[where], adapter, x, weights, _key(key, adapter, where))

    return ports.Plug(adapter.name, "inputs", _layers(adapter, layers), call, draws=adapter.dropout > 0, tells=tells)


def in_text(adapter: ModalityMixtureConfig, layers: int, routed: Routed) -> ports.Plug:
    """The adapter in a language model that reads texts of these modalities; `with_routing` gives its leaves."""

    def router(leaves: Mapping, params: Mapping, where: str, x: jax.Array) -> jax.Array:
        return params["routing"][where][routed.modality]

    return _plug(adapter, layers, router)


def with_routing(leaves: Params, routed: Routed) -> Params:
    """The plug's leaves with what the routers make of the modalities beside them."""
    return {**leaves, "routing": routed.weights}


def in_pictures(adapter: ModalityMixtureConfig, layers: int, groups: int) -> ports.Plug:
    """The adapter in a vision transformer; the pictures of a batch stand in so many groups, one after another."""

    def router(leaves: Mapping, params: Mapping, where: str, x: jax.Array) -> jax.Array:
        if adapter.visual_router == "per_sample_cls":
            return weigh(leaves, adapter, x[:, :1])
        weights = weigh(leaves, adapter, x[:: len(x) // groups])
        return jnp.repeat(weights, len(x) // groups, 0)

    return _plug(adapter, layers, router)


def modalities(segments: jax.Array, is_media: jax.Array | None) -> jax.Array:
    """int [rows, T]: 1 where the position's sample has pictures."""
    if is_media is None:
        return jnp.zeros(jnp.shape(segments), jnp.int32)
    numbers = jnp.arange(jnp.shape(segments)[1] + 1)

    def row(segments: jax.Array, is_media: jax.Array) -> jax.Array:
        shown = jax.ops.segment_max(is_media.astype(jnp.int32), segments, len(numbers))
        return jnp.maximum(shown, 0)[segments]

    return jax.vmap(row)(jnp.asarray(segments), is_media)


def _plug(adapter: ModalityMixtureConfig, layers: int, router: Router) -> ports.Plug:
    def call(params: Params, where: str, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if where not in adapter.places:
            return x
        weights = router(params[where], params, where, x)
        return adapt(params[where], adapter, x, weights, _key(key, adapter, where))

    return ports.Plug(adapter.name, "inputs", _layers(adapter, layers), call, draws=adapter.dropout > 0)


def _layers(adapter: ModalityMixtureConfig, layers: int) -> tuple[int, ...]:
    return adapter.layers or tuple(range(layers))


def _key(key: jax.Array | None, adapter: ModalityMixtureConfig, where: str) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, list(adapter.places).index(where))  # type: ignore[arg-type]
