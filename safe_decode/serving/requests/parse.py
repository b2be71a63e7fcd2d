"""From what a client asks to rows for an engine, within what the operator allows.

Knows limits, the operator's policy and what of a request's values is refused. Does not know
queues, how answers are written, or fields that no schema has (`admission`). A client can tighten
the guard and never loosen it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safe_decode.engines.interface import Engine
from safe_decode.engines.rows import RowPolicy, RowPrompt, RowRequest
from safe_decode.errors import PromptError
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.serving.requests.logprobs import require_judged
from safe_decode.serving.requests.sampling import SamplingReader
from safe_decode.serving.requests.tighten import tightened
from safe_decode.serving.schemas.errors import ApiError, unsupported
from safe_decode.serving.schemas.messages import ChatMessage
from safe_decode.serving.schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    MessagesRequest,
    SafetyOptions,
    TokenizeRequest,
)
from safe_decode.serving.schemas.responses_request import ResponsesRequest
from safe_decode.serving.settings import ServeSettings

__all__ = ["RequestParser", "unread_variables"]

_EFFORT = "reasoning_effort"


@dataclass(frozen=True)
class RequestParser:
    """Where requests are read.

    Attributes:
        engine: Encodes prompts; says what it guards by.
        settings: The operator's limits.
    """

    engine: Engine
    settings: ServeSettings

    def chat(self, ask: ChatCompletionRequest, *, is_shadow: bool = False) -> list[RowRequest]:
        """Read a chat completion.

        Args:
            ask: What is asked.
            is_shadow: The operator wants trips of this request told and not acted upon.

        Raises:
            ApiError: A parameter is refused, or the prompt cannot be answered.
        """
        self._require_model(ask.model)
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
        prompt = self._encoded(_spoken(ask.messages), _variables(ask))
        policy = self.policy(ask.safety, is_structured=structured, is_shadow=is_shadow)
        return self._sampling.of_openai(
            ask, [prompt], top=top, policy=policy, is_structured=structured
        )

    def completion(self, ask: CompletionRequest, *, is_shadow: bool = False) -> list[RowRequest]:
        """Read a raw completion.

        Raises:
            ApiError: As for `chat`.
        """
        self._require_model(ask.model)
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
        policy = self.policy(ask.safety, is_shadow=is_shadow)
        return self._sampling.of_openai(ask, prompts, top=ask.logprobs, policy=policy)

    def messages(self, ask: MessagesRequest, *, is_shadow: bool = False) -> list[RowRequest]:
        """Read a request in Anthropic's shape.

        Raises:
            ApiError: As for `chat`.
        """
        self._require_model(ask.model)
        prompt = self._encoded(ask.spoken())
        policy = self.policy(ask.safety, is_shadow=is_shadow)
        return [self._sampling.of_messages(ask, prompt, policy=policy)]

    def responses(self, ask: ResponsesRequest, *, is_shadow: bool = False) -> list[RowRequest]:
        """Read a request of OpenAI's responses endpoint.

        Raises:
            ApiError: As for `chat`.
        """
        self._require_model(ask.model)
        form = ask.text.format if ask.text is not None else None
        structured = form is not None and form.type != "text"
        if structured and not self.settings.allow_json:
            raise unsupported("text.format", "JSON is not enforced here; ask for type 'text'.")
        prompt = self._encoded(ask.spoken(), _variables(ask), param="input")
        policy = self.policy(ask.safety, is_structured=structured, is_shadow=is_shadow)
        row = self._sampling.of_responses(ask, prompt, policy=policy, is_structured=structured)
        return [row]

    def prompt_ids(self, ask: CountTokensRequest | TokenizeRequest) -> tuple[int, ...]:
        """Encode a prompt, or messages with the header of the answer, and answer nothing.

        Raises:
            ApiError: As for `chat`; or there is neither prompt nor messages, or there are both.
        """
        self._require_model(ask.model)
        if isinstance(ask, CountTokensRequest):
            return self._encoded(ask.spoken()).ids
        if (ask.prompt is None) == (ask.messages is None):
            raise ApiError(
                400,
                "prompt and messages are two ways of asking; pass one of them.",
                param="prompt",
                code="invalid_value",
            )
        if ask.messages is not None:
            return self._encoded(_spoken(ask.messages)).ids
        with _refusing_prompts("prompt"):
            return self.engine.completion(ask.prompt or "").ids

    def policy(
        self,
        ask: SafetyOptions | None,
        *,
        is_structured: bool = False,
        is_shadow: bool = False,
    ) -> RowPolicy:
        """Return the operator's policy, tightened by a request.

        Args:
            ask: What the request says, or None.
            is_structured: Words of the guard would be read as data, so a trip stops the row.
            is_shadow: The operator wants trips told and not acted upon; a request that names a
                redirect of its own is guarded all the same.

        Raises:
            ApiError: The request would loosen the guard.
        """
        policy = tightened(self.engine, ask)
        if is_shadow and (ask is None or ask.redirect is None):
            return replace(policy, redirect="flag")
        if is_structured:
            return replace(policy, redirect=REDIRECTS[policy.redirect].if_structured)
        return policy

    @property
    def _sampling(self) -> SamplingReader:
        return SamplingReader(self.engine.facts, self.settings)

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

    def _encoded(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, object] | None = None,
        *,
        param: str = "messages",
    ) -> RowPrompt:
        with _refusing_prompts(param):
            return self.engine.chat(messages, variables=variables)


def unread_variables(
    ask: ChatCompletionRequest | ResponsesRequest, prompt: RowPrompt
) -> tuple[str, ...]:
    """Name what a request set of the template that the template does not read."""
    is_chat = isinstance(ask, ChatCompletionRequest)
    names = {_EFFORT: _EFFORT if is_chat else "reasoning.effort"}
    return tuple(
        names.get(name, f"chat_template_kwargs.{name}")
        for name, value in _variables(ask).items()
        if name not in prompt.variables and (name, value) != (_EFFORT, "none")
    )


def _variables(ask: ChatCompletionRequest | ResponsesRequest) -> dict[str, object]:
    if isinstance(ask, ChatCompletionRequest):
        effort, given = ask.reasoning_effort, ask.chat_template_kwargs or {}
    else:
        effort, given = ask.reasoning.effort if ask.reasoning is not None else None, {}
    return {**({} if effort is None else {_EFFORT: effort}), **given}


def _spoken(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.as_text(),
        }
        for message in messages
    ]


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
