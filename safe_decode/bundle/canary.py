"""A known prompt with known scores: refuse to serve when they differ.

Catches what a fingerprint cannot: kernels, compilation, engines and hooks that change or
skip what the probe reads. Knows one conversation and its logits. Does not know thresholds
or decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_decode.activations.tap import ActivationTap
from safe_decode.errors import BeatError, CanaryError, ConfigurationError
from safe_decode.probe.interface import Probe
from safe_decode.prompts.chat import encode_chat
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["CanaryRecord"]


@dataclass(frozen=True, eq=False)
class CanaryRecord:
    """A conversation and the logits it yields on the model the bundle was made for.

    Attributes:
        prompt: What the user says.
        response: What the model is made to have said.
        ids: Both in the chat template.
        turn_start: Index of the response's first token.
        logits: [T + 1, K] float32 on the CPU, s_0 first, for T tokens of the response.
        tolerance: Largest absolute difference of a logit; above 0 since kernels differ in
            rounding.

    Raises:
        ConfigurationError: Shapes, the tolerance or the logits are impossible.
    """

    prompt: str
    response: str
    ids: tuple[int, ...]
    turn_start: int
    logits: Tensor
    tolerance: float

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        n_scores = len(self.ids) - self.turn_start + 1
        if not 0 < self.turn_start <= len(self.ids) or self.logits.shape[:1] != (n_scores,):
            raise ConfigurationError(
                f"logits of the canary are {tuple(self.logits.shape)} for {len(self.ids)} ids with "
                f"turn_start={self.turn_start}, wanted [{n_scores}, K]; record the canary again."
            )
        if not 0.0 < self.tolerance < float("inf") or not bool(self.logits.isfinite().all()):
            raise ConfigurationError(
                f"tolerance={self.tolerance} and the canary's logits must be finite and tolerance "
                "above 0; record the canary again."
            )

    @classmethod
    def of(
        cls,
        model: CausalLM,
        tokenizer: Tokenizer,
        probe: Probe,
        *,
        prompt: str,
        response: str,
        tolerance: float,
    ) -> CanaryRecord:
        """Record a canary with one forward.

        Args:
            model: The model the bundle is made for, in eval mode.
            tokenizer: Its tokenizer.
            probe: On the device of the model's sites.
            prompt: What the user says.
            response: What the model is made to have said.
            tolerance: See the class.

        Raises:
            PromptError: The texts cannot be encoded.
            ConfigurationError: The logits are not finite.
        """
        chat = encode_chat(tokenizer, prompt, prefill=response)
        logits = _scores(model, probe, chat.ids, chat.turn_start)
        return cls(prompt, response, chat.ids, chat.turn_start, logits, tolerance)

    def run(self, model: CausalLM, tokenizer: Tokenizer, probe: Probe) -> float:
        """Compare the model at hand with the record, by one forward.

        Args:
            model: In eval mode.
            tokenizer: Its tokenizer.
            probe: The bundle's, on the device of the model's sites.

        Returns:
            The largest absolute difference of a logit.

        Raises:
            CanaryError: Other ids, no score, a score that is not finite, or a difference
                above the tolerance.
        """
        chat = encode_chat(tokenizer, self.prompt, prefill=self.response)
        if (chat.ids, chat.turn_start) != (self.ids, self.turn_start):
            raise CanaryError(
                f"the canary's texts encode to {len(chat.ids)} ids, turn at {chat.turn_start}, "
                f"wanted the {len(self.ids)} recorded ones, turn at {self.turn_start}; use the "
                "tokenizer and chat template the bundle was made for."
            )
        try:
            logits = _scores(model, probe, self.ids, self.turn_start)
        except BeatError as error:
            raise CanaryError(f"the canary's forward yields no scores: {error}") from error
        if logits.shape != self.logits.shape:
            raise CanaryError(
                f"the canary yields scores {tuple(logits.shape)}, wanted "
                f"{tuple(self.logits.shape)}; use the bundle's own probe."
            )
        difference = (logits - self.logits).abs().amax(dim=-1)
        worst = int(difference.nan_to_num(nan=torch.inf).argmax())
        if not bool((difference <= self.tolerance).all()):  # NaN is not <= anything
            raise CanaryError(
                f"score {worst} of the canary differs by {float(difference[worst]):.3g}, wanted at "
                f"most {self.tolerance:.3g}; this model, engine or dtype does not compute what the "
                "bundle was made for."
            )
        return float(difference[worst])


def _scores(model: CausalLM, probe: Probe, ids: tuple[int, ...], turn_start: int) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad(), ActivationTap(model, probe.sites).listening() as beats:
        beats.keep_last(len(ids) - turn_start + 1)
        model(input_ids=torch.tensor([ids], device=device), use_cache=False)
        return probe(beats.take()[0]).cpu()
