"""What of a request the certificate covers, and what becomes of the rest: by setting, and told.

Knows what was certified, the room that the model has and the operator's settings. Does not know
how bodies are read. A request is never served otherwise than it asked without being told so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safe_decode.engines.interface import GuardFacts
from safe_decode.engines.rows import Adjustment, RowPrompt
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.settings import ServeSettings

__all__ = ["CapServed", "CoveredValues", "SamplingServed"]


@dataclass(frozen=True)
class CapServed:
    """How many tokens an answer may have.

    Attributes:
        tokens: So many.
        changes: That it is fewer than were asked for, and why.
    """

    tokens: int
    changes: tuple[Adjustment, ...] = ()


@dataclass(frozen=True)
class SamplingServed:
    """From which distribution tokens are drawn.

    Attributes:
        values: Of temperature, top_p, top_k and min_p.
        changes: That they are others than were asked for, and why.
    """

    values: Mapping[str, float]
    changes: tuple[Adjustment, ...] = ()


@dataclass(frozen=True)
class CoveredValues:
    """Compares requests with what was certified.

    Attributes:
        facts: What was certified.
        settings: The operator's.
    """

    facts: GuardFacts
    settings: ServeSettings

    def cap(
        self, asked: int | None, prompt: RowPrompt, *, holdback_tokens: int, param: str
    ) -> CapServed:
        """Decide how many tokens an answer may have.

        Args:
            asked: By the request; None: as many as are covered.
            prompt: Encoded; a supplied beginning counts.
            holdback_tokens: Unseen ones that are judged behind the cap.
            param: The field that asks.

        Raises:
            ApiError: It asks for more than is covered, and the operator refuses that.
        """
        covered = self._covered(prompt, holdback_tokens)
        limit, why = self.settings.max_new_tokens, "the operator's limit"
        if limit is None:
            limit = covered
            why = (
                f"the longest certificate covers {covered} tokens, and the unseen ones behind them"
            )
        room = self._room(prompt, holdback_tokens)
        mode = self.settings.cap_beyond_certificate
        if asked is None:
            return CapServed(max(1, limit if room is None else min(limit, room)))
        if asked > limit and mode == "refuse":
            raise _beyond(param, f"{asked}", f"{why}; ask for at most {limit}")
        is_open = mode == "void" and self.settings.max_new_tokens is None and room is not None
        tokens = asked if is_open else min(asked, limit)
        if room is not None and tokens > room:
            tokens, why = room, f"the model's context has room for {max(1, room)} tokens more"
        tokens = max(1, tokens)
        if tokens == asked:
            return CapServed(tokens)
        return CapServed(tokens, (Adjustment(param, asked, tokens, why),))

    def sampling(self, **asked: float | None) -> SamplingServed:
        """Decide from which distribution tokens are drawn; what is left open is as certified.

        Args:
            asked: temperature, top_p, top_k and min_p, as far as the interface has them.

        Raises:
            ApiError: It departs from what was certified, and the operator refuses that.
        """
        certified = self._certified
        given = {name: value for name, value in asked.items() if value is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0  # two ways of asking for all
        values = {**certified, **given}
        # Without draws nothing else is looked at.
        is_greedy = values["temperature"] == certified["temperature"] == 0
        departs = [
            name for name, value in given.items() if value != certified[name] and not is_greedy
        ]
        if departs and not certified["temperature"]:
            departs = ["temperature"]
        mode = self.settings.sampling_beyond_certificate
        if not departs or mode == "void":
            return SamplingServed(values)
        why = f"the certificate speaks of {self._in_words}"
        if mode == "refuse":
            name = departs[0]
            raise _beyond(name, f"{given[name]:g}", f"{why}; leave it out")
        changes = tuple(Adjustment(n, given[n], certified[n], why) for n in departs)
        return SamplingServed({**values, **{n: certified[n] for n in departs}}, changes)

    @property
    def _certified(self) -> dict[str, float]:
        envelope = self.facts.certificate.envelope
        return {
            "temperature": envelope.temperature if envelope.do_sample else 0.0,
            "top_p": envelope.top_p,
            "top_k": envelope.top_k,
            "min_p": float(json.loads(envelope.options.get("min_p", "0.0")) or 0.0),
        }

    @property
    def _in_words(self) -> str:
        certified = self._certified
        if not certified["temperature"]:
            return "greedy decoding"
        return ", ".join(f"{name} {value:g}" for name, value in certified.items())

    def _covered(self, prompt: RowPrompt, holdback_tokens: int) -> int:
        """Count the tokens that the longest certificate covers behind what was begun."""
        begun = prompt.prefill_tokens
        longest = self.facts.choice.of_call(self.facts.alpha, prefill_tokens=begun).envelope
        left = longest.max_new_tokens - holdback_tokens - begun
        # A beginning that is longer than what was certified voids, by name, whatever follows.
        return left if left > 0 else self.facts.certified_cap

    def _room(self, prompt: RowPrompt, holdback_tokens: int) -> int | None:
        context = self.facts.context_tokens
        # Behind the cap there must be room for what is looked at.
        return None if context is None else context - len(prompt.ids) - holdback_tokens


def _beyond(param: str, asked: str, why: str) -> ApiError:
    return ApiError(
        400,
        f"{param}={asked} is outside of what is certified: {why}.",
        param=param,
        code="invalid_value",
    )
