"""What a loop that somebody else wrote must be for the guard to stand in it.

Knows rows, counts and scores. Does not know sessions, trips or scripts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_decode.errors import BeatError, ConfigurationError, UnsupportedError

__all__ = ["require_alternation", "require_rows"]


def require_rows(batch: int, input_ids: Tensor, scores: Tensor) -> None:
    """Check, before the first token, that the rows are those the guard was opened for.

    Args:
        batch: Rows of the session.
        input_ids: [batch, seq].
        scores: [batch, vocab].

    Raises:
        UnsupportedError: Other rows, or log-probabilities as beam search has them.
    """
    if input_ids.shape[0] != batch:
        raise UnsupportedError(
            f"generate runs {input_ids.shape[0]} rows, the guard was opened for "
            f"{batch}; pass the same input_ids to decoder.processor, its "
            "num_return_sequences, and num_beams=1."
        )
    # Beam search hands log-probabilities over: they sum to one, raw scores hardly ever do.
    total = torch.logsumexp(scores.float(), -1)
    if scores.shape[-1] > 1 and bool((total.abs() < 1e-4).all()):
        raise UnsupportedError(
            "scores are log-probabilities, as in num_beams > 1 or renormalised scores; pass "
            "num_beams=1 and put the guard's processor on raw scores."
        )


def require_alternation(said: int, n_scored: int, *, can_end: bool) -> None:
    """Check that the processor runs once a token, and that a refusal can end.

    Args:
        said: Tokens chosen so far.
        n_scored: Tokens before which the processor ran.
        can_end: Whether a stopping criterion of the guard, or an EOS, could end a row.

    Raises:
        BeatError: It ran before another token.
        ConfigurationError: At the second token, if nothing could end a row.
    """
    if said != n_scored:
        raise BeatError(
            f"the processor runs before token {said}, wanted token {n_scored}; pass it "
            "to generate once."
        )
    if said > 0 and not can_end:
        raise ConfigurationError(
            "the model has no EOS in its generation configuration, so a refusal could not "
            "end; pass stopping_criteria=[handle.stopping_criteria] to generate as well."
        )
