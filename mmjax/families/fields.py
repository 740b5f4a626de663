"""Reading a foreign configuration: a field that changes the result and is not supported is an error that names it."""

from __future__ import annotations

from typing import Any, Mapping

from mmjax.errors import UserError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class Fields:
    """The fields of a config.json, or of one of its parts; `where` names it in errors."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values = dict(values)
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The field; the default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The field. Raises UserError where it is absent."""
        if self.values.get(name) is None:
            raise UserError(f"{self.where} has no field {name}, which a {self.values.get('model_type')} needs")
        return self.values[name]

    def only(self, name: str, *allowed: Any) -> None:
        """Raises UserError where the field is present with another value."""
        if name in self.values and self.values[name] not in (None, *allowed):
            raise UserError(
                f"{self.where}: {name} = {self.values[name]!r} is not supported (only {', '.join(map(repr, allowed))})"
            )

    def square(self, name: str, default: int) -> int:
        """A size in pixels, given as one number or as two equal ones."""
        value = self.get(name, default)
        if isinstance(value, (list, tuple)):
            if len(set(value)) != 1:
                raise UserError(f"{self.where}: {name} = {value!r} is not square, which is not supported")
            value = value[0]
        return int(value)

    def activation(self, name: str, default: str) -> Any:
        """One of mmjax.models.block_config.Activation."""
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            raise UserError(f"{self.where}: {name} = {value!r} is not supported (only {', '.join(ACTIVATIONS)})")
        return ACTIVATIONS[value]

    def part(self, name: str, default_type: str) -> dict[str, Any]:
        """The configuration of a part, with its `model_type`."""
        part = self.need(name)
        if not isinstance(part, Mapping):
            raise UserError(f"{self.where}: {name} is not an object")
        return {"model_type": default_type, **part}


def activation_name(activation: str, preferred: str | None = None) -> str:
    """The foreign name of one of our activations: the one a config had, if it means the same."""
    if preferred is not None and ACTIVATIONS.get(preferred) == activation:
        return preferred
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
