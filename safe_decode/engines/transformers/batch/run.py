"""One batch of rows on a guarded model, from its first forward to its last row's end.

Knows how a batch is composed of rows with their own caps, seeds, samplings, stop strings,
redirects and thresholds, and who is told what after each choice. Does not know queues, HTTP
or hooks. A row that has ended is told so at once, not with its batch; a tripped row goes on
by itself, in a thread of its own, while its neighbours run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from safe_decode.engines.interface import StepTimes
from safe_decode.engines.rows import Row, Sampling
from safe_decode.engines.transformers.batch.redirection import Redirection, RunGuard
from safe_decode.engines.transformers.batch.sampler import ModelOwn, RowSampler
from safe_decode.engines.transformers.batch.served_row import ServedRow
from safe_decode.engines.transformers.batch.timing import TimedLoop
from safe_decode.engines.transformers.call_spec import RowSpec
from safe_decode.engines.transformers.coverage import options_in_force, request_options
from safe_decode.engines.transformers.guarded_rows import GuardedRows
from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.policy.policy import Policy
from safe_decode.prompts import chat
from safe_decode.prompts.batch import from_row_ids
from safe_decode.session.records import Redirected
from safe_decode.session.session import RowRecord, Session, Trip
from safe_decode.session.turns import Turns

__all__ = ["BatchRun"]


class BatchRun:
    """One batch, from its first forward to its last row's end; follows its loop."""

    def __init__(self, guard: RunGuard, pool: ThreadPoolExecutor, rows: Sequence[Row]) -> None:
        self._guard, self._pool, self._asked = guard, pool, rows
        self._model, self._tokenizer = guard.protected.model, guard.protected.tokenizer
        prompts = from_row_ids(
            self._tokenizer,
            [row.request.prompt.ids for row in rows],
            scanned=[row.request.prompt.scanned for row in rows],
            prefill_tokens=[row.request.prompt.prefill_tokens for row in rows],
            is_chat=[row.request.prompt.is_chat for row in rows],
        )
        specs = tuple(self._spec_of(row) for row in rows)
        self._rows = GuardedRows(guard.protected, prompts.to(self._model.device), specs)
        self._ends = frozenset(chat.stop_ids(self._model, self._tokenizer))
        # The model's own configuration acts here too; sampling is the row sampler's alone.
        self._own_options = options_in_force(self._model.generation_config, samples=False)
        self._settings = [self._settings_of(row) for row in rows]
        self._served = [
            ServedRow(row, self._tokenizer, void=self._rows.void(i, self._settings[i]))
            for i, row in enumerate(rows)
        ]
        self._sampler = RowSampler(
            [row.request.sampling for row in rows],
            int(self._model.config.get_text_config().vocab_size),
            self._model.device,
            n_ahead=max(spec.policy.holdback_tokens for spec in specs),
            own=ModelOwn(
                tuple(self._ends),
                getattr(self._model.generation_config, "repetition_penalty", None) or 1.0,
            ),
            prompts=[row.request.prompt.ids for row in rows],
        )
        self._reported = {row: i for i, row in enumerate(self._sampler.reported)}
        self._redirected: dict[int, Future[Redirected]] = {}
        self._records: list[RowRecord] = []
        self._session: Session | None = None
        self._loop: TimedLoop | None = None
        self._said = 0

    def go(self) -> StepTimes:
        """Run to the end of the last row; return what the steps took."""
        with self._guard.protected.tap.listening() as recorder, torch.no_grad():
            self._session = session = self._rows.session(recorder)
            self._loop = loop = TimedLoop(
                session,
                follower=self,
                room=self._rows.room(),
                reweighed=[_is_reweighed(row.request.sampling) for row in self._asked],
            )
            self._model.generate(
                input_ids=self._rows.prompts.input_ids,
                attention_mask=self._rows.prompts.attention_mask,
                custom_generate=loop,
                disable_compile=True,  # the taps of a run are hooks, which a graph leaves out
                do_sample=False,
                max_new_tokens=max(s.max_new_tokens for s in self._settings),
                logits_processor=[self._sampler],
                stopping_criteria=[self._enders],
            )
        self._records = session.records()
        for future in self._redirected.values():
            future.exception()  # waits; what failed has told its reader already
        return loop.times

    def on_choice(
        self, newest: Sequence[int], turns: Turns | None, trips: Mapping[int, Trip]
    ) -> None:
        """Take note of one choice, and of what the newest score says of the choice before."""
        for index, served in self._judged(trips):
            release = served.release
            if turns is None:
                release.say(newest[index])
                continue
            release.take(newest[index], index, turns)
            if release.is_over:
                served.finish(is_flagged=self._is_flagged(index))

    def on_end(self, wanted: Sequence[int], trips: Mapping[int, Trip]) -> None:
        """Take note that the tails of all rows were judged."""
        for index, served in self._judged(trips):
            served.release.end(wanted[index])
            served.finish(is_flagged=self._is_flagged(index))

    def _judged(self, trips: Mapping[int, Trip]) -> Iterator[tuple[int, ServedRow]]:
        """Redirect the rows that have just tripped; yield the others that are not over."""
        statistics = self._statistics()
        for index, served in enumerate(self._served):
            if served.is_over:
                continue
            if index in trips:
                self._redirect(index, trips[index])
                continue
            served.release.judge(None if statistics is None else statistics[index])
            yield index, served

    def write_traces(self) -> None:
        """Fill the rows' traces."""
        assert self._loop is not None
        for index, (row, record) in enumerate(zip(self._asked, self._records, strict=True)):
            served = self._served[index]
            future = self._redirected.get(index)
            failed = future is None or future.exception() is not None
            redirected = None if future is None or failed else future.result()
            finished = self._rows.finished(
                index,
                record,
                served.said_ids,
                redirected=redirected,
                withheld=self._loop.ends[index].withheld,
                ahead=self._loop.ahead(index, record.ahead),
            )
            if served.has_left:
                finished = replace(finished, cancelled_after=served.release.released_tokens)
            row.trace = self._rows.writer(index).trace(finished, served.void)

    def _enders(self, input_ids: Tensor, _scores: object, **_: object) -> Tensor:
        """The stopping criterion of the batch: caps, stop strings, readers who left."""
        self._said += 1
        ends = [self._hear(index, token) for index, token in enumerate(input_ids[:, -1].tolist())]
        return torch.tensor(ends, device=input_ids.device)

    def _hear(self, index: int, token: int) -> bool:
        served = self._served[index]
        if served.row.is_cancelled and not served.is_over:
            served.leave()
        if not served.goes_on:
            return True
        if token in self._ends:
            return False  # the loop's own criterion ends it
        facts = {}
        if index in self._reported and self._sampler.chosen is not None:
            n_top = served.row.request.sampling.top_logprobs or 0
            logprob, top = self._sampler.chosen.of(self._reported[index], token, n_top)
            facts = {"logprob": logprob, "top": top}
        has_stopped = served.release.hear(token, **facts)
        return has_stopped or self._said >= self._settings[index].max_new_tokens

    def _statistics(self) -> list[float] | None:
        """Read every row's statistic, if it is told; the guard itself looks less often."""
        assert self._session is not None
        if not self._guard.tells_scores:
            return None
        statistics: list[float] = self._session.state.statistic.tolist()
        return statistics

    def _statistic(self, index: int) -> float:
        assert self._session is not None
        return float(self._session.state.statistic[index])

    def _is_flagged(self, index: int) -> bool:
        spec = self._rows.specs[index]
        # What is not a number would have been closed.
        return not spec.policy.protects and not self._statistic(index) <= spec.threshold

    def _redirect(self, index: int, trip: Trip) -> None:
        served, policy = self._served[index], self._rows.specs[index].policy
        value = self._statistic(index) if trip.error is None else None
        job = Redirection(
            self._rows, index, served, trip, settings=self._settings[index], statistic=value
        )
        if policy.rule.resumes and trip.error is None:
            self._redirected[index] = self._pool.submit(job)
            return
        self._redirected[index] = done = Future[Redirected]()
        try:
            done.set_result(job())
        except Exception as error:  # it has told its reader, and its neighbours go on
            done.set_exception(error)

    def _spec_of(self, row: Row) -> RowSpec:
        asked, guard = row.request.policy, self._guard
        return RowSpec(
            Policy(asked.redirect, asked.holdback_tokens, "close"),
            guard.facts.certificate_of(row.request),
            guard.texts,
            row.request.sampling.seed,
        )

    def _settings_of(self, row: Row) -> CallSettings:
        sampling = row.request.sampling
        return CallSettings(
            max_new_tokens=sampling.max_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            end_ids=tuple(sorted(self._ends)),
            pad_id=self._tokenizer.pad_token_id,
            options=request_options(row.request, self._own_options),
        )


def _is_reweighed(sampling: Sampling) -> bool:
    """Say whether a request could make an end likely that the model finds unlikely."""
    weighs = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty
    return bool(weighs) or sampling.repetition_penalty not in (None, 1.0)
