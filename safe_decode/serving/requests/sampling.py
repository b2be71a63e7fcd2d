"""How the tokens of an answer are chosen, from what a request says and what it leaves open.

Knows the fields of requests that say so. Does not know prompts as text, policies, how bodies are
read, or what is certified (`covered`). What is left open is as certified, since elsewhere nothing
is promised.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safe_decode.engines.interface import GuardFacts
from safe_decode.engines.rows import RowPolicy, RowPrompt, RowRequest, Sampling
from safe_decode.serving.requests.covered import CapServed, CoveredValues, SamplingServed
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.requests import (
    ChatCompletionRequest,
    MessagesRequest,
    OpenAIRequest,
)
from safe_decode.serving.schemas.responses_request import ResponsesRequest
from safe_decode.serving.settings import ServeSettings

__all__ = ["SamplingReader"]

_MAX_STOPS = 4


@dataclass(frozen=True)
class SamplingReader:
    """Reads how tokens are to be chosen.

    Attributes:
        facts: What was certified, and how much room there is.
        settings: The operator's limits.
    """

    facts: GuardFacts
    settings: ServeSettings

    def of_openai(
        self,
        ask: OpenAIRequest,
        prompts: Sequence[RowPrompt],
        *,
        top: int | None,
        policy: RowPolicy,
        is_structured: bool = False,
    ) -> list[RowRequest]:
        """Read the answers of a request: `n` for each prompt.

        Args:
            ask: The request.
            prompts: Encoded.
            top: Alternatives that are asked for; None: no log-probabilities.
            policy: How the rows are guarded.
            is_structured: The answer is read as data.

        Raises:
            ApiError: A stop string or bias is not as wanted, the request contradicts itself, or
                asks for what the operator refuses.
        """
        n = ask.n or 1
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        stop = [ask.stop] if isinstance(ask.stop, str) else ask.stop or []
        stops = _checked_stops(stop, "stop", limit=_MAX_STOPS)
        drawn = self._covered.sampling(
            temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k, min_p=ask.min_p
        )
        shared: dict[str, Any] = {
            **drawn.values,
            "repetition_penalty": ask.repetition_penalty,
            "ignore_eos": bool(ask.ignore_eos),
            "presence_penalty": ask.presence_penalty or 0.0,
            "frequency_penalty": ask.frequency_penalty or 0.0,
            "logit_bias": self._bias(ask.logit_bias or {}),
            "stop": stops,
            "top_logprobs": top,
        }
        param, asked = _cap_asked(ask)
        rows = []
        for number, prompt in enumerate(prompts):
            cap = self._covered.cap(
                asked, prompt, holdback_tokens=policy.holdback_tokens, param=param
            )
            floor = _checked_floor(ask.min_tokens or 0, cap.tokens)
            for choice in range(n):
                # A row's draws belong to its own number, whoever runs beside it.
                own = (seed + number * n + choice) % 2**63
                sampling = Sampling(max_tokens=cap.tokens, seed=own, min_tokens=floor, **shared)
                changes = (*drawn.changes, *cap.changes)
                rows.append(RowRequest(prompt, sampling, policy, is_structured, changes))
        return rows

    def of_messages(
        self, ask: MessagesRequest, prompt: RowPrompt, *, policy: RowPolicy
    ) -> RowRequest:
        """Read a request in Anthropic's shape.

        Raises:
            ApiError: A stop string is not as wanted, or the operator refuses what is asked.
        """
        drawn = self._covered.sampling(
            temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k
        )
        stops = _checked_stops(ask.stop_sequences or [], "stop_sequences", limit=16)
        cap = self._covered.cap(
            ask.max_tokens, prompt, holdback_tokens=policy.holdback_tokens, param="max_tokens"
        )
        return self._single(prompt, drawn, cap, stops, policy)

    def of_responses(
        self,
        ask: ResponsesRequest,
        prompt: RowPrompt,
        *,
        policy: RowPolicy,
        is_structured: bool = False,
    ) -> RowRequest:
        """Read a request of OpenAI's responses endpoint.

        Raises:
            ApiError: The operator refuses what is asked.
        """
        drawn = self._covered.sampling(
            temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k
        )
        cap = self._covered.cap(
            ask.max_output_tokens,
            prompt,
            holdback_tokens=policy.holdback_tokens,
            param="max_output_tokens",
        )
        row = self._single(prompt, drawn, cap, (), policy)
        return replace(row, is_structured=is_structured)

    @property
    def _covered(self) -> CoveredValues:
        return CoveredValues(self.facts, self.settings)

    def _single(
        self,
        prompt: RowPrompt,
        drawn: SamplingServed,
        cap: CapServed,
        stops: tuple[str, ...],
        policy: RowPolicy,
    ) -> RowRequest:
        values: dict[str, Any] = dict(drawn.values)
        sampling = Sampling(max_tokens=cap.tokens, seed=secrets.randbits(62), stop=stops, **values)
        return RowRequest(prompt, sampling, policy, changes=(*drawn.changes, *cap.changes))

    def _bias(self, asked: Mapping[str, float]) -> dict[int, float]:
        bias = {}
        for key, value in asked.items():
            if not (key.isascii() and key.isdigit() and len(key) < 12) or (
                int(key) >= self.facts.vocab_tokens
            ):
                raise ApiError(
                    400,
                    f"logit_bias has the key {key[:40]!r}, wanted an id in "
                    f"0..{self.facts.vocab_tokens - 1}.",
                    param="logit_bias",
                    code="invalid_value",
                )
            bias[int(key)] = value
        return bias


def _cap_asked(ask: OpenAIRequest) -> tuple[str, int | None]:
    """Return which field says how long the answer may be, and what it says."""
    newer = ask.max_completion_tokens if isinstance(ask, ChatCompletionRequest) else None
    return ("max_completion_tokens", newer) if newer else ("max_tokens", ask.max_tokens)


def _checked_stops(stops: Sequence[str], param: str, *, limit: int) -> tuple[str, ...]:
    if len(stops) > limit or any(not stop or len(stop) > 512 for stop in stops):
        raise ApiError(
            400,
            f"{param} has {len(stops)} strings, wanted at most {limit}, each of 1 to 512 "
            "characters.",
            param=param,
            code="invalid_value",
        )
    return tuple(stops)


def _checked_floor(floor: int, cap: int) -> int:
    if floor > cap:
        raise ApiError(
            400,
            f"min_tokens={floor} is above the {cap} tokens that the answer may have; ask for "
            "fewer.",
            param="min_tokens",
            code="invalid_value",
        )
    return floor
