"""What makes a command of the command line out of a function and a dataclass of options.

Knows dataclass fields, signatures, and the panels that `safe-decode --help` groups commands in.
Does not know any command or any option.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

__all__ = ["OTHER", "PANELS", "Panel", "command", "panel_of"]

Panel = Literal[
    "Use a guarded model",
    "Serve",
    "Make a probe",
    "Evaluate",
    "Attack",
    "Fine-tune",
    "Tools",
]
"""The purpose of a command; `safe-decode --help` lists commands under it."""

PANELS: tuple[Panel, ...] = get_args(Panel)
"""Every purpose, in the order of `safe-decode --help`."""

OTHER = "Other commands"
"""Where commands stand that other packages register without a purpose."""

Options = TypeVar("Options")


def command(panel: Panel) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function whose one parameter is a dataclass of options.

    Each field is one option or argument: `name: Annotated[type, typer.Option(help=...)] = default`.
    A field without a default must be given on the command line. Options that several commands
    share stand in a dataclass that theirs inherit from; a command's help lists the fields of its
    own class first, then those of the classes it inherits from, left to right.

    Args:
        panel: The purpose under which `safe-decode --help` lists the command.

    Returns:
        A decorator. The decorated function takes one keyword argument for each field, with the
        field's type and default, as typer reads them.

    Raises:
        TypeError: A field has a default factory, which no help text could show.
    """

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        (name,) = inspect.signature(run).parameters
        options = get_type_hints(run)[name]
        signature = _signature_of(options)

        @functools.wraps(run)
        def called(**given: object) -> None:
            run(options(**given))

        called.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        vars(called).update(__signature__=signature, help_panel=panel)
        return called

    return decorate


def panel_of(function: Callable[..., object]) -> str:
    """Return the purpose of a command; OTHER where its package states none."""
    panel: str = getattr(function, "help_panel", OTHER)
    return panel


def _signature_of(options: type[Any]) -> inspect.Signature:
    types = get_type_hints(options, include_extras=True)
    found: dict[str, Field[Any]] = {field.name: field for field in fields(options)}
    order = [name for one in options.__mro__ for name in vars(one).get("__annotations__", ())]
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default_of(found[name]),
                annotation=types[name],
            )
            for name in dict.fromkeys(order)
        ],
        return_annotation=None,
    )


def _default_of(field: Field[Any]) -> object:
    if field.default_factory is not MISSING:
        raise TypeError(f"option {field.name!r} has a default factory; give it a default value.")
    return inspect.Parameter.empty if field.default is MISSING else field.default
