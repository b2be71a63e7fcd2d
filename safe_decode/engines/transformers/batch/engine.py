"""The engine of the server: a guarded model on this machine, rows run in batches.

Knows the model's decoder, its prompts and its canary. Does not know queues, HTTP or how a
batch runs. Nothing is kept between runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from safe_decode.bundle.summary import summary_of
from safe_decode.engines.interface import GuardFacts, StepTimes
from safe_decode.engines.rows import Row, RowPrompt
from safe_decode.engines.transformers.batch.prompts import PromptReader
from safe_decode.engines.transformers.batch.redirection import RunGuard, close_row
from safe_decode.engines.transformers.batch.run import BatchRun
from safe_decode.engines.transformers.capabilities import require_rows, require_supported
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.engines.transformers.loops.whole_response import method_of
from safe_decode.engines.transformers.request import context_tokens
from safe_decode.errors import SafeDecodeError, UnsupportedError
from safe_decode.policy.canned_texts import texts_of
from safe_decode.prompts import chat

__all__ = ["TransformersEngine"]

_LOG = logging.getLogger("safe_decode.serving")


class TransformersEngine:
    """Runs rows on the model of a decoder.

    Args:
        decoder: Its model, bundle and policy; checked against each other already.
        holdback_tokens: The operator's k; None: the decoder's.
        tells_scores: Say each token's statistic; it costs a little a step.
        keep_traces: Fill `Row.trace` when a run has ended.
        continuations: Tripped rows that go on at the same time.
    """

    def __init__(
        self,
        decoder: SafeDecoder,
        *,
        holdback_tokens: int | None = None,
        tells_scores: bool = False,
        keep_traces: bool = False,
        continuations: int = 2,
    ) -> None:
        bundle, model = decoder.bundle, decoder.model
        require_supported(model, {})
        require_rows(model, None)
        method = method_of(lambda name: getattr(model.generation_config, name, None))
        if method != "step":
            raise UnsupportedError(
                f"the model's own generation_config asks for {method} decoding, and the server "
                "judges while it writes; unset num_beams and prompt_lookup_num_tokens there."
            )
        if bundle.reasoning is not None:
            raise UnsupportedError(
                f"reasoning={bundle.reasoning.opens!r}..{bundle.reasoning.closes!r} of the bundle "
                "is refused: the server does not follow spans yet; serve a bundle without "
                "thresholds for reasoning, or use SafeDecoder."
            )
        self._keep_traces = keep_traces
        self._decoder = decoder
        own_ends = tuple(sorted(chat.stop_ids(model, decoder.tokenizer)))
        self._pool = ThreadPoolExecutor(continuations, thread_name_prefix="safe-decode-redirect")
        self._facts = GuardFacts(
            bundle=bundle.digest,
            choice=decoder.choice,
            alpha=decoder.certificate.alpha,
            redirect=decoder.policy.redirect,
            holdback_tokens=(
                decoder.policy.holdback_tokens if holdback_tokens is None else holdback_tokens
            ),
            heads=tuple(bundle.probe.heads),
            context_tokens=context_tokens(model),
            vocab_tokens=int(model.config.get_text_config().vocab_size),
            summary=summary_of(bundle, decoder.certificate.alpha, decoder.certificate.population),
        )
        self._guard = RunGuard(
            replace(decoder.protected, own_ends=own_ends),
            self._facts,
            texts_of(decoder.tokenizer, decoder.refusal, decoder.opener),
            tells_scores=tells_scores,
        )
        self._prompts = PromptReader(
            decoder.tokenizer,
            context_tokens=self._facts.context_tokens,
            vocab_tokens=self._facts.vocab_tokens,
        )

    @property
    def facts(self) -> GuardFacts:
        """What the rows are guarded by."""
        return self._facts

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, object] | None = None,
    ) -> RowPrompt:
        """See `Engine.chat`."""
        return self._prompts.chat(messages, variables=variables)

    def completion(self, prompt: str | Sequence[int]) -> RowPrompt:
        """See `Engine.completion`."""
        return self._prompts.completion(prompt)

    def token_text(self, token: int) -> str:
        """Return the text of one id on its own."""
        return str(self._decoder.tokenizer.decode([token]))

    def has_changed(self) -> bool:
        """See `Engine.has_changed`. What the seal does not see, the canary's interval finds."""
        try:
            self._decoder.require_unchanged()
        except SafeDecodeError:
            return True
        return False

    def check(self) -> float:
        """See `Engine.check`."""
        return self._decoder.check()

    def admits(self, rows: Sequence[Row], row: Row) -> bool:
        """Say whether a row can run with others: whether there is room for all of them."""
        if self._facts.context_tokens is None:
            return True
        # Rows that have ended are fed pads until the last one ends.
        requests = [r.request for r in (*rows, row)]
        longest = max(len(request.prompt.ids) for request in requests)
        return longest + max(r.sampling.max_tokens for r in requests) <= self._facts.context_tokens

    def run(self, rows: Sequence[Row]) -> StepTimes | None:
        """See `Engine.run`."""
        try:
            self._decoder.require_unchanged()
            run = BatchRun(self._guard, self._pool, rows)
            times = run.go()
        except Exception as error:  # whatever fails, every reader gets a proper end
            _LOG.exception("a run of %d rows failed", len(rows))
            for row in rows:
                close_row(row, error)
            return None
        if self._keep_traces:
            run.write_traces()
        return times

    def close(self) -> None:
        """Let go of the threads, once their rows have ended."""
        self._pool.shutdown(wait=True)
