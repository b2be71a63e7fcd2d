"""What evaluations and attacks read: judged conversations, and who says what a text is.

Knows sources and the names of judges. Does not know what is done with either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.options import read
from probes.cli.tables.facts import show_warnings
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.evaluation.released_text import Reading
    from probes.rollouts.types import Judge

__all__ = ["JudgeName", "conversations_of", "judge_of", "reading_of"]

JudgeName = Annotated[
    str | None,
    typer.Option(
        help="Who says what released text is: organism, the oracle of the embedded world, or "
        "module:function, called with the messages and the released text. Without it: organism."
    ),
]


def conversations_of(source: str) -> list[Conversation]:
    """Read judged conversations from a file of any known format or `hf:NAME[:split]`.

    Rows that cannot be used are counted and named on standard error.

    Raises:
        DataError: The source cannot be read or holds no response.
    """
    readings = read([source], "auto", strict=False)
    show_warnings(readings)
    rows = readings[0].conversations
    if not rows:
        raise DataError(f"{source} holds no response; pass conversations with their responses.")
    return rows


def reading_of(judge: str | None) -> Reading:
    """Return the reading that a judge's name stands for.

    Raises:
        ConfigurationError: There is no such function.
    """
    from probes.evaluation.released_text import reading_alone
    from probes.organism.prompts_source import organism_reading

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
