"""The engine of the server: a guarded model on this machine, rows run in batches.

Knows the model's decoder, its prompts and its canary. Does not know queues, HTTP or how a
batch runs. Nothing is kept between runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from safe_decode import chat
from safe_decode.capabilities import require_supported
from safe_decode.compose import context_tokens, texts_of
from safe_decode.errors import PromptError, UnsupportedError
from safe_decode.guard import SafeDecoder
from safe_decode.inputs import from_ids
from safe_decode.serving.engine import GuardFacts
from safe_decode.serving.redirection import RunGuard, close_row
from safe_decode.serving.rows import Row, RowPrompt
from safe_decode.serving.run import Run
from safe_decode.serving.timing import StepTimes
from safe_decode.taps import ActivationTap

__all__ = ["GuardedEngine"]

_LOG = logging.getLogger("safe_decode.serving")


class GuardedEngine:
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
        if bundle.reasoning is not None:
            raise UnsupportedError(
                f"reasoning={bundle.reasoning.opens!r}..{bundle.reasoning.closes!r} of the bundle "
                "is refused: the server does not follow spans yet; serve a bundle without "
                "thresholds for reasoning, or use SafeDecoder."
            )
        self._keep_traces = keep_traces
        self._decoder = decoder
        self._guard = RunGuard(
            decoder,
            bundle.probe.to(model.device),
            ActivationTap(model, bundle.probe.sites),
            texts_of(decoder.tokenizer, decoder.refusal, decoder.opener),
            tells_scores=tells_scores,
        )
        self._pool = ThreadPoolExecutor(continuations, thread_name_prefix="safe-decode-redirect")
        self._facts = GuardFacts(
            bundle=bundle.digest,
            certificates={
                c.alpha: c
                for c in bundle.certificates
                if c.population == decoder.certificate.population
            },
            alpha=decoder.certificate.alpha,
            redirect=decoder.policy.redirect,
            holdback_tokens=(
                decoder.policy.holdback_tokens if holdback_tokens is None else holdback_tokens
            ),
            heads=tuple(bundle.probe.heads),
            context_tokens=context_tokens(model),
            vocab_tokens=int(model.config.get_text_config().vocab_size),
        )

    @property
    def facts(self) -> GuardFacts:
        """What the rows are guarded by."""
        return self._facts

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> RowPrompt:
        """See `Engine.chat`."""
        encoded = chat.encode_chat(self._decoder.tokenizer, messages)
        self._require_room(len(encoded.ids))
        given = encoded.prefill_tokens
        return RowPrompt(encoded.ids, scanned=given + 1, prefill_tokens=given, is_chat=True)

    def completion(self, prompt: str | Sequence[int]) -> RowPrompt:
        """See `Engine.completion`."""
        tokenizer = self._decoder.tokenizer
        if isinstance(prompt, str):
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            ids = [*begin, *chat.text_ids(tokenizer, prompt)] if prompt else []
        else:
            ids = list(prompt)
            foreign = [i for i in ids if not 0 <= i < self._facts.vocab_tokens]
            if foreign:
                raise PromptError(
                    f"the prompt has the id {foreign[0]}, wanted 0..{self._facts.vocab_tokens - 1}."
                )
        if not ids:
            raise PromptError("the prompt is empty; pass at least one character or id.")
        self._require_room(len(ids))
        inputs = from_ids(tokenizer, torch.tensor([ids]), torch.ones(1, len(ids)).long())
        return RowPrompt(tuple(ids), inputs.scanned[0], inputs.prefill_tokens[0], inputs.is_chat[0])

    def token_text(self, token: int) -> str:
        """Return the text of one id on its own."""
        return str(self._decoder.tokenizer.decode([token]))

    def has_changed(self) -> bool:
        """See `Engine.has_changed`. Nothing is compared here: the canary's interval finds it."""
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
        run = Run(self._guard, self._pool, rows)
        try:
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

    def _require_room(self, n_tokens: int) -> None:
        chat.require_room(n_tokens, self._facts.context_tokens)
