"""From what a caller asks for to a call that can run: checked, encoded, decided row by row.

Knows options, prompts, requests' policies, and what does not go together. Does not know how
a call runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import CertificateChoice
from safe_decode.decision import Redirect
from safe_decode.engines.transformers.call import GuardedCall
from safe_decode.engines.transformers.call_options import CallOptions
from safe_decode.engines.transformers.call_spec import CallMode, GuardedModel, RowSpec
from safe_decode.engines.transformers.capabilities import require_rows, require_supported
from safe_decode.engines.transformers.loops.whole_response import method_of
from safe_decode.engines.transformers.option_types import require_seed
from safe_decode.errors import ConfigurationError, PromptError, UnsupportedError
from safe_decode.policy.canned_texts import texts_of
from safe_decode.policy.policy import Policy, RequestPolicy
from safe_decode.policy.redirect import CannedTexts
from safe_decode.prompts.batch import PromptBatch, Prompts, from_embeds, from_ids, from_prompts
from safe_decode.typing import CausalLM

__all__ = ["GenerateRequest", "CallBuilder", "context_tokens"]


@dataclass(frozen=True)
class GenerateRequest:
    """What a caller asks for; see `SafeDecoder.generate` for the attributes."""

    prompts: Prompts | Tensor | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    prefill: str | Sequence[str | None] | None = None
    redirect: Redirect | None = None
    policy: RequestPolicy | Sequence[RequestPolicy | None] | None = None
    seed: int | Sequence[int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CallBuilder:
    """Makes the calls of one decoder.

    Attributes:
        protected: The model and its guard.
        policy: In force where a request says nothing else.
        certificate: In force where a request says nothing else; of the largest cap.
        choice: What each row's own is chosen from, by its cap and its prefill.
        texts: Canned texts where a request says nothing else.
        opener: Text of the opener.
        uses_header_check: Whether alarms are looked at by the bundle's own second stage.
    """

    protected: GuardedModel
    policy: Policy
    certificate: Certificate
    choice: CertificateChoice
    texts: CannedTexts
    opener: str
    uses_header_check: bool = False

    def call(self, asked: GenerateRequest) -> GuardedCall:
        """Check and encode everything before anything runs."""
        policy, seed = asked.policy, asked.seed
        options = CallOptions(self.protected, asked.options)
        is_installed = self.protected.tap.is_built_in
        require_seed(seed)
        require_supported(self.protected.model, options.given, is_installed=is_installed)
        inputs = self.inputs(asked)
        mode = self._mode(options, inputs, seed)
        require_rows(self.protected.model, inputs.attention_mask, mode.n_candidates)
        base = self.policy
        if asked.redirect is not None:
            base = replace(base, redirect=asked.redirect)
        requests = _one_each("policy", policy, len(inputs.scanned))
        for request in requests:
            if request is not None and not isinstance(request, RequestPolicy):
                raise ConfigurationError(
                    f"policy holds a {type(request).__name__}, wanted a RequestPolicy or None; "
                    "pass RequestPolicy(...)."
                )
        seeds = _one_each("seed", seed, len(inputs.scanned))
        # Looks are taken while a row is written, and from ids.
        looks = mode.method == "step" and inputs.embeds is None and self.uses_header_check
        width = inputs.attention_mask.shape[1]
        cap = options.cap(width)
        rules = [
            self._rules(
                base,
                request or RequestPolicy(),
                _spread(own, copy, mode.n_candidates),
                looks,
                cap,
                begun,
            )
            for request, own, begun in zip(requests, seeds, inputs.prefill_tokens, strict=True)
            for copy in range(mode.n_candidates)
        ]
        if inputs.embeds is not None:
            _require_plain(mode, rules, options)
        if seed is not None and options.get("output_scores"):
            raise UnsupportedError(
                "output_scores is refused with seed: rows draw for themselves, so recorded scores "
                "would be those of the draw; pass output_logits, or no seed."
            )
        rows = inputs.repeated(mode.n_candidates)
        given = options.for_generate()
        if "static" in (options.get("cache_implementation") or ""):
            n_ahead = max(rule.policy.unseen_tokens for rule in rules)
            if n_ahead:
                given["max_cache_len"] = options.places(width) + n_ahead
        if mode.method == "beams":
            # All beams come back, so that one that trips can give way to one that does not.
            given["num_return_sequences"] = mode.n_candidates
        return GuardedCall(self.protected, inputs, rows, rules, given, mode)

    def _mode(
        self, options: CallOptions, inputs: PromptBatch, seed: int | Sequence[int] | None
    ) -> CallMode:
        method = method_of(options.get)
        wanted = int(options.get("num_return_sequences") or 1)
        if method == "step":
            return CallMode(method, wanted, wanted)
        if seed is not None:
            raise UnsupportedError(
                "seed is refused with beams and assistants: they draw for the whole batch at "
                "once; call torch.manual_seed before generate."
            )
        if method == "beams":
            return CallMode(method, int(options.get("num_beams")), wanted)
        if len(inputs.scanned) > 1:
            raise UnsupportedError(
                f"assisted decoding is refused for {len(inputs.scanned)} prompts: transformers "
                "runs it on one; call generate once for each."
            )
        names = ("assistant_model", "assistant_tokenizer", "tokenizer")
        assistant = {
            name: options.given[name] for name in names if options.given.get(name) is not None
        }
        return CallMode(method, 1, 1, assistant)

    def inputs(self, asked: GenerateRequest) -> PromptBatch:
        """Encode what was asked for, as the model's `generate` gets it."""
        prompts, options, prefill = asked.prompts, asked.options, asked.prefill
        input_ids, attention_mask = asked.input_ids, asked.attention_mask
        model, tokenizer = self.protected.model, self.protected.tokenizer
        embeds = options.get("inputs_embeds")
        ids = options.get("inputs") if input_ids is None else input_ids
        if isinstance(prompts, Tensor) and ids is None:
            prompts, ids = None, prompts
        if embeds is not None and prompts is None and ids is None:
            return from_embeds(embeds, attention_mask).to(model.device)
        if (prompts is None) == (ids is None) or embeds is not None:
            raise PromptError("pass prompts, input_ids or inputs_embeds, exactly one of them.")
        if prompts is not None and not isinstance(prompts, Tensor):
            inputs = from_prompts(tokenizer, prompts, prefill, model.device)
        elif prefill is not None:
            raise ConfigurationError(
                "prefill goes with prompts; with input_ids, append the prefill's ids to them."
            )
        else:
            assert ids is not None
            inputs = from_ids(tokenizer, ids, attention_mask).to(model.device)
        inputs.require_room(self.protected.context_tokens)
        return inputs

    def rules_of(self, policy: Policy) -> RowSpec:
        """Return what holds for a row that asks for nothing, and takes no looks."""
        return self._rules(policy, RequestPolicy(), None, looks=False)

    def _rules(  # noqa: PLR0913
        self,
        base: Policy,
        request: RequestPolicy,
        seed: int | None,
        looks: bool,
        cap: int | None = None,
        prefill_tokens: int = 0,
    ) -> RowSpec:
        certificate, texts, bundle = self.certificate, self.texts, self.protected.bundle
        policy = request.applied_to(base)
        alpha = certificate.alpha if request.alpha is None else request.alpha
        # Second looks and reasoning have thresholds of their own, for the largest cap alone.
        if not looks and bundle.reasoning is None:
            certificate = self.choice.of_call(
                alpha,
                tokens=None if cap is None else cap + policy.unseen_tokens,
                prefill_tokens=prefill_tokens,
            )
        elif request.alpha is not None:
            certificate = self.choice.of_call(alpha)
        first = None
        if looks and bundle.header_check is not None:
            first = bundle.header_check.first_threshold
            certificate = bundle.header_check.certificate(certificate.alpha, certificate.dtype)
        reasoning = None
        if bundle.reasoning is not None:
            reasoning = bundle.reasoning.certificate(certificate.alpha, certificate.dtype)
        if request.refusal is not None:
            texts = texts_of(self.protected.tokenizer, request.refusal, self.opener)
        return RowSpec(policy, certificate, texts, seed, first, reasoning)


def context_tokens(model: CausalLM) -> int | None:
    """Read how many positions a model has; None if it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


_Each = TypeVar("_Each")


def _one_each(name: str, given: _Each | Sequence[_Each], n_prompts: int) -> list[_Each]:
    if not isinstance(given, (list, tuple)):
        return [given] * n_prompts  # type: ignore[list-item]  # any other sequence is no option
    if len(given) != n_prompts:
        raise ConfigurationError(
            f"{name} has {len(given)} entries for {n_prompts} prompts; pass one each."
        )
    return list(given)


def _spread(seed: int | None, copy: int, n_copies: int) -> int | None:
    # Sequences of one prompt are to differ; a prompt's first one is that of the seed itself.
    return seed if seed is None or n_copies == 1 else seed + copy


def _require_plain(mode: CallMode, rules: Sequence[RowSpec], options: CallOptions) -> None:
    """Refuse what inputs_embeds cannot be combined with."""
    resumed = next((rule.policy for rule in rules if rule.policy.rule.resumes), None)
    if resumed is not None:
        raise UnsupportedError(
            f"redirect={resumed.redirect!r} is refused with inputs_embeds: a continuation starts "
            "from ids; pass redirect='refuse', 'stop' or 'flag', or input_ids."
        )
    given, cache = options.given, options.get("cache_implementation") or ""
    keeps = given.get("past_key_values") is not None or "static" in cache
    if mode.method != "step" or keeps or given.get("return_dict_in_generate"):
        raise UnsupportedError(
            "inputs_embeds is refused with beams, assistants, static or returned caches and "
            "past_key_values: the answer's tail is judged from ids there; pass input_ids."
        )
