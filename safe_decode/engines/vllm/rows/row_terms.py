"""What holds for one request: its threshold, its redirect, what of it is judged, its room.

Knows requests as vLLM has them, and what they may ask for by `vllm_xargs`. Does not know slots or
scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from safe_decode.certificate_choice import CertificateChoice
from safe_decode.decision import Redirect
from safe_decode.engines.vllm.settings import EngineSettings
from safe_decode.errors import ConfigurationError
from safe_decode.policy.policy import Policy, RequestPolicy
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.prompts.batch import from_ids
from safe_decode.typing import Tokenizer

if TYPE_CHECKING:
    from vllm import SamplingParams

__all__ = ["CANARY", "CAP", "PREFIX", "RowTerms", "require_request", "terms_of"]

PREFIX = "safe_decode_"
"""Of the names of `vllm_xargs` that are ours."""
CAP = PREFIX + "cap"
"""What the scheduler writes into an admitted request: tokens that it may say without a trip."""
CANARY = PREFIX + "canary"
"""Marks the request that the guard itself makes when the engine starts."""
_ASKED = (PREFIX + "alpha", PREFIX + "redirect")


@dataclass(frozen=True)
class RowTerms:
    """What holds for one request.

    Attributes:
        threshold: What its statistic is compared with.
        policy: What a trip leads to.
        watched_from: First position that is judged.
        prompt_tokens: Of its prompt.
        cap: Tokens that it may say if it does not trip.
        is_canary: Whether the guard itself made it.
    """

    threshold: float
    policy: Policy
    watched_from: int
    prompt_tokens: int
    cap: int
    is_canary: bool = False


def require_request(params: SamplingParams, settings: EngineSettings) -> None:
    """Check what a request asks for, at its admission.

    Raises:
        ConfigurationError: A name of ours that is none, a level that is not certified, anything
            that would loosen the guard, or an option that cannot be guarded.
    """
    extra: Mapping[str, object] = params.extra_args or {}
    unknown = sorted(name for name in extra if name.startswith(PREFIX) and name not in _ASKED)
    if unknown:
        raise ConfigurationError(
            f"vllm_xargs has {', '.join(map(repr, unknown))}, wanted some of {', '.join(_ASKED)}; "
            "leave others out."
        )
    _asked_redirect(extra)
    for dtype in settings.bundle.dtypes:
        choice = CertificateChoice(settings.bundle.certificates, settings.population, dtype)
        _asked_alpha(extra, choice, settings)
    for name, why in _REFUSED_IN_REQUESTS.items():
        value = getattr(params, name, None)
        if value is not None and value is not False:  # 0 asks for the chosen token's
            raise ConfigurationError(f"{name}={value} is refused under the guard: {why}.")


_ORACLE = "log-probabilities show what a forced token replaced; leave it out"
_REFUSED_IN_REQUESTS = {
    "logprobs": _ORACLE,
    "logprob_token_ids": _ORACLE,
    "prompt_logprobs": _ORACLE,
    "thinking_token_budget": "its forced tokens overrule those of the guard; leave it out",
    "trace_decode_token_ids": "a trace overwrites forced tokens; leave it out",
}


def terms_of(
    prompt: Sequence[int],
    params: SamplingParams,
    settings: EngineSettings,
    choice: CertificateChoice,
    tokenizer: Tokenizer,
) -> RowTerms:
    """Decide what holds for a request that was admitted.

    Args:
        prompt: Its ids.
        params: What it asks for.
        settings: The operator's.
        choice: Of the certificates in the engine's numbers.
        tokenizer: Whose template tells where the open turn begins.
    """
    extra: Mapping[str, object] = params.extra_args or {}
    cap = int(extra.get(CAP, 0))  # type: ignore[call-overload]  # the scheduler's own
    seen = from_ids(tokenizer, torch.tensor([list(prompt)]), torch.ones(1, len(prompt)).long())
    alphas = {settings.alpha, _asked_alpha(extra, choice, settings)}
    certificates = [
        choice.of_call(alpha, tokens=cap, prefill_tokens=seen.prefill_tokens[0]) for alpha in alphas
    ]
    request = RequestPolicy(
        redirect=_asked_redirect(extra),
        is_structured=getattr(params, "structured_outputs", None) is not None,
    )
    return RowTerms(
        threshold=min(one.threshold for one in certificates),
        policy=request.applied_to(settings.policy),
        watched_from=len(prompt) - seen.scanned[0],
        prompt_tokens=len(prompt),
        cap=cap,
    )


def _asked_alpha(
    extra: Mapping[str, object], choice: CertificateChoice, settings: EngineSettings
) -> float:
    asked = extra.get(PREFIX + "alpha")
    if asked is None:
        return settings.alpha
    certified = choice.longest
    found = next(
        (a for a in certified if isinstance(asked, (int, float)) and math.isclose(a, asked)), None
    )
    if found is None:
        raise ConfigurationError(
            f"{PREFIX}alpha={asked} is not certified; pass one of {sorted(certified)}."
        )
    # A larger alpha admits more false alarms: its threshold is lower, the guard tighter.
    if certified[found].threshold > choice.of_call(settings.alpha).threshold:
        raise ConfigurationError(
            f"{PREFIX}alpha={asked} has a higher threshold than the operator's {settings.alpha}; "
            "a request can only tighten the guard."
        )
    return found


def _asked_redirect(extra: Mapping[str, object]) -> Redirect | None:
    asked = extra.get(PREFIX + "redirect")
    if asked is None:
        return None
    wanted = [
        name
        for name in get_args(Redirect)
        if REDIRECTS[name].protects and not REDIRECTS[name].resumes
    ]
    if asked not in wanted:
        raise ConfigurationError(
            f"{PREFIX}redirect={asked!r} is not one of {', '.join(wanted)}; a request can only "
            "tighten the guard."
        )
    return asked  # type: ignore[return-value]  # one of the names
