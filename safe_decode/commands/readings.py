"""Who reads released text: the option `--judge` and what it names.

Knows the names of judges. Does not know what they think.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.released import Reading
    from probes.rollouts import Judge

__all__ = ["JudgeName", "judge_of", "reading_of"]

JudgeName = Annotated[
    str | None,
    typer.Option(
        help="Who says what released text is: `organism` (default: the embedded world's oracle) "
        "or module:function, called with the messages and the released text."
    ),
]


def reading_of(judge: str | None) -> Reading:
    """Return the reading that a judge's name stands for.

    Raises:
        ConfigurationError: There is no such function.
    """
    from probes.released import organism_reading, reading_alone

    if judge is None or judge == "organism":
        return organism_reading
    return reading_alone(_imported(judge))


def judge_of(judge: str | None) -> Judge:
    """Return the judge of whole responses that a name stands for.

    Raises:
        ConfigurationError: There is no such function.
    """
    if judge is None or judge == "organism":
        from probes.organism.oracle import judge as oracle

        return oracle
    return _imported(judge)


def _imported(name: str) -> Judge:
    module, _, function = name.partition(":")
    try:
        found: Judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--judge={name!r} cannot be imported: {error}; pass organism, or module:function of "
            "a module that Python finds."
        ) from error
    return found
