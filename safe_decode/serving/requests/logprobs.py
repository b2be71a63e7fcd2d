"""Which log-probabilities a request may have: those of tokens that were judged.

Knows parameters of requests. Does not know models or how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

from safe_decode.serving.schemas.errors import unsupported
from safe_decode.serving.schemas.requests import OpenAIRequest

__all__ = ["require_judged"]

_STEERS = ("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty")
_NEUTRAL = {"repetition_penalty": 1.0}


def require_judged(ask: OpenAIRequest, alternatives: int | None, param: str) -> None:
    """Refuse log-probabilities that tell of tokens which nobody judged.

    Alternatives are such tokens. So is what a bias or penalty keeps from being chosen: forced one
    after another, harmless tokens spell out the distribution in which the harmful one stands.

    Args:
        ask: The request.
        alternatives: How many it wants a token; None: no log-probabilities.
        param: The parameter that says so.

    Raises:
        ApiError: It asks for such tokens.
    """
    if alternatives is None:
        return
    if alternatives:
        raise unsupported(
            param, "alternatives were not judged; pass 0 for the chosen tokens alone."
        )
    steer = next((name for name in _STEERS if _is_set(ask, name)), None)
    if steer is not None:
        raise unsupported(
            "logprobs", f"with {steer} they tell of tokens that were not judged; pass one of them."
        )


def _is_set(ask: OpenAIRequest, name: str) -> bool:
    given: float | Mapping[str, float] | None = getattr(ask, name)
    if isinstance(given, Mapping):
        return any(given.values())
    return given not in (None, _NEUTRAL.get(name, 0.0))
