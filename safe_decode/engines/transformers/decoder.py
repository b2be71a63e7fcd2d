"""SafeDecoder: a model that re-checks itself before every token.

Knows how a call is composed: options checked, prompts encoded, the batch run under a
session, tripped rows redirected, texts and traces handed back. Does not know hooks,
monitors' arithmetic or module names. A decoder holds no state of a call; calls in several
threads on one model do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from safe_decode.activations.compiled.forward_patch import uncompiled
from safe_decode.activations.tap import ActivationTap
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.seal import ModelSeal
from safe_decode.certificate import Certificate
from safe_decode.decision import Redirect
from safe_decode.engines.transformers.call import GuardedCall
from safe_decode.engines.transformers.call_spec import GuardedModel, StreamSink
from safe_decode.engines.transformers.capabilities import require_supported, require_supported_model
from safe_decode.engines.transformers.external_generate import GuardHandle, guarded
from safe_decode.engines.transformers.output import GuardedOutput
from safe_decode.engines.transformers.request import (
    CallBuilder,
    GenerateRequest,
    context_tokens,
    texts_of,
)
from safe_decode.errors import (
    CanaryError,
    CertificateError,
    ConfigurationError,
    PromptError,
    UnsupportedError,
)
from safe_decode.policy.policy import OnError, Policy, RequestPolicy
from safe_decode.policy.self_check import SelfCheck
from safe_decode.prompts import chat
from safe_decode.prompts.batch import PromptBatch, Prompts, from_ids
from safe_decode.streaming.events import StreamEvent
from safe_decode.streaming.hf_streamer import Streamer, feeder
from safe_decode.streaming.reader import AsyncGuardedStream, GuardedStream, Producer
from safe_decode.trace.writer import TraceWriter
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["GuardHandle", "GuardedOutput", "SafeDecoder"]


class SafeDecoder:
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
        FingerprintMismatchError: The bundle was made for another model or tokenizer.
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
        bundle.fingerprint.require(Fingerprint.of(model, tokenizer))
        self._seal = ModelSeal(model, tokenizer, bundle.fingerprint)
        # As wrapped: what a certificate without a record of its end ids is compared with.
        self.own_ends = _as_ids(getattr(model.generation_config, "eos_token_id", None))
        self.model, self.tokenizer, self.bundle, self.strict = model, tokenizer, bundle, strict
        self.policy = Policy(
            redirect=redirect,
            holdback_tokens=bundle.holdback_tokens if holdback_tokens is None else holdback_tokens,
            on_error=on_error,
        )
        self.certificate: Certificate = _certificate(bundle, alpha, population, self_check)
        self.refusal = bundle.refusal if refusal is None else refusal
        self.opener = bundle.opener if opener is None else opener
        self._texts = texts_of(tokenizer, self.refusal, self.opener)
        self._probe = bundle.probe.to(model.device)
        self._tap = ActivationTap(model, bundle.probe.sites)
        self._marks = None if bundle.reasoning is None else bundle.reasoning.marks(tokenizer)
        self._self_check = None
        self._uses_header_check = self_check == "bundle"
        if self_check == "bundle":
            self_check = _own_check(bundle, self.certificate.alpha)
        if self_check is not None:
            check = replace(self_check, probe=self_check.probe.to(model.device))
            tap = ActivationTap(model, check.probe.sites)
            self._self_check = (check, tap, chat.assistant_header(tokenizer))

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefill: str | Sequence[str | None] | None = None,
        redirect: Redirect | None = None,
        policy: RequestPolicy | Sequence[RequestPolicy | None] | None = None,
        seed: int | Sequence[int] | None = None,
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
            policy: What the request asks for, from its metadata: one for all prompts or one
                each. Levels, redirects, hold-backs and refusals may differ within a batch.
            seed: Draws each row from a generator of its own, so that its tokens do not depend
                on the batch; one for all prompts or one each. None: the global generator, as
                bare `generate` does.
            **generate_kwargs: As for `model.generate`; see `capabilities.TABLE`. A `streamer` is
                ended whatever happens, a refusal of the call included.

        Raises:
            UnsupportedError: An option that would skip the guard, before the first token.
            PromptError: A prompt that is empty, too long or cannot be encoded.
            CertificateError: With `strict`, a call outside the certified envelope.
            FingerprintMismatchError: As for `require_unchanged`.
        """
        streamer = generate_kwargs.get("streamer")
        with _ended(streamer):
            call = self._call(
                prompts,
                input_ids=input_ids,
                attention_mask=attention_mask,
                prefill=prefill,
                redirect=redirect,
                policy=policy,
                seed=seed,
                options=generate_kwargs,
            )
            return call.run() if streamer is None else _streamed(call, streamer)

    def stream(
        self,
        prompts: Prompts | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefill: str | Sequence[str | None] | None = None,
        policy: RequestPolicy | Sequence[RequestPolicy | None] | None = None,
        seed: int | Sequence[int] | None = None,
        includes_stop: bool = True,
        **generate_kwargs: Any,  # noqa: ANN401 - those of model.generate
    ) -> GuardedStream:
        """Generate under the guard and yield what may be shown as soon as it may be.

            with decoder.stream(messages, generation_config=config, seed=7) as stream:
                for event in stream:
                    match event:
                        case Released() | GuardText():  # show event.text
                            ...
                        case Tripped():  # what was shown stands; the guard's words follow
                            ...
                        case Ended():  # event.finish_reason, event.text, event.trace
                            ...

        The model runs in a thread of its own and starts at once. Bad input is refused here,
        before it starts; an error of the running call is raised by the iterator. Tokens,
        texts and traces are those of `generate` with the same arguments. A token is shown
        when it and the next k (`holdback_tokens`) have been judged, or when the row has ended
        and its tail was judged. `stream.cancel()` ends the call before its next token, and
        so does leaving the `with` block or forgetting the stream.

        Args:
            prompts: As for `generate`; several prompts yield events of several rows,
                interleaved, told apart by `event.row`. `Ended`, the guard's words and
                continuations come when the last row of the batch has ended or tripped.
            input_ids: As for `generate`.
            attention_mask: As for `generate`.
            prefill: As for `generate`.
            policy: As for `generate`.
            seed: As for `generate`.
            includes_stop: Whether the text keeps the stop string that ended it, as `generate`
                has it; without it, neither the string nor the ids that make it are shown.
            **generate_kwargs: As for `generate`.

        Returns:
            An iterator of `StreamEvent`, see `safe_decode.streaming.events`.

        Raises:
            UnsupportedError: As for `generate`.
            PromptError: As for `generate`.
            ConfigurationError: As for `generate`.
            FingerprintMismatchError: As for `generate`.
        """
        producer = self._producer(
            prompts,
            input_ids=input_ids,
            attention_mask=attention_mask,
            prefill=prefill,
            policy=policy,
            seed=seed,
            includes_stop=includes_stop,
            options=generate_kwargs,
        )
        return GuardedStream(producer)

    def astream(
        self,
        prompts: Prompts | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prefill: str | Sequence[str | None] | None = None,
        policy: RequestPolicy | Sequence[RequestPolicy | None] | None = None,
        seed: int | Sequence[int] | None = None,
        includes_stop: bool = True,
        **generate_kwargs: Any,  # noqa: ANN401 - those of model.generate
    ) -> AsyncGuardedStream:
        """Do as `stream`, for `async for`; called inside a running event loop.

            async with decoder.astream(messages, seed=7) as stream:
                async for event in stream:
                    ...

        Encoding the prompt happens here, on the event loop; the model runs in a thread.
        Cancelling the task that reads the stream cancels the call.
        """
        producer = self._producer(
            prompts,
            input_ids=input_ids,
            attention_mask=attention_mask,
            prefill=prefill,
            policy=policy,
            seed=seed,
            includes_stop=includes_stop,
            options=generate_kwargs,
        )
        return AsyncGuardedStream(producer)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the taps on the model over many calls, so that compiled graphs read them.

            with decoder.installed():
                model.compile()  # before or here; or generate compiles by itself
                for messages in conversations:
                    decoder.generate(messages, cache_implementation="static")

        Graphs that were compiled without the taps are traced anew at their next call, and again
        after this ends. Calls run one at a time; unguarded ones may come between them. A
        forward of your own while a call runs, compiled, closes its rows.

        Raises:
            UnsupportedError: A call is running, or taps of this or another decoder are installed
                on the model; or the decoder has a self-check, whose forwards graphs would take
                for the model's own.
        """
        if self._self_check is not None:
            raise UnsupportedError(
                "installed() is refused with self_check: compiled graphs would take its forwards "
                "for steps; pass self_check=None, or generate eagerly."
            )
        with self._tap.built_in():
            yield

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
            CertificateError: The decoder is strict, and nothing certifies a foreign generate.
            FingerprintMismatchError: As for `require_unchanged`.
            UnsupportedError: redirect="rewind", a model that cannot be guarded, or one whose
                own generation configuration holds a refused option.
            BeatError: At the end: forwards passed that the processor never judged.
        """
        if redirect == "rewind":
            raise UnsupportedError(
                "redirect='rewind' is refused: a processor cannot take tokens back; use "
                "decoder.generate, or pass redirect='refuse', 'stop' or 'flag'."
            )
        if self.strict:
            raise CertificateError(
                "strict=True is refused with processor(): the options of a foreign generate are "
                "not seen, so no certificate covers them; use decoder.generate, or pass "
                "strict=False."
            )
        self.require_unchanged()
        require_supported(self.model, {}, is_installed=self._tap.is_built_in)
        inputs = from_ids(self.tokenizer, input_ids, attention_mask)
        policy = replace(self.policy, redirect=redirect)
        composer = self._composer()
        with guarded(
            composer.protected,
            inputs,
            composer.rules_of(policy),
            self._judgement(policy),
            n_sequences=num_return_sequences,
            end_ids=_as_ids(composer.option("eos_token_id", {"eos_token_id": eos_token_id})),
            pad_id=composer.option("pad_token_id", {}),
        ) as handle:
            yield handle

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
        canary = self.bundle.canary
        if canary is None:
            raise CanaryError(
                "the bundle has no canary, so nothing shows that this model is read as it was "
                "certified; record one with CanaryRecord.of, or make the bundle anew."
            )
        return canary.run(self.model, self.tokenizer, self._probe)

    def _inputs(
        self,
        prompts: Prompts | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        prefill: str | Sequence[str | None] | None,
        options: Mapping[str, Any],
    ) -> PromptBatch:
        asked = GenerateRequest(prompts, input_ids, attention_mask, prefill, options=options)
        return self._composer().inputs(asked)

    def _call(self, prompts: Prompts | None, **asked: Any) -> GuardedCall:  # noqa: ANN401 - of GenerateRequest
        self.require_unchanged()
        return self._composer().call(GenerateRequest(prompts, **asked))

    def _producer(
        self,
        prompts: Prompts | None,
        *,
        includes_stop: bool,
        **given: Any,  # noqa: ANN401 - of GenerateRequest
    ) -> Producer:
        composer = self._composer()
        streamer = given["options"].get("streamer")
        if streamer is not None:
            with _ended(streamer):
                raise UnsupportedError(
                    "streamer is refused with stream, which is read itself; pass it to generate."
                )
        call = self._call(prompts, **given)
        if call.mode.method != "step":
            raise UnsupportedError(
                "stream is refused with beams and assistants: their answers are judged when they "
                "are whole; use generate."
            )
        stops = composer.option("stop_strings", given["options"]) or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)

        def produce(emit: Callable[[StreamEvent], None], is_cancelled: Callable[[], bool]) -> None:
            call.run(StreamSink(emit, is_cancelled, stops, includes_stop))

        return produce

    def _composer(self) -> CallBuilder:
        protected = GuardedModel(
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
        return CallBuilder(
            protected,
            self.policy,
            self.certificate,
            self._texts,
            self.opener,
            self._uses_header_check,
        )

    def _judgement(self, policy: Policy) -> TraceWriter:
        bundle = self.bundle
        return TraceWriter(
            bundle=bundle.digest,
            heads=bundle.probe.heads,
            low_mark=bundle.monitor.low_mark,
            certificate=self.certificate,
            policy=policy,
            reasoning=self._composer().rules_of(policy).reasoning,
        )


def _streamed(call: GuardedCall, streamer: Streamer) -> GuardedOutput:
    if call.batch > 1 or call.mode.method != "step":
        raise UnsupportedError(
            f"streamer is refused for {call.batch} rows, beams and assistants: it shows one row "
            "as it is written; pass one prompt, or use decoder.stream."
        )
    streamer.put(call.prompt.cpu())
    return call.run(StreamSink(feeder(streamer)))


@contextmanager
def _ended(streamer: Streamer | None) -> Iterator[None]:
    """End a streamer however the call ends: its reader, in another thread, would wait forever."""
    try:
        yield
    finally:
        end = getattr(streamer, "end", None)
        if end is not None:  # what is no streamer has been refused
            end()


def _certificate(
    bundle: ProbeBundle,
    alpha: float | None,
    population: str,
    self_check: SelfCheck | Literal["bundle"] | None,
) -> Certificate:
    certificate = bundle.certificate(alpha, population)
    further = {"self_check='bundle'": self_check == "bundle", "reasoning": bundle.reasoning}
    asked = [name for name, there in further.items() if there]
    if population != "benign" and asked:
        raise ConfigurationError(
            f"population={population!r} is refused with {asked[0]}: its thresholds are certified "
            "for 'benign' responses alone; pass population='benign'."
        )
    return certificate


def _own_check(bundle: ProbeBundle, alpha: float) -> SelfCheck:
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
    return bundle.header_check.settings(alpha)


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(sorted(int(one) for one in value))
