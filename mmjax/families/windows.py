"""Which layers of a foreign configuration see a sliding window: `layer_types`, and what families mean where it is absent."""

from __future__ import annotations

from typing import Callable

from mmjax.errors import UserError
from mmjax.families.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(fields: Fields, layers: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The window of each layer (0 = none), as short as its period.

    slides   which layers have one where the config names no `layer_types`
    Raises UserError for a kind of layer that is not known.
    """
    kinds = fields.get("layer_types") or [SLIDING if slides(i) else FULL for i in range(layers)]
    unknown = set(kinds) - {FULL, SLIDING}
    if unknown or len(kinds) != layers:
        raise UserError(f"{fields.where}: layer_types = {kinds!r} is not supported for {layers} layers")
    if SLIDING in kinds and not window:
        raise UserError(f"{fields.where}: layer_types has sliding layers, but sliding_window is not set")
    windows = tuple(window if kind == SLIDING else 0 for kind in kinds)
    return next(windows[:n] for n in range(1, layers + 1) if windows == (windows[:n] * layers)[:layers])


def write_windows(windows: tuple[int, ...], layers: int) -> dict[str, object]:
    """`layer_types`, and `sliding_window` where some layer has one."""
    each = (windows * layers)[:layers]
    width = {"sliding_window": max(each)} if any(each) else {}
    return {**width, "layer_types": [SLIDING if window else FULL for window in each]}
