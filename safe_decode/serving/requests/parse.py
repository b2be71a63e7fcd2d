"""From what a client asks to rows for an engine, within what the operator allows.

Knows limits, the operator's policy and what of a request is refused. Does not know queues or
how answers are written. A client can tighten the guard and never loosen it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safe_decode.engines.interface import Engine
from safe_decode.engines.rows import RowPolicy, RowPrompt, RowRequest, Sampling
from safe_decode.errors import PromptError
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.serving.requests.logprobs import require_judged
from safe_decode.serving.requests.tighten import tightened
from safe_decode.serving.schemas.errors import ApiError, unsupported
from safe_decode.serving.schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    MessagesRequest,
    OpenAIRequest,
    SafetyOptions,
)
from safe_decode.serving.settings import ServeSettings

__all__ = ["RequestParser"]

_MAX_STOPS = 4


@dataclass(frozen=True)
class RequestParser:
    """Where requests are read.

    Attributes:
        engine: Encodes prompts; says what it guards by.
        settings: The operator's limits.
    """

    engine: Engine
    settings: ServeSettings

    def chat(self, ask: ChatCompletionRequest) -> list[RowRequest]:
        """Read a chat completion.

        Raises:
            ApiError: A parameter is refused, or the prompt cannot be answered.
        """
        self._require_model(ask.model)
        _refuse_chat_extras(ask)
        structured = ask.response_format is not None and ask.response_format.type != "text"
        if structured and not self.settings.allow_json:
            raise unsupported("response_format", "JSON is not enforced here; ask for type 'text'.")
        if ask.top_logprobs is not None and not ask.logprobs:
            raise ApiError(
                400,
                "top_logprobs was given without logprobs=true; pass both.",
                param="top_logprobs",
                code="invalid_value",
            )
        top = (ask.top_logprobs or 0) if ask.logprobs else None
        if not self.settings.expose_alternatives:
            require_judged(ask, top, "top_logprobs")
        self._require_choices(ask.n or 1, 1)
        prompt = self._encoded(
            [
                {
                    "role": "system" if message.role == "developer" else message.role,
                    "content": message.as_text(),
                }
                for message in ask.messages
            ]
        )
        cap = ask.max_completion_tokens or ask.max_tokens
        policy = self.policy(ask.safety, is_structured=structured)
        return self._rows(ask, [prompt], cap=cap, top=top, policy=policy)

    def completion(self, ask: CompletionRequest) -> list[RowRequest]:
        """Read a raw completion.

        Raises:
            ApiError: As for `chat`.
        """
        self._require_model(ask.model)
        if ask.echo:
            raise unsupported("echo", "the prompt is not sent back; leave echo out.")
        if ask.suffix:
            raise unsupported("suffix", "text is only continued; leave suffix out.")
        if ask.best_of is not None and ask.best_of != (ask.n or 1):
            raise unsupported("best_of", "every answer is returned; pass n alone.")
        given: Any = ask.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not self.settings.expose_alternatives:
            require_judged(ask, ask.logprobs, "logprobs")
        self._require_choices(ask.n or 1, len(given))
        with _refusing_prompts("prompt"):
            prompts = [self.engine.completion(prompt) for prompt in given]
        policy = self.policy(ask.safety)
        return self._rows(ask, prompts, cap=ask.max_tokens, top=ask.logprobs, policy=policy)

    def messages(self, ask: MessagesRequest) -> list[RowRequest]:
        """Read a request in Anthropic's shape.

        Raises:
            ApiError: As for `chat`.
        """
        self._require_model(ask.model)
        for name in ("tools", "tool_choice", "thinking"):
            value = getattr(ask, name)
            if value and not (isinstance(value, Mapping) and value.get("type") == "disabled"):
                raise unsupported(name, "only text is guarded; leave it out.")
        system = ask.system_text()
        turns = [{"role": turn.role, "content": turn.as_text()} for turn in ask.messages]
        prompt = self._encoded(
            [*([{"role": "system", "content": system}] if system else []), *turns]
        )
        stops = tuple(_checked_stops(ask.stop_sequences or [], "stop_sequences", limit=16))
        sampling = Sampling(
            max_tokens=self._cap(ask.max_tokens, prompt),
            seed=secrets.randbits(62),
            **self._drawn(ask.temperature, ask.top_p, ask.top_k),
            stop=stops,
        )
        return [RowRequest(prompt, sampling, self.policy(ask.safety))]

    def policy(self, ask: SafetyOptions | None, *, is_structured: bool = False) -> RowPolicy:
        """Return the operator's policy, tightened by a request.

        Args:
            ask: What the request says, or None.
            is_structured: Words of the guard would be read as data, so a trip stops the row.

        Raises:
            ApiError: The request would loosen the guard.
        """
        policy = tightened(self.engine, ask)
        if is_structured:
            return replace(policy, redirect=REDIRECTS[policy.redirect].if_structured)
        return policy

    def _rows(
        self,
        ask: OpenAIRequest,
        prompts: Sequence[RowPrompt],
        *,
        cap: int | None,
        top: int | None,
        policy: RowPolicy,
    ) -> list[RowRequest]:
        n = ask.n or 1
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        stop = [ask.stop] if isinstance(ask.stop, str) else ask.stop or []
        bias = self._bias(ask.logit_bias or {})
        return [
            RowRequest(
                prompt,
                Sampling(
                    max_tokens=self._cap(cap, prompt),
                    # A row's draws belong to its own number, whoever runs beside it.
                    seed=(seed + number * n + choice) % 2**63,
                    **self._drawn(ask.temperature, ask.top_p, ask.top_k),
                    presence_penalty=ask.presence_penalty or 0.0,
                    frequency_penalty=ask.frequency_penalty or 0.0,
                    logit_bias=bias,
                    stop=tuple(_checked_stops(stop, "stop", limit=_MAX_STOPS)),
                    top_logprobs=top,
                ),
                policy,
            )
            for number, prompt in enumerate(prompts)
            for choice in range(n)
        ]

    def _require_choices(self, n: int, n_prompts: int) -> None:
        """Refuse too many answers, before anything is encoded."""
        if n * n_prompts > self.settings.max_choices:
            raise ApiError(
                400,
                f"n={n} for {n_prompts} prompts asks for {n * n_prompts} answers, at most "
                f"{self.settings.max_choices} are given; ask for fewer.",
                param="n",
                code="invalid_value",
            )

    def _require_model(self, name: str) -> None:
        if name != self.settings.name:
            raise ApiError(
                404,
                f"The model {name!r} is not served here; pass {self.settings.name!r}.",
                param="model",
                code="model_not_found",
            )

    def _encoded(self, messages: Sequence[Mapping[str, str]]) -> RowPrompt:
        with _refusing_prompts("messages"):
            return self.engine.chat(messages)

    def _cap(self, asked: int | None, prompt: RowPrompt) -> int:
        facts = self.engine.facts
        largest = self.settings.max_new_tokens or facts.certified_cap
        cap = largest if asked is None else min(asked, largest)
        if facts.context_tokens is not None:
            # Behind the cap there must be room for what is looked at.
            cap = min(cap, facts.context_tokens - len(prompt.ids) - facts.holdback_tokens)
        return max(1, cap)

    def _drawn(
        self, temperature: float | None, top_p: float | None, top_k: int | None
    ) -> dict[str, Any]:
        """Fill in what a request leaves open: as certified, since elsewhere nothing is promised."""
        certified = self.engine.facts.certificate.envelope
        usual = certified.temperature if certified.do_sample else 0.0
        return {
            "temperature": usual if temperature is None else temperature,
            "top_p": certified.top_p if top_p is None else top_p,
            "top_k": certified.top_k if top_k is None else top_k,
        }

    def _bias(self, asked: Mapping[str, float]) -> dict[int, float]:
        bias = {}
        for key, value in asked.items():
            if not (key.isascii() and key.isdigit() and len(key) < 12) or (
                int(key) >= self.engine.facts.vocab_tokens
            ):
                raise ApiError(
                    400,
                    f"logit_bias has the key {key[:40]!r}, wanted an id in "
                    f"0..{self.engine.facts.vocab_tokens - 1}.",
                    param="logit_bias",
                    code="invalid_value",
                )
            bias[int(key)] = value
        return bias


class _refusing_prompts:  # noqa: N801 - reads as the statement it is
    """Turns what an engine says of a prompt into an answer for the client."""

    def __init__(self, param: str) -> None:
        self._param = param

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, PromptError):
            code = "context_length_exceeded" if "context" in str(error) else "invalid_value"
            raise ApiError(400, str(error), param=self._param, code=code) from error


def _refuse_chat_extras(ask: ChatCompletionRequest) -> None:
    neutral: dict[str, tuple[object, ...]] = {
        "tools": ([],),
        "functions": ([],),
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    for name, values in neutral.items():
        value = getattr(ask, name)
        if value is not None and value not in values:
            raise unsupported(name, "only text is generated and guarded; leave it out.")


def _checked_stops(stops: Sequence[str], param: str, *, limit: int) -> Sequence[str]:
    if len(stops) > limit or any(not stop or len(stop) > 512 for stop in stops):
        raise ApiError(
            400,
            f"{param} has {len(stops)} strings, wanted at most {limit}, each of 1 to 512 "
            "characters.",
            param=param,
            code="invalid_value",
        )
    return stops
