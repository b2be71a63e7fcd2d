"""SafeDecoder: a model that re-checks itself before every token.

Knows how a call is composed: options checked, prompts encoded, the batch run under a session,
tripped rows redirected, texts and traces handed back. Does not know hooks, statistics or module
names. A decoder holds no state of a call; calls in several threads do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from safe_decode.decision import Redirect
from safe_decode.engines.transformers.call import GuardedCall
from safe_decode.engines.transformers.call_options import CallOptions
from safe_decode.engines.transformers.call_spec import StreamSink
from safe_decode.engines.transformers.capabilities import require_rows, require_supported
from safe_decode.engines.transformers.external_generate import GuardHandle, guarded
from safe_decode.engines.transformers.output import GuardedOutput
from safe_decode.engines.transformers.request import CallBuilder, GenerateRequest
from safe_decode.engines.transformers.wrapped_model import WrappedModel, as_ids
from safe_decode.errors import CertificateError, UnsupportedError
from safe_decode.policy.policy import Policy, RequestPolicy
from safe_decode.prompts.batch import Prompts, from_ids
from safe_decode.streaming.events import StreamEvent
from safe_decode.streaming.hf_streamer import Streamer, ended_with_call, feeder
from safe_decode.streaming.reader import AsyncGuardedStream, GuardedStream, Producer

__all__ = ["GuardHandle", "GuardedOutput", "SafeDecoder"]

_OF_THE_REQUEST = ("input_ids", "attention_mask", "prefill", "redirect", "policy", "seed")
"""Arguments of `stream` that are no options of `model.generate`."""


class SafeDecoder(WrappedModel):
    """Wraps a model and its bundle; see `WrappedModel` for the arguments.

    What frames ask of a model is forwarded, so that pipelines take a decoder in its place, see
    `ModelFace`; `tokenizer` is as given.
    """

    def generate(
        self,
        prompts: Prompts | Tensor | None = None,
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
            prompts: A string, several, a conversation (list of messages) or several, encoded with
                the chat template; or `input_ids` in the first place, as for `model.generate`.
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
        with ended_with_call(streamer):
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
        prompts: Prompts | Tensor | None = None,
        *,
        includes_stop: bool = True,
        **asked: Any,  # noqa: ANN401 - those of generate
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
            includes_stop: Whether the text keeps the stop string that ended it, as `generate`
                has it; without it, neither the string nor the ids that make it are shown.
            **asked: The other arguments of `generate`.

        Returns:
            An iterator of `StreamEvent`, see `safe_decode.streaming.events`.

        Raises:
            UnsupportedError: As for `generate`.
            PromptError: As for `generate`.
            ConfigurationError: As for `generate`.
            FingerprintMismatchError: As for `generate`.
        """
        return GuardedStream(self._producer(prompts, includes_stop, asked))

    def astream(
        self,
        prompts: Prompts | Tensor | None = None,
        *,
        includes_stop: bool = True,
        **asked: Any,  # noqa: ANN401 - those of stream
    ) -> AsyncGuardedStream:
        """Do as `stream`, for `async for`; called inside a running event loop.

            async with decoder.astream(messages, seed=7) as stream:
                async for event in stream:
                    ...

        Encoding the prompt happens here, on the event loop; the model runs in a thread.
        Cancelling the task that reads the stream cancels the call.

        Args:
            prompts: As for `stream`.
            includes_stop: As for `stream`.
            **asked: The other arguments of `stream`.
        """
        return AsyncGuardedStream(self._producer(prompts, includes_stop, asked))

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
        if Policy(redirect).rule.resumes:
            raise UnsupportedError(
                f"redirect={redirect!r} is refused: a processor cannot take tokens back; use "
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
        require_rows(self.model, inputs.attention_mask, num_return_sequences)
        policy = replace(self.policy, redirect=redirect)
        composer = self._composer()
        named = CallOptions(self.protected, {"eos_token_id": eos_token_id})
        with guarded(
            composer.protected,
            inputs,
            composer.rules_of(policy),
            n_sequences=num_return_sequences,
            end_ids=as_ids(named.get("eos_token_id")),
            pad_id=named.get("pad_token_id"),
        ) as handle:
            yield handle

    def _call(self, prompts: Prompts | Tensor | None, **asked: Any) -> GuardedCall:  # noqa: ANN401
        self.require_unchanged()
        return self._composer().call(GenerateRequest(prompts, **asked))

    def _producer(
        self, prompts: Prompts | Tensor | None, includes_stop: bool, asked: Mapping[str, Any]
    ) -> Producer:
        own = {name: asked.get(name) for name in _OF_THE_REQUEST}
        options = {name: value for name, value in asked.items() if name not in own}
        streamer = options.get("streamer")
        if streamer is not None:
            with ended_with_call(streamer):
                raise UnsupportedError(
                    "streamer is refused with stream, which is read itself; pass it to generate."
                )
        call = self._call(prompts, options=options, **own)
        if call.mode.method != "step":
            raise UnsupportedError(
                "stream is refused with beams and assistants: their answers are judged when they "
                "are whole; use generate."
            )
        stops = CallOptions(self.protected, options).get("stop_strings") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)

        def produce(emit: Callable[[StreamEvent], None], is_cancelled: Callable[[], bool]) -> None:
            call.run(StreamSink(emit, is_cancelled, stops, includes_stop))

        return produce

    def _composer(self) -> CallBuilder:
        return CallBuilder(
            self.protected,
            self.policy,
            self.certificate,
            self.choice,
            self._texts,
            self.opener,
            self._uses_header_check,
        )


def _streamed(call: GuardedCall, streamer: Streamer) -> GuardedOutput:
    if call.batch > 1 or call.mode.method != "step":
        raise UnsupportedError(
            f"streamer is refused for {call.batch} rows, beams and assistants: it shows one row "
            "as it is written; pass one prompt, or use decoder.stream."
        )
    streamer.put(call.prompt.cpu())
    return call.run(StreamSink(feeder(streamer)))
