"""The tables of settings: name, default and meaning, from the schemas themselves.

Knows schemas of pydantic and the section "Attributes" of their docstrings. Does not know what a
setting does.
"""

from __future__ import annotations

import inspect
import re
from typing import get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from benchmarks.docs.markdown import table

__all__ = ["attributes_of", "proxy", "server", "settings_table"]

_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def server() -> str:
    """Draw the settings of `safe-decode serve`."""
    from safe_decode.serving.settings import ServeSettings

    return settings_table(ServeSettings)


def proxy() -> str:
    """Draw the settings of `safe-decode proxy`."""
    from safe_decode.serving.proxy.settings import ProxySettings

    return settings_table(ProxySettings)


def settings_table(schema: type[BaseModel]) -> str:
    """Draw one row a setting.

    Raises:
        ValueError: A setting is not described in the docstring, or the other way round.
    """
    described = attributes_of(schema)
    if set(described) != set(schema.model_fields):
        wrong = sorted(set(described) ^ set(schema.model_fields))
        raise ValueError(f"{schema.__name__} and its docstring differ in {wrong}.")
    rows = []
    for name, field in schema.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "required" if default is PydanticUndefined else f"`{_written(default)}`"
        rows.append([f"`{name}`", _kind(field.annotation), shown, described[name]])
    return table(("setting", "type", "default", "what"), rows)


def attributes_of(schema: type) -> dict[str, str]:
    """Read the section "Attributes" of a docstring: name -> text in one line of Markdown."""
    text = inspect.getdoc(schema) or ""
    section = text.partition("Attributes:\n")[2]
    found = {name: " ".join(told.split()) for name, told in _ENTRY.findall(section)}
    return {name: told.replace("*", "\\*") for name, told in found.items()}


def _written(value: object) -> str:
    """Write a default as a file of settings would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)


def _kind(annotation: object) -> str:
    arguments = get_args(annotation)
    if not arguments:
        name = getattr(annotation, "__name__", str(annotation))
        return {"SecretStr": "text", "str": "text", "Path": "path", "bool": "yes or no"}.get(
            name, {"int": "whole number", "float": "number"}.get(name, name)
        )
    if all(isinstance(one, str) for one in arguments):
        return ", ".join(f"`{one}`" for one in arguments)
    # What is neither a type nor made of types is a validator.
    kinds = [
        one
        for one in arguments
        if one is not type(None) and (isinstance(one, type) or get_args(one))
    ]
    prefix = "list of " if Ellipsis in arguments else ""
    return prefix + " or ".join(_kind(one) for one in kinds)
