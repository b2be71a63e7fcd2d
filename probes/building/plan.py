"""What there is to do, from the data alone: answers, tokens, disk.

Knows counts and sizes. Does not know models; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from probes.building.material import Material
from probes.building.recipe import BuildRecipe

__all__ = ["Plan", "plan_of"]

_CHARACTERS_PER_TOKEN = 4
_BYTES_PER_VALUE = 2  # activations are kept as float16


@dataclass(frozen=True)
class Plan:
    """What there is to do, from the data alone: upper bounds, by four characters a token.

    Attributes:
        answers: Answers to generate.
        generated_tokens: Their tokens, if each fills the cap.
        read_tokens: Tokens read, prompts included, one pass.
        kept_tokens: Response tokens whose activations are kept: those of fit and select.
    """

    answers: int
    generated_tokens: int
    read_tokens: int
    kept_tokens: int

    def kept_bytes(self, features: int) -> int:
        """Return the disk that activations of so many features take."""
        return self.kept_tokens * features * _BYTES_PER_VALUE


def plan_of(material: Material, recipe: BuildRecipe) -> Plan:
    """Count what a recipe asks for."""
    cap = recipe.answers.max_new_tokens
    asked = len(material.requests)
    prompts = sum(_tokens(one.messages[-1]["content"]) for one in material.requests)
    labelled = [(_tokens(row.prompt), min(_tokens(row.response), cap)) for row in material.labelled]
    kept = [
        length
        for row, (_, length) in zip(material.labelled, labelled, strict=True)
        if row.split in ("fit", "select")
    ]
    own_kept = sum(one.split in ("fit", "select") for one in material.requests) * cap
    return Plan(
        answers=asked,
        generated_tokens=asked * cap,
        read_tokens=prompts + asked * cap + sum(a + b for a, b in labelled),
        kept_tokens=sum(kept) + own_kept,
    )


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)
