"""SafeDecoder: a model that re-checks itself before every token.

Knows how a call is composed: options checked, prompts encoded, the batch run under a
session, tripped rows redirected, texts and traces handed back. Does not know hooks,
monitors' arithmetic or module names. A decoder holds no state of a call; calls in several
threads on one model do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safe_decode import chat
from safe_decode.bundle import ProbeBundle
from safe_decode.capabilities import require_supported, require_supported_model
from safe_decode.certificate import Certificate
from safe_decode.decision import Redirect
from safe_decode.errors import (
    CertificateError,
    ConfigurationError,
    PromptError,
    UnsupportedError,
)
from safe_decode.fingerprint import Fingerprint
from safe_decode.inputs import GuardInputs, Prompts, from_ids, from_prompts
from safe_decode.loop import CallSettings, GuardedLoop
from safe_decode.monitor import RiskMonitor
from safe_decode.outcome import BareEnd, Judgement, LazyTraces, Outcome, outcome_of, void_reason
from safe_decode.policy import OnError, Policy
from safe_decode.rewind import Rewinder, Texts
from safe_decode.session import Session
from safe_decode.taps import ActivationTap, Beats
from safe_decode.trace import SafetyTrace

if TYPE_CHECKING:
    from safe_decode.processor import GuardedSteps

__all__ = ["GuardHandle", "GuardedOutput", "SafeDecoder"]

_CUT = " ... "


@dataclass
class GuardedOutput:
    """What a guarded call returns.

    Attributes:
        sequences: [batch, seq] ids: the user's prompt ids, then what stands of the answer,
            right-padded. Rows that did not trip are as bare `generate` returns them.
        texts: What the reader gets: the released answer and its refusal, without the prompt
            and without a supplied prefill.
        traces: What happened in each row, and why; written when first read.
    """

    sequences: Tensor
    texts: list[str]
    traces: Sequence[SafetyTrace]


class GuardHandle:
    """The guard in a user's own `model.generate`; see `SafeDecoder.processor`.

    Attributes:
        logits_processor: Goes last into `logits_processor=[...]`.
        stopping_criteria: Goes into `stopping_criteria=[...]`.
        traces: One a row, filled when the context ends.
    """

    def __init__(self, logits_processor: Any, stopping_criteria: Any) -> None:  # noqa: ANN401
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.traces: list[SafetyTrace] = []


class SafeDecoder:
    """Wraps a model and its bundle.

    Args:
        model: A Hugging Face causal language model, eager, in eval mode. Not changed.
        tokenizer: Its tokenizer.
        bundle: Made for this model; its fingerprint is checked here.
        redirect: What a tripped row emits, see `Redirect`.
        alpha: Level of the certificate whose threshold is used; None: the bundle's default.
        holdback_tokens: k of the release rule; None: the bundle's.
        refusal: Canned text; None: the bundle's.
        opener: What a rewound answer begins with; None: the bundle's.
        on_error: What happens to a row whose guard fails, see `OnError`.
        strict: Refuse calls outside the certificate's envelope instead of voiding it.

    Raises:
        FingerprintMismatchError: The bundle was made for another model or tokenizer.
        CertificateError: `alpha` is not certified.
        ConfigurationError: A value outside its choices, or an empty refusal or opener.
        UnsupportedError: The model cannot be guarded.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - duck-typed
        tokenizer: Any,  # noqa: ANN401 - duck-typed
        bundle: ProbeBundle,
        *,
        redirect: Redirect = "rewind",
        alpha: float | None = None,
        holdback_tokens: int | None = None,
        refusal: str | None = None,
        opener: str | None = None,
        on_error: OnError = "close",
        strict: bool = False,
    ) -> None:
        require_supported_model(model)
        bundle.fingerprint.require(Fingerprint.of(model, tokenizer))
        self.model, self.tokenizer, self.bundle, self.strict = model, tokenizer, bundle, strict
        self.policy = Policy(
            redirect=redirect,
            holdback_tokens=bundle.holdback_tokens if holdback_tokens is None else holdback_tokens,
            on_error=on_error,
        )
        self.certificate: Certificate = bundle.certificate(alpha)
        self.refusal = bundle.refusal if refusal is None else refusal
        self.opener = bundle.opener if opener is None else opener
        self._texts = _texts_of(tokenizer, self.refusal, self.opener)
        self._probe = bundle.probe.to(model.device)
        self._tap = ActivationTap(model, bundle.probe.sites)

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefill: str | Sequence[str | None] | None = None,
        redirect: Redirect | None = None,
        **generate_kwargs: Any,  # noqa: ANN401 - those of model.generate
    ) -> GuardedOutput:
        """Generate under the guard.

        Args:
            prompts: A string, several, a conversation (list of messages) or several;
                encoded with the chat template.
            input_ids: Instead of prompts, [batch, seq] ids as for `model.generate`.
            attention_mask: [batch, seq] for `input_ids`.
            prefill: The beginning of the answer, one for all prompts or one each.
            redirect: For this call, instead of the decoder's.
            **generate_kwargs: As for `model.generate`; see `capabilities.TABLE`.

        Raises:
            UnsupportedError: An option that would skip the guard, before the first token.
            PromptError: A prompt that is empty, too long or cannot be encoded.
            CertificateError: With `strict`, a call outside the certified envelope.
        """
        require_supported(self.model, generate_kwargs)
        inputs = self._inputs(prompts, input_ids, attention_mask, prefill, generate_kwargs)
        rows = inputs.repeated(int(self._option("num_return_sequences", generate_kwargs) or 1))
        policy = self._policy(redirect)
        options = self._options(generate_kwargs)
        with self._tap.listening() as beats, torch.no_grad():
            session = self._session(policy, beats, rows)
            loop = GuardedLoop(session, require=lambda settings: self._require(settings, rows))
            sequences: Tensor = self.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                custom_generate=loop,
                **options,
            )
        assert loop.settings is not None
        rewinder = self._rewinder(policy, loop.settings, options)
        outcomes = self._outcomes(session, loop, sequences, rows, rewinder)
        return self._output(sequences, outcomes, rows, policy, loop.settings)

    @contextmanager
    def processor(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        redirect: Redirect = "refuse",
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[GuardHandle]:
        """Guard a `model.generate` of your own.

        The processor goes last into `logits_processor`, the criterion into
        `stopping_criteria`. Tokens that stand cannot be taken back: rewind is refused.

        Args:
            input_ids: [batch, seq] that `generate` is given.
            attention_mask: [batch, seq] that `generate` is given.
            redirect: refuse, stop or flag.
            num_return_sequences: As given to `generate`.
            eos_token_id: As given to `generate`; None: the model's own.

        Yields:
            The handle; its traces are filled when the context ends.

        Raises:
            UnsupportedError: redirect="rewind", a model that cannot be guarded, or one whose
                own generation configuration holds a refused option.
            BeatError: At the end: forwards passed that the processor never judged.
        """
        from safe_decode.processor import (
            GuardedSteps,
            SafetyLogitsProcessor,
            SafetyStoppingCriteria,
        )

        if redirect == "rewind":
            raise UnsupportedError(
                "redirect='rewind' is refused: a processor cannot take tokens back; use "
                "decoder.generate, or pass redirect='refuse', 'stop' or 'flag'."
            )
        require_supported(self.model, {})
        inputs = from_ids(self.tokenizer, input_ids, attention_mask)
        rows = inputs.repeated(num_return_sequences)
        policy = self._policy(redirect)
        ends = _as_ids(self._option("eos_token_id", {"eos_token_id": eos_token_id}))
        pad = self._option("pad_token_id", {})
        with self._tap.listening() as beats:
            session = self._session(policy, beats, rows)
            steps = GuardedSteps(
                session,
                prompt_tokens=input_ids.shape[1],
                refusal_ids=self._texts.refusal,
                refusal_after_ids=self._texts.refusal_after,
                end_ids=ends,
                pad_id=pad,
            )
            handle = GuardHandle(SafetyLogitsProcessor(steps), SafetyStoppingCriteria(steps))
            yield handle
            try:
                steps.finish()
            finally:
                handle.traces = self._bare_traces(steps, rows)

    def score(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[Tensor]:
        """Score finished responses, teacher-forced, at the positions used while generating.

        Args:
            conversations: Each a list of messages that ends with the assistant's.

        Returns:
            For each, logits [T + 1, K] float32 on the CPU for a response of T tokens.

        Raises:
            PromptError: The last message is not the assistant's.
        """
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

    def _inputs(
        self,
        prompts: Prompts | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        prefill: str | Sequence[str | None] | None,
        options: Mapping[str, Any],
    ) -> GuardInputs:
        ids = options.get("inputs") if input_ids is None else input_ids
        if (prompts is None) == (ids is None):
            raise PromptError("pass either prompts or input_ids, exactly one of them.")
        if prompts is not None:
            inputs = from_prompts(self.tokenizer, prompts, prefill, self.model.device)
        elif prefill is not None:
            raise ConfigurationError(
                "prefill goes with prompts; with input_ids, append the prefill's ids to them."
            )
        else:
            assert ids is not None
            inputs = from_ids(self.tokenizer, ids, attention_mask).to(self.model.device)
        inputs.require_room(_context_tokens(self.model))
        return inputs

    def _policy(self, redirect: Redirect | None) -> Policy:
        return self.policy if redirect is None else replace(self.policy, redirect=redirect)

    def _session(self, policy: Policy, beats: Beats, rows: GuardInputs) -> Session:
        return Session(
            probe=self._probe,
            monitor=RiskMonitor(self.bundle.monitor, self.certificate.threshold),
            policy=policy,
            beats=beats,
            scanned=rows.scanned,
            device=self.model.device,
        )

    def _option(self, name: str, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Read an option as `generate` does: argument, given configuration, model's own."""
        configs = (options.get("generation_config"), self.model.generation_config)
        values = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options = {
            key: value
            for key, value in given.items()
            if key not in ("tokenizer", "inputs", "custom_generate", "trust_remote_code")
        }
        stop_strings = self._option("stop_strings", given)
        if stop_strings is not None:
            # generate keeps its tokenizer from a callable custom_generate, so the criterion is
            # built here.
            from transformers import StopStringCriteria

            criteria = list(given.get("stopping_criteria") or ())
            criteria.append(StopStringCriteria(self.tokenizer, stop_strings))
            options |= {"stop_strings": None, "stopping_criteria": criteria}
        return options

    def _require(self, settings: CallSettings, rows: GuardInputs) -> None:
        reasons = [
            void_reason(self.certificate, settings, is_chat=is_chat) for is_chat in rows.is_chat
        ]
        reason = next((reason for reason in reasons if reason is not None), None)
        if self.strict and reason is not None:
            raise CertificateError(
                f"the call is outside the certified envelope: {reason}; stay inside it, certify "
                "for it, or pass strict=False."
            )

    def _rewinder(
        self, policy: Policy, settings: CallSettings, options: Mapping[str, Any]
    ) -> Rewinder:
        alone = {"num_return_sequences": 1, "max_length": None}
        free = {"min_new_tokens": None, "min_length": 0}
        return Rewinder(
            model=self.model,
            tap=self._tap,
            probe=self._probe,
            config=self.bundle.monitor,
            threshold=self.certificate.threshold,
            policy=policy,
            texts=self._texts,
            settings=settings,
            options={**options, **alone, **free},
            context_tokens=_context_tokens(self.model),
        )

    def _outcomes(
        self,
        session: Session,
        loop: GuardedLoop,
        sequences: Tensor,
        rows: GuardInputs,
        rewinder: Rewinder,
    ) -> list[Outcome]:
        width = rows.input_ids.shape[1]
        ids = sequences.tolist()
        return [
            outcome_of(
                record,
                row=row,
                prompt=rows.prompt_ids(row),
                prefill_tokens=rows.prefill_tokens[row],
                said=ids[row][width : width + loop.ended_at[row]],
                rewinder=rewinder,
            )
            for row, record in enumerate(session.records())
        ]

    def _output(
        self,
        sequences: Tensor,
        outcomes: Sequence[Outcome],
        rows: GuardInputs,
        policy: Policy,
        settings: CallSettings,
    ) -> GuardedOutput:
        width = rows.input_ids.shape[1]
        longest = max(len(outcome.ids) for outcome in outcomes)
        whole = sequences.new_full((len(outcomes), width + longest), settings.pad_id or 0)
        whole[:, :width] = sequences[:, :width]
        for row, outcome in enumerate(outcomes):
            whole[row, width : width + len(outcome.ids)] = sequences.new_tensor(outcome.ids)
        voids = [
            void_reason(self.certificate, settings, is_chat=is_chat) for is_chat in rows.is_chat
        ]
        return GuardedOutput(
            sequences=whole,
            texts=[self._text(outcome.ids) for outcome in outcomes],
            traces=LazyTraces(self._judgement(policy), list(zip(outcomes, voids, strict=True))),
        )

    def _judgement(self, policy: Policy) -> Judgement:
        bundle = self.bundle
        return Judgement(
            bundle=bundle.digest,
            heads=bundle.probe.heads,
            low_mark=bundle.monitor.low_mark,
            certificate=self.certificate,
            policy=policy,
        )

    def _bare_traces(self, steps: GuardedSteps, rows: GuardInputs) -> list[SafetyTrace]:
        """Write the traces of a foreign loop; its settings are unknown, so is the envelope."""
        judgement = self._judgement(steps.session.policy)
        void = "the options of a foreign generate are not seen"
        return [
            judgement.trace(
                Outcome(
                    record=record,
                    prompt=tuple(rows.prompt_ids(row)),
                    prefill_tokens=rows.prefill_tokens[row],
                    said=steps.said(row),
                    ids=steps.said(row),
                    bare=BareEnd(
                        is_truncated=steps.is_truncated(row),
                        unscored_tail=steps.unscored_tail(row),
                    ),
                ),
                void,
            )
            for row, record in enumerate(steps.session.records())
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _texts_of(tokenizer: Any, refusal: str, opener: str) -> Texts:  # noqa: ANN401
    for name, text in (("refusal", refusal), ("opener", opener)):
        if not text.strip():
            raise ConfigurationError(f"{name}={text!r} is empty; pass a text that readers get.")
    # Canned text may follow a cut in the middle of a sentence: readers see that there is one.
    return Texts(
        refusal=chat.text_ids(tokenizer, refusal),
        refusal_after=chat.text_ids(tokenizer, _CUT + refusal),
        opener=chat.text_ids(tokenizer, opener),
        opener_after=chat.text_ids(tokenizer, _CUT + opener),
    )


def _context_tokens(model: Any) -> int | None:  # noqa: ANN401
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
