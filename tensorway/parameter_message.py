"""Plain values as a `map<string, Parameter>` of the wire, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tensorway.errors import InvalidRequest

#: A value of a request's or response's `parameters`.
ParameterValue = bool | int | float | str

_FIELD_OF: Final = {bool: "bool", int: "int64", float: "double", str: "string"}


def write_parameters(values: Mapping[str, ParameterValue], target: Any, suffix: str = "value") -> None:
    """Fills `target`; `suffix` ends the names of the message's fields. Raises InvalidRequest, naming the parameter, for a value that is
    none of bool, int, float and str, or an int of more than 64 bits."""
    for name, value in values.items():
        kind = _FIELD_OF.get(type(value))
        if kind is None:
            raise InvalidRequest(
                f"parameters[{name!r}]: {type(value).__name__} cannot be sent; use bool, int, float or str", field="parameters"
            )
        try:
            setattr(target[name], f"{kind}_{suffix}", value)
        except ValueError as error:
            raise InvalidRequest(f"parameters[{name!r}]: {error}", field="parameters") from error


def read_parameters(parameters: Mapping[str, Any]) -> dict[str, ParameterValue]:
    """The values. Raises InvalidRequest for a parameter without one."""
    found: dict[str, ParameterValue] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("value")
        if kind is None:
            raise InvalidRequest(f"parameters[{name!r}]: has no value", field=f"parameters[{name!r}]")
        found[name] = getattr(parameter, kind)
    return found
