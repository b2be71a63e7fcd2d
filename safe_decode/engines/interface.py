"""What the server asks of an engine. Knows no engine.

An engine turns messages into ids and runs rows in batches, on the thread that calls it. It
never raises for a row: a row that fails ends closed, with a `Finished` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from safe_decode.bundle.summary import BundleSummary
from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import CertificateChoice
from safe_decode.decision import Redirect
from safe_decode.engines.rows import Row, RowPolicy, RowPrompt, RowRequest

__all__ = ["Engine", "GuardFacts", "StepTimes"]


@dataclass(frozen=True)
class GuardFacts:
    """What an engine's rows are guarded by.

    Attributes:
        bundle: Digest.
        choice: Of the operator's population, and what the bundle holds beside it.
        alpha: The operator's level.
        redirect: The operator's.
        holdback_tokens: The operator's.
        heads: Names of what the probe reads for.
        context_tokens: Positions the model has, or None.
        vocab_tokens: Ids that a prompt of ids may hold.
        summary: The bundle in a few words, its warnings among them; None: an engine without.
    """

    bundle: str
    choice: CertificateChoice
    alpha: float
    redirect: Redirect
    holdback_tokens: int
    heads: tuple[str, ...]
    context_tokens: int | None
    vocab_tokens: int
    summary: BundleSummary | None = None

    @property
    def certificates(self) -> Mapping[float, Certificate]:
        """Those of the operator's population and the largest cap, by alpha."""
        return self.choice.longest

    @property
    def certificate(self) -> Certificate:
        """The operator's certificate, of the largest cap."""
        return self.choice.of_call(self.alpha)

    def certificate_of(self, request: RowRequest) -> Certificate:
        """Return the certificate that decides for a row.

        A level that a request asks for may be certified for fewer caps than the operator's: of
        the two the lower threshold decides, so that asking never loosens the guard.
        """
        policy = request.policy
        asked = [
            self.choice.of_call(
                alpha,
                tokens=request.sampling.max_tokens + policy.holdback_tokens,
                prefill_tokens=request.prompt.prefill_tokens,
            )
            for alpha in (policy.alpha, self.alpha)
        ]
        return min(asked, key=lambda one: one.threshold)

    @property
    def certified_cap(self) -> int:
        """Largest cap that the certificate covers with the unseen tokens behind it."""
        return max(1, self.certificate.envelope.max_new_tokens - self.holdback_tokens)

    @property
    def policy(self) -> RowPolicy:
        """The operator's policy, which a request may only tighten."""
        return RowPolicy(self.alpha, self.redirect, self.holdback_tokens)


class Engine(Protocol):
    """Runs rows under a guard."""

    @property
    def facts(self) -> GuardFacts:
        """What the rows are guarded by."""
        ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, object] | None = None,
    ) -> RowPrompt:
        """Encode a conversation.

        Args:
            messages: With role and content.
            variables: Of the chat template. Those that it does not read are left out; the
                prompt says which it was made with.

        Raises:
            PromptError: It cannot be encoded, or leaves no room for an answer; or a variable is
                the template's own business.
        """
        ...

    def completion(self, prompt: str | Sequence[int]) -> RowPrompt:
        """Encode the beginning of a text, or take its ids.

        Raises:
            PromptError: It is empty, holds foreign ids, or leaves no room.
        """
        ...

    def token_text(self, token: int) -> str:
        """Return the text of one id on its own."""
        ...

    def admits(self, rows: Sequence[Row], row: Row) -> bool:
        """Say whether a row can run in one batch with others."""
        ...

    def run(self, rows: Sequence[Row]) -> StepTimes | None:
        """Run rows that admit each other to their ends; blocks. Several threads may call it.

        Returns:
            What the steps took; None if it failed, or does not say.
        """
        ...

    def has_changed(self) -> bool:
        """Say whether the model is another than the one that was wrapped.

        Asked before every run, so it is cheap. If it has, `check` runs before the row does. An
        engine that cannot tell says no, and the canary's interval finds the change.
        """
        ...

    def check(self) -> float:
        """Run the canary. Several threads may call it, beside runs.

        Returns:
            The largest difference of a logit.

        Raises:
            CanaryError: It does not yield what the bundle says.
        """
        ...

    def close(self) -> None:
        """Let go of threads and the like, once the rows have ended."""
        ...


@dataclass(frozen=True)
class StepTimes:
    """The steps of one run, in order.

    Attributes:
        step_s: Seconds from choice to choice; the first holds the prefill.
        guard_s: Of them, what probe, monitor and policy took; the last holds the closing forward.
    """

    step_s: list[float] = field(default_factory=list)
    guard_s: list[float] = field(default_factory=list)
