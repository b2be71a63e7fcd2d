"""A model and its bundle, checked against each other: what every guarded call stands on.

Knows the model, what guards it, and whether it is still the one its bundle was made for. Does not
know how a call is composed or run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from safe_decode.activations.compiled.forward_patch import uncompiled
from safe_decode.activations.tap import ActivationTap
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.seal import ModelSeal
from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import CertificateChoice
from safe_decode.decision import Redirect
from safe_decode.engines.transformers.call_spec import GuardedModel
from safe_decode.engines.transformers.capabilities import require_supported_model
from safe_decode.engines.transformers.frames import ModelFace
from safe_decode.engines.transformers.request import context_tokens
from safe_decode.errors import (
    CanaryError,
    ConfigurationError,
    PromptError,
)
from safe_decode.policy.canned_texts import texts_of
from safe_decode.policy.policy import OnError, Policy
from safe_decode.policy.self_check import SelfCheck
from safe_decode.prompts import chat
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["WrappedModel", "as_ids"]


class WrappedModel(ModelFace):
    """Wraps a model and its bundle.

    Args:
        model: A Hugging Face causal language model in eval mode. Changed only inside
            `installed()`, which compiled models need. Of `torch.compile(model)` the original
            is taken, since that is what its `generate` runs.
        tokenizer: Its tokenizer.
        bundle: Made for this model; its fingerprint is checked here.
        redirect: What a tripped row emits, see `Redirect`.
        alpha: Level of the certificate whose threshold is used; None: the bundle's default.
        population: Whose certificate that is: of the harmless responses that a deployment mostly
            gives. A service that lets clients begin answers wants the one of begun answers.
        holdback_tokens: k of the release rule; None: the bundle's.
        refusal: Canned text; None: the bundle's.
        opener: What a rewound answer begins with; None: the bundle's.
        on_error: What happens to a row whose guard fails, see `OnError`.
        strict: Refuse calls outside the certificate's envelope instead of voiding it.
        self_check: Looks again when a row alarms, and may clear it; None: every alarm trips.
            "bundle": the one made and certified with the bundle, first threshold included.
            Not in continuations after a rewind, with beams, drafts or embeddings.

    Raises:
        FingerprintMismatchError: The bundle was made for another model or tokenizer, or is not
            certified in the model's dtype.
        CertificateError: `alpha` is not certified for `population`.
        ConfigurationError: A value outside its choices, an empty refusal or opener, or a
            self-check that the bundle does not have.
        UnsupportedError: The model cannot be guarded.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        bundle: ProbeBundle,
        *,
        redirect: Redirect = "rewind",
        alpha: float | None = None,
        population: str = "benign",
        holdback_tokens: int | None = None,
        refusal: str | None = None,
        opener: str | None = None,
        on_error: OnError = "close",
        strict: bool = False,
        self_check: SelfCheck | Literal["bundle"] | None = None,
    ) -> None:
        model = uncompiled(model)
        require_supported_model(model, is_installed=True)  # calls see whether they are
        self._measured = bundle.measured_as(Fingerprint.of(model, tokenizer))
        self._seal = ModelSeal(model, tokenizer, self._measured.fingerprint)
        # As wrapped: what a certificate without a record of its end ids is compared with.
        self.own_ends = as_ids(getattr(model.generation_config, "eos_token_id", None))
        self.model, self.tokenizer, self.bundle, self.strict = model, tokenizer, bundle, strict
        self.policy = Policy(
            redirect=redirect,
            holdback_tokens=bundle.holdback_tokens if holdback_tokens is None else holdback_tokens,
            on_error=on_error,
        )
        dtype = self._measured.dtype
        self.certificate: Certificate = _certificate(bundle, alpha, population, dtype, self_check)
        self.choice = CertificateChoice(bundle.certificates, population, dtype)
        self.refusal = bundle.refusal if refusal is None else refusal
        self.opener = bundle.opener if opener is None else opener
        self._texts = texts_of(tokenizer, self.refusal, self.opener)
        self._probe = bundle.probe.to(model.device)
        self._tap = ActivationTap(model, bundle.probe.sites)
        self._marks = None if bundle.reasoning is None else bundle.reasoning.marks(tokenizer)
        self._self_check = None
        self._uses_header_check = self_check == "bundle"
        if self_check == "bundle":
            self_check = _own_check(bundle, self.certificate)
        if self_check is not None:
            check = replace(self_check, probe=self_check.probe.to(model.device))
            tap = ActivationTap(model, check.probe.sites)
            self._self_check = (check, tap, chat.assistant_header(tokenizer))

    @property
    def protected(self) -> GuardedModel:
        """The model and its guard, for whoever runs rows on it."""
        return GuardedModel(
            model=self.model,
            tokenizer=self.tokenizer,
            bundle=self.bundle,
            tap=self._tap,
            probe=self._probe,
            strict=self.strict,
            context_tokens=context_tokens(self.model),
            self_check=self._self_check,
            marks=self._marks,
            own_ends=self.own_ends,
        )

    @property
    def certified_cap(self) -> int:
        """Largest `max_new_tokens` that the certificate covers with the unseen tokens behind it."""
        certified = self.certificate.envelope.max_new_tokens
        return max(1, certified - self.policy.unseen_tokens)

    def require_unchanged(self) -> None:
        """Check that the model is still the one its bundle was made for; each call does so.

        Compares cheap signs (which tensors stand where, how often they were written to, a few
        values of each, adapters, configuration, template, vocabulary), and takes the fingerprint
        anew where one has moved. What that does not see, such as hooks, the canary does.

        Raises:
            FingerprintMismatchError: Weights, adapters, dtype, device, configuration, template or
                vocabulary have changed since the model was wrapped; all that have are named.
            UnsupportedError: A module is in training mode.
        """
        self._seal.require()

    def score(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[Tensor]:
        """Score finished responses, teacher-forced, at the positions used while generating.

        Args:
            conversations: Each a list of messages that ends with the assistant's.

        Returns:
            For each, logits [T + 1, K] float32 on the CPU for a response of T tokens.

        Raises:
            PromptError: The last message is not the assistant's.
            FingerprintMismatchError: As for `require_unchanged`.
        """
        self.require_unchanged()
        require_supported_model(self.model, is_installed=self._tap.is_built_in)
        scores = []
        for messages in conversations:
            if not messages or messages[-1].get("role") != "assistant":
                raise PromptError(
                    "a conversation to score must end with the assistant's message; append the "
                    "response as {'role': 'assistant', 'content': ...}."
                )
            # A last message of the assistant is encoded as an open turn, as while generating.
            encoded = chat.encode_chat(self.tokenizer, messages)
            ids = torch.tensor([list(encoded.ids)], device=self.model.device)
            with self._tap.listening() as beats, torch.no_grad():
                beats.keep_last(encoded.prefill_tokens + 1)
                self.model(input_ids=ids, use_cache=False)
                scores.append(self._probe(beats.take())[0].cpu())
        return scores

    def check(self) -> float:
        """Run the bundle's canary: one forward, compared with what the bundle recorded.

        Returns:
            The largest absolute difference of a logit.

        Raises:
            CanaryError: The bundle has none, or this model does not yield what it says.
            FingerprintMismatchError: As for `require_unchanged`.
        """
        self.require_unchanged()
        canary = self._measured.canary
        if canary is None:
            raise CanaryError(
                "the bundle has no canary, so nothing shows that this model is read as it was "
                "certified; record one with CanaryRecord.of, or make the bundle anew."
            )
        return canary.run(self.model, self.tokenizer, self._probe)


def _certificate(
    bundle: ProbeBundle,
    alpha: float | None,
    population: str,
    dtype: str,
    self_check: SelfCheck | Literal["bundle"] | None,
) -> Certificate:
    certificate = bundle.certificate(alpha, population, dtype)
    further = {"self_check='bundle'": self_check == "bundle", "reasoning": bundle.reasoning}
    asked = [name for name, there in further.items() if there]
    if population != "benign" and asked:
        raise ConfigurationError(
            f"population={population!r} is refused with {asked[0]}: its thresholds are certified "
            "for 'benign' responses alone; pass population='benign'."
        )
    if bundle.reasoning is not None:
        bundle.reasoning.certificate(certificate.alpha, certificate.dtype)  # now, not mid-call
    return certificate


def _own_check(bundle: ProbeBundle, certificate: Certificate) -> SelfCheck:
    if bundle.header_check is None:
        raise ConfigurationError(
            "self_check='bundle' wants a bundle with a self-check, and this one has none; fit one "
            "with probes.recipes.self_check, or pass self_check=None or a SelfCheck."
        )
    if bundle.reasoning is not None:
        raise ConfigurationError(
            "self_check='bundle' is refused where the bundle has thresholds for reasoning: they "
            "were not certified together; pass self_check=None."
        )
    return bundle.header_check.settings(certificate.alpha, certificate.dtype)


def as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Take one id or several; in ascending order."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(sorted(int(one) for one in value))
