"""What a request may ask of its guard: more, never less.

Knows the operator's policy and certificates. Does not know prompts or sampling.
"""

from __future__ import annotations

from safe_decode.decision import Redirect
from safe_decode.engines.interface import Engine
from safe_decode.engines.rows import RowPolicy
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.requests import SafetyOptions

__all__ = ["tightened"]


def tightened(engine: Engine, ask: SafetyOptions | None) -> RowPolicy:
    """Return an engine's policy, tightened by a request.

    Raises:
        ApiError: A level that is not certified, or anything that would loosen the guard.
    """
    facts = engine.facts
    policy = facts.policy
    if ask is None:
        return policy
    alpha = policy.alpha
    if ask.alpha is not None:
        found = next((a for a in facts.certificates if abs(a - ask.alpha) < 1e-12), None)
        if found is None:
            raise _policy_error(
                "alpha", f"{ask.alpha} is not certified; pass one of {sorted(facts.certificates)}."
            )
        # A larger alpha admits more false alarms: its threshold is lower, the guard tighter.
        if facts.certificates[found].threshold > facts.certificate.threshold:
            raise _policy_error(
                "alpha", f"{ask.alpha} has a higher threshold than the operator's {alpha}."
            )
        alpha = found
    holdback = policy.holdback_tokens
    if ask.holdback_tokens is not None:
        if ask.holdback_tokens < holdback:
            raise _policy_error(
                "holdback_tokens", f"{ask.holdback_tokens} is below the operator's {holdback}."
            )
        holdback = ask.holdback_tokens
    redirect: Redirect = ask.redirect or policy.redirect
    if REDIRECTS[redirect].resumes and not REDIRECTS[policy.redirect].resumes:
        # What follows is the model's own words again.
        raise _policy_error(
            "redirect", f"{redirect!r} is looser than the operator's {policy.redirect}."
        )
    return RowPolicy(alpha, redirect, holdback)


def _policy_error(name: str, why: str) -> ApiError:
    return ApiError(
        400,
        f"safety.{name}={why} A request can only tighten the guard.",
        param=f"safety.{name}",
        code="invalid_value",
    )
