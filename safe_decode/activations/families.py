"""Families whose decoder cannot be guarded, or not in every batch, by the type of their model.

Knows model types and reasons as users read them. Does not know modules or configurations beyond
that name. What is not listed here is judged by its modules.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REFUSED", "ROWS_ALONE", "UNPADDED", "why_alone", "why_refused", "why_unpadded"]

_POSITIONS = (
    "generate numbers positions from 0 and a plain forward from pad_token_id + 1, so that scores "
    "would not be the certified ones; use a decoder-only model"
)
_AUDIO = "it writes audio codes in several codebooks, not text; use a model of text"
_DRAFT = "it drafts for another model and reads that model's states; guard that model"

REFUSED: Mapping[str, str] = {
    "blt": (
        "its decoder blocks see patches of bytes, so that a position is no token; use a model with "
        "a tokenizer"
    ),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _POSITIONS),
    "cpmant": (
        "it puts learned positions before each prompt and reads the prompt in both directions; use "
        "a decoder-only model"
    ),
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "hrm_text": "its blocks run several times in a forward; use a model that runs each once",
    "moshi": (
        "behind its sliding window cached and uncached forwards differ, so that scores would not "
        "be the certified ones; use a model of text"
    ),
    **dict.fromkeys(("musicgen", "musicgen_decoder"), _AUDIO),
    **dict.fromkeys(("musicgen_melody", "musicgen_melody_decoder"), _AUDIO),
    "paligemma": (
        "it reads its prompt in both directions, so that a score would change with the text behind "
        "it; use a decoder-only model"
    ),
    "prophetnet": "it predicts several tokens in streams side by side; use a decoder-only model",
    "reformer": (
        "its blocks are reversible and pass two streams, neither of which is the residual one; use "
        "a model with plain blocks"
    ),
    "xlm": "its blocks are no modules that could be read; use a decoder-only model",
    "xlnet": (
        "it predicts in any order, and generate adds a token that is no text; use a decoder-only "
        "model"
    ),
}
"""Reason and remedy of each family that is refused whole."""

_COUNTS_PADDING = "its positions count padding, so that scores would depend on the neighbours"
_COMPRESSES_PADDING = (
    "it compresses blocks of positions, padding too, so that scores would depend on the neighbours"
)
_READS_PADDING = "its recurrence reads padding, so that scores would depend on the neighbours"

UNPADDED: Mapping[str, str] = {
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small"), _COUNTS_PADDING),
    **dict.fromkeys(("git", "marian", "mbart", "mvp", "pegasus", "plbart"), _COUNTS_PADDING),
    **dict.fromkeys(("trocr", "whisper"), _COUNTS_PADDING),
    "deepseek_v4": _COMPRESSES_PADDING,
    "recurrent_gemma": _READS_PADDING,
    "xlstm": _READS_PADDING,
}
"""Reason of each family whose rows must have one length."""

ROWS_ALONE: Mapping[str, str] = {
    "rwkv": "a step of it mixes the rows of a batch",
}
"""Reason of each family that runs one row at a time."""


def why_refused(config: object) -> str | None:
    """Say why the family of a configuration is refused; None if it is not."""
    return REFUSED.get(_type_of(config))


def why_unpadded(config: object) -> str | None:
    """Say why rows of the family must have one length; None if they need not."""
    return UNPADDED.get(_type_of(config))


def why_alone(config: object) -> str | None:
    """Say why the family runs one row at a time; None if it does not."""
    return ROWS_ALONE.get(_type_of(config))


def _type_of(config: object) -> str:
    return str(getattr(config, "model_type", ""))
