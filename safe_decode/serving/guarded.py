"""The engine of the server: a guarded model on this machine, rows run in batches.

Knows how a batch is composed of rows with their own caps, seeds, samplings, stop strings and
thresholds, and who is told what after each choice. Does not know queues, HTTP or hooks. A
row that has ended is told so at once, not with its batch; a tripped row goes on by itself, in
a thread of its own, while its neighbours run. Nothing is kept between runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from safe_decode import chat
from safe_decode.certificate import Certificate
from safe_decode.errors import CanaryError, PromptError
from safe_decode.guard import SafeDecoder
from safe_decode.inputs import from_ids
from safe_decode.loop import CallSettings, GuardedLoop
from safe_decode.monitor import RiskMonitor
from safe_decode.outcome import Judgement, Outcome, void_reason
from safe_decode.policy import Policy
from safe_decode.rewind import Redirected, Rewinder, Texts
from safe_decode.serving.engine import GuardFacts
from safe_decode.serving.release import RowRelease
from safe_decode.serving.rows import Finished, Row, RowPrompt, TokenNote, Tripped
from safe_decode.serving.sampler import RowSampler
from safe_decode.session import RowRecord, Session, Trip
from safe_decode.taps import ActivationTap

__all__ = ["GuardedEngine"]

_LOG = logging.getLogger("safe_decode.serving")
_CUT = " ... "


class GuardedEngine:
    """Runs rows on the model of a decoder.

    Args:
        decoder: Its model, bundle and policy; checked against each other already.
        keep_traces: Fill `Row.trace` when a run has ended.
        continuations: Tripped rows that go on at the same time.
    """

    def __init__(
        self, decoder: SafeDecoder, *, keep_traces: bool = False, continuations: int = 2
    ) -> None:
        bundle, model = decoder.bundle, decoder.model
        self._decoder, self._keep_traces = decoder, keep_traces
        self._probe = bundle.probe.to(model.device)
        self._tap = ActivationTap(model, bundle.probe.sites)
        self._texts = _texts_of(decoder)
        self._pool = ThreadPoolExecutor(continuations, thread_name_prefix="safe-decode-redirect")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._facts = GuardFacts(
            bundle=bundle.digest,
            certificates={
                c.alpha: c
                for c in bundle.certificates
                if c.population == decoder.certificate.population
            },
            alpha=decoder.certificate.alpha,
            redirect=decoder.policy.redirect,
            holdback_tokens=decoder.policy.holdback_tokens,
            heads=tuple(bundle.probe.heads),
            context_tokens=limit if isinstance(limit, int) and limit > 0 else None,
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

    def check(self) -> float:
        """See `Engine.check`."""
        canary = self._decoder.bundle.canary
        if canary is None:
            raise CanaryError(
                "the bundle has no canary, so nothing shows that this model is read as it was "
                "certified; record one with CanaryRecord.of, or make the bundle anew."
            )
        return canary.run(self._decoder.model, self._decoder.tokenizer, self._probe)

    def admits(self, rows: Sequence[Row], row: Row) -> bool:
        """Say whether a row can run with others: one redirect, one hold-back, and room."""
        wanted = row.request.policy
        if any(
            (r.request.policy.redirect, r.request.policy.holdback_tokens)
            != (wanted.redirect, wanted.holdback_tokens)
            for r in rows
        ):
            return False
        if self._facts.context_tokens is None:
            return True
        # Rows that have ended are fed pads until the last one ends.
        requests = [r.request for r in (*rows, row)]
        longest = max(len(request.prompt.ids) for request in requests)
        return longest + max(r.sampling.max_tokens for r in requests) <= self._facts.context_tokens

    def run(self, rows: Sequence[Row]) -> None:
        """See `Engine.run`."""
        run = _Run(self._decoder, self._probe, self._tap, self._texts, self._pool, rows)
        try:
            run.go()
        except Exception as error:  # whatever fails, every reader gets a proper end
            _LOG.exception("a run of %d rows failed", len(rows))
            for row in rows:
                close_row(row, error)
            return
        if self._keep_traces:
            run.write_traces()

    def close(self) -> None:
        """Let go of the threads, once their rows have ended."""
        self._pool.shutdown(wait=True)

    def _require_room(self, n_tokens: int) -> None:
        chat.require_room(n_tokens, self._facts.context_tokens)


def close_row(row: Row, error: BaseException) -> None:
    """End a row whose engine failed; what was held back is never shown."""
    name = type(error).__name__
    row.emit(Tripped(row.request.policy.redirect, None, error=name))
    row.emit(Finished("content_filter", outcome="closed", error=f"{name}: {error}"))


class _Run:
    """One batch, from its first forward to its last row's end."""

    def __init__(
        self,
        decoder: SafeDecoder,
        probe: Any,  # noqa: ANN401 - a LinearProbe
        tap: ActivationTap,
        texts: Texts,
        pool: ThreadPoolExecutor,
        rows: Sequence[Row],
    ) -> None:
        self._decoder, self._probe, self._tap, self._texts = decoder, probe, tap, texts
        self._pool, self._rows = pool, rows
        policy = rows[0].request.policy
        self._policy = Policy(policy.redirect, policy.holdback_tokens, "close")
        self._certificates = [
            decoder.bundle.certificate(row.request.policy.alpha, decoder.certificate.population)
            for row in rows
        ]
        self._ends = frozenset(chat.stop_ids(decoder.model, decoder.tokenizer))
        self._settings = [self._settings_of(row) for row in rows]
        self._releases = [
            RowRelease(row, self._decode, void=self._void(i)) for i, row in enumerate(rows)
        ]
        self._sampler = RowSampler(
            [row.request.sampling for row in rows],
            int(decoder.model.config.get_text_config().vocab_size),
            decoder.model.device,
        )
        self._reported = {row: i for i, row in enumerate(self._sampler.reported)}
        self._redirected: dict[int, Future[Redirected]] = {}
        self._records: list[RowRecord] = []
        self._said = 0

    def go(self) -> None:
        """Run to the end of the last row."""
        device = self._decoder.model.device
        ids, mask = self._padded(device)
        thresholds = torch.tensor([c.threshold for c in self._certificates])
        with self._tap.listening() as beats, torch.no_grad():
            session = Session(
                probe=self._probe,
                monitor=RiskMonitor(self._decoder.bundle.monitor, thresholds),
                policy=self._policy,
                beats=beats,
                scanned=[row.request.prompt.scanned for row in self._rows],
                device=device,
            )
            loop = _FollowedLoop(session, self)
            self._decoder.model.generate(
                input_ids=ids,
                attention_mask=mask,
                custom_generate=loop,
                do_sample=False,
                max_new_tokens=max(s.max_new_tokens for s in self._settings),
                logits_processor=[self._sampler],
                stopping_criteria=[self._enders],
            )
        for index, release in enumerate(self._releases):
            if not release.is_over:
                self._settle(index, session, newest=None, is_done=True)
        self._records = session.records()
        for future in self._redirected.values():
            future.exception()  # waits; what failed has told its reader already

    def on_choice(self, newest: Tensor, done: Tensor, session: Session) -> None:
        """Take note of one choice, and of what the newest score says of the choice before."""
        self._said += 1
        chosen, ends = newest.tolist(), done.tolist()
        statistics = session.state.statistic.tolist()
        for index, release in enumerate(self._releases):
            if not release.is_over:
                self._settle(index, session, chosen[index], ends[index], statistics[index])

    def write_traces(self) -> None:
        """Fill the rows' traces."""
        bundle = self._decoder.bundle
        for index, (row, record) in enumerate(zip(self._rows, self._records, strict=True)):
            release, prompt = self._releases[index], row.request.prompt
            said = tuple(release.said_ids)
            future = self._redirected.get(index)
            failed = future is None or future.exception() is not None
            redirected = None if future is None or failed else future.result()
            if record.trip is not None:
                said = said[: record.trip.cut.kept + record.trip.cut.dropped]
            outcome = Outcome(
                record,
                prompt.ids,
                prompt.prefill_tokens,
                said,
                said if redirected is None else redirected.ids,
                redirected,
            )
            judgement = Judgement(
                bundle=bundle.digest,
                heads=bundle.probe.heads,
                low_mark=bundle.monitor.low_mark,
                certificate=self._certificates[index],
                policy=self._policy,
            )
            row.trace = judgement.trace(outcome, release.void)

    def _enders(self, input_ids: Tensor, _scores: object, **_: object) -> Tensor:
        """The stopping criterion of the batch: caps, stop strings, readers who left."""
        ends = []
        for index, token in enumerate(input_ids[:, -1].tolist()):
            ends.append(self._take(index, token))
        return torch.tensor(ends, device=input_ids.device)

    def _take(self, index: int, token: int) -> bool:
        release = self._releases[index]
        if release.row.is_cancelled and not release.is_over:
            release.finish("cancelled")
        if not release.goes_on:
            return True
        if token in self._ends:
            return False  # the loop's own criterion ends it
        note, is_last = TokenNote(token, ""), self._said + 1 >= self._settings[index].max_new_tokens
        if index in self._reported and self._sampler.chosen is not None:
            top = release.row.request.sampling.top_logprobs or 0
            logprob, others = self._sampler.chosen.of(self._reported[index], token, top)
            note = TokenNote(token, "", logprob=logprob, top=others)
        return release.say(note) or is_last

    def _settle(
        self,
        index: int,
        session: Session,
        newest: int | None,
        is_done: bool,
        statistic: float | None = None,
    ) -> None:
        release = self._releases[index]
        if statistic is None:
            statistic = float(session.state.statistic[index])
        trip = session.trips.get(index)
        if trip is not None:
            self._redirect(index, trip, statistic)
            return
        if newest is None:
            release.tail_is_judged()
        release.judge(statistic)
        if release.is_closing or newest is None:
            release.end(is_flagged=self._is_flagged(index, statistic))
        elif is_done and newest in self._ends:
            release.ends_by = "stop"
            release.end(is_flagged=self._is_flagged(index, statistic))
        elif is_done:
            release.close("length")

    def _is_flagged(self, index: int, statistic: float) -> bool:
        return not self._policy.protects and statistic > self._certificates[index].threshold

    def _redirect(self, index: int, trip: Trip, statistic: float) -> None:
        release = self._releases[index]
        error = None if trip.error is None else type(trip.error).__name__
        value = statistic if trip.error is None else None
        dropped = release.trip(trip.cut.kept, value)
        release.row.emit(Tripped(self._policy.redirect, value, dropped, error))
        position = release.scores - 1
        job = _Redirection(self, index, trip, len(dropped), position)
        if self._policy.redirect == "rewind" and trip.error is None:
            self._redirected[index] = self._pool.submit(job)
            return
        done: Future[Redirected] = Future()
        done.set_result(job())
        self._redirected[index] = done

    def redirect(self, index: int, trip: Trip) -> Redirected:
        """Continue or refuse one tripped row."""
        prompt = self._rows[index].request.prompt
        sampling = self._rows[index].request.sampling
        settings = self._settings[index]
        options: dict[str, Any] = {"do_sample": settings.do_sample}
        if settings.do_sample:
            options |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        rewinder = Rewinder(
            model=self._decoder.model,
            tap=self._tap,
            probe=self._probe,
            config=self._decoder.bundle.monitor,
            threshold=self._certificates[index].threshold,
            policy=self._policy,
            texts=self._texts,
            settings=settings,
            options=options,
            context_tokens=None,
        )
        with torch.no_grad():
            return rewinder.redirect(
                trip,
                row=sampling.seed,
                prompt=prompt.ids,
                prefill_tokens=prompt.prefill_tokens,
                said=self._releases[index].said_ids,
            )

    def speak(self, index: int, redirected: Redirected, trip: Trip) -> None:
        """Show what follows a trip."""
        kept = tuple(self._releases[index].said_ids[: trip.cut.kept])
        after = redirected.ids[len(kept) :]
        shown = tuple(token for token in after if token not in self._ends)
        self._releases[index].speak(shown, kept)

    def release(self, index: int) -> RowRelease:
        """Return the release of one row."""
        return self._releases[index]

    def _padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        tokenizer = self._decoder.tokenizer
        pad = tokenizer.pad_token_id
        pad = (tokenizer.eos_token_id or 0) if pad is None else pad
        prompts = [row.request.prompt.ids for row in self._rows]
        longest = max(map(len, prompts))
        ids = [[pad] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _settings_of(self, row: Row) -> CallSettings:
        sampling = row.request.sampling
        return CallSettings(
            max_new_tokens=sampling.max_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            end_ids=tuple(sorted(self._ends)),
            pad_id=self._decoder.tokenizer.pad_token_id,
        )

    def _void(self, index: int) -> str | None:
        request = self._rows[index].request
        sampling = request.sampling
        if sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty:
            return "a bias or penalty changes the responses that were certified"
        certificate: Certificate = self._certificates[index]
        return void_reason(certificate, self._settings[index], is_chat=request.prompt.is_chat)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._decoder.tokenizer.decode(list(ids), skip_special_tokens=True))


class _FollowedLoop(GuardedLoop):
    """The guarded loop, with someone who hears of each choice after the guard."""

    def __init__(self, session: Session, run: _Run) -> None:
        super().__init__(session)
        self._run = run

    def on_done(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Let the guard decide, then tell."""
        done = super().on_done(input_ids, done)
        self._run.on_choice(input_ids[:, -1], done, self.session)
        return done


class _Redirection:
    """What follows one trip, run beside the batch."""

    def __init__(self, run: _Run, index: int, trip: Trip, dropped: int, position: int) -> None:
        self._run, self._index, self._trip = run, index, trip
        self._dropped, self._position = dropped, position

    def __call__(self) -> Redirected:
        release = self._run.release(self._index)
        try:
            redirected = self._run.redirect(self._index, self._trip)
        except Exception as error:  # the reader gets a proper end, whatever failed
            _LOG.exception("a continuation failed")
            close_row(release.row, error)
            raise
        self._run.speak(self._index, redirected, self._trip)
        failed = self._trip.error or next(
            (t.record.error for t in redirected.tries if t.record.error is not None), None
        )
        words = {"rewind": "rewound", "stop": "stopped"}
        release.row.emit(
            Finished(
                "content_filter",
                outcome="closed" if failed else words.get(redirected.how, "refused"),  # type: ignore[arg-type]
                shown_tokens=release.shown_tokens,
                dropped_tokens=self._dropped,
                trip_step=self._position,
                void=release.void,
                error=None if failed is None else f"{type(failed).__name__}: {failed}",
            )
        )
        return redirected


def _texts_of(decoder: SafeDecoder) -> Texts:
    tokenizer = decoder.tokenizer
    return Texts(
        refusal=chat.text_ids(tokenizer, decoder.refusal),
        refusal_after=chat.text_ids(tokenizer, _CUT + decoder.refusal),
        opener=chat.text_ids(tokenizer, decoder.opener),
        opener_after=chat.text_ids(tokenizer, _CUT + decoder.opener),
    )
