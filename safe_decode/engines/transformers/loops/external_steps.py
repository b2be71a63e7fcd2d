"""The guard's side of a loop that somebody else wrote.

Knows one call before and one after each choice, forced ids and ends of rows. Does not know the
loop around it. On a device a row that alarms is forced there, in the same step; the host hears of
it before the next score counts, and goes on with the second id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.foreign_checks import require_alternation, require_rows
from safe_decode.engines.transformers.loops.late_forcing import Alarms, LateForcing
from safe_decode.errors import (
    BeatError,
    ConfigurationError,
    ForcedTokenError,
    GuardError,
    NonFiniteError,
    as_guard_error,
)
from safe_decode.host_copies import sent
from safe_decode.policy.redirect import Script, forced_scores
from safe_decode.session.session import Session

__all__ = ["GuardedSteps"]


class GuardedSteps:
    """The guard's side of a foreign loop.

    Args:
        session: Opened for the rows that `generate` will run.
        prompt_tokens: Columns of the padded prompt.
        refusal_ids: What a tripped row says at the start of its turn.
        refusal_after_ids: What it says behind tokens that stand.
        end_ids: EOS ids, of which the first ends a refusal. They and the pad id carry no text
            and are not judged.
        pad_id: What a row with nothing left to say is given.
    """

    def __init__(
        self,
        session: Session,
        *,
        prompt_tokens: int,
        refusal_ids: Sequence[int],
        refusal_after_ids: Sequence[int],
        end_ids: Sequence[int],
        pad_id: int | None,
    ) -> None:
        self.session = session
        self.prompt_tokens = prompt_tokens
        self.scripts: dict[int, Script] = {}
        self.n_scored = 0
        self.was_asked_to_stop = False
        self.last_ids: Tensor | None = None
        self._refusal_ids = tuple(refusal_ids)
        self._refusal_after_ids = tuple(refusal_after_ids)
        self._end_id = end_ids[0] if end_ids else None
        self._pad_id = pad_id if pad_id is not None else (self._end_id or 0)
        quiet = sorted({*end_ids, *([] if pad_id is None else [pad_id])})
        self._quiet = torch.tensor(quiet, dtype=torch.int64)
        self._quiet_ids = frozenset(quiet)
        self._ended: set[int] = set()
        self._fillers: dict[int, int] = {}
        self._n_checked = prompt_tokens
        self._scores: Tensor | None = None
        self._poisoned: Tensor | None = None
        self._late: LateForcing | None = None  # where asking would wait

    def on_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `ScoresStep`.

        Raises:
            UnsupportedError: Before the first token, if the rows are not the session's.
            ForcedTokenError: A forced id did not arrive: a processor after ours un-forced it.
            ConfigurationError: At the second token, if no stopping criterion of the guard and
                no EOS could end a row.
        """
        if not self.session.reader.is_prefilled:
            require_rows(self.session.batch, input_ids, scores)
            # Marks of reasoning are followed on the host, which waits for each id.
            if not input_ids.is_cpu and not self.session.spans.are_followed:
                self._late = LateForcing(input_ids.device)
        self.hear(input_ids)
        said = self._said(input_ids)
        self._check_arrivals(input_ids)
        try:
            can_end = self.was_asked_to_stop or self._end_id is not None
            require_alternation(said, self.n_scored, can_end=can_end)
            self.session.note(input_ids)
            trips = self.session.judge(self._lengths(input_ids), self._active(input_ids))
        except ConfigurationError:
            raise
        except Exception as error:  # whatever fails in the guard closes its rows
            self._fail(as_guard_error(error), said=said)
            trips = None
        self.n_scored, self._scores, self.last_ids = said + 1, scores, input_ids
        if trips is not None and self.session.roster.protects:
            suspects = trips if self._poisoned is None else trips | self._poisoned
            if self._late is not None:
                return self._forced_there(self._late, scores, Alarms(suspects, trips, said))
            if bool(suspects.any()):
                self._park(suspects, trips, said)
        return self._forced(scores) if self.scripts else scores

    def hear(self, input_ids: Tensor | None) -> None:
        """Hear on the host of rows that have alarmed on a device; nothing if there are none.

        Args:
            input_ids: [batch, seq] as far as they are known; None: no further than `last_ids`.

        Raises:
            ForcedTokenError: As `on_scores`.
        """
        here = None if self._late is None else self._late.heard()
        if here is None or not bool(here.suspects.any()):
            return
        known, said = set(self.scripts), here.said
        self._park(here.suspects, here.trips, said)
        new = [row for row in self.scripts if row not in known]
        for row in new:
            self.scripts[row].force()  # it was, there
        ids = self.last_ids if input_ids is None else input_ids
        if ids is not None and self._n_checked == ids.shape[1] > self.prompt_tokens + said:
            self._check_rows(ids, new)

    def on_choice(self, input_ids: Tensor) -> Tensor:
        """See `ChoiceStep`.

        Raises:
            ForcedTokenError: As `on_scores`.
        """
        self.was_asked_to_stop = True
        self.last_ids, said = input_ids, self._said(input_ids)
        self._check_arrivals(input_ids)
        if said != self.n_scored:
            error = BeatError(
                f"{said} tokens were chosen and the guard's processor saw {self.n_scored}; pass "
                "logits_processor=[..., handle.logits_processor] to generate."
            )
            self._fail(error, said=said)
            self._ended |= set(self.scripts)
        elif self._scores is not None:
            # Greedy picks NaN where there is any; -inf at the pad of an ended row is no NaN.
            picked = self._scores.gather(1, input_ids[:, -1:])[:, 0]
            self._poisoned = picked != picked
        self._ended |= {row for row, script in self.scripts.items() if not script.has_next}
        batch = range(input_ids.shape[0])
        if self._ended:
            done = sent([row in self._ended for row in batch], input_ids.device)
        else:
            done = torch.zeros(len(batch), dtype=torch.bool, device=input_ids.device)
        alarms = None if self._late is None else self._late.unheard
        if alarms is not None and len(self._script_ids((), alarms.said)) == 1:
            done = done | alarms.suspects
        return done

    def finish(self) -> None:
        """Check, after the loop, that nothing ran unseen.

        Raises:
            BeatError: Forwards passed that the processor never judged.
            ForcedTokenError: As `on_scores`.
        """
        self.hear(None)
        try:
            self.session.reader.require_quiet()
        except BeatError as error:
            for row in range(self.session.batch):
                self.session.errors.setdefault(row, error)
            raise

    def said(self, row: int) -> tuple[int, ...]:
        """Return a row's generated ids as far as the guard saw them, padding left out."""
        if self.last_ids is None:
            return ()
        new: list[int] = self.last_ids[row, self.prompt_tokens :].tolist()
        while new and new[-1] in self._quiet_ids:
            new.pop()
        return tuple(new)

    def is_truncated(self, row: int) -> bool:
        """Say whether a row's refusal was begun and not finished."""
        return row in self.scripts and not self.scripts[row].is_done

    def unscored_tail(self, row: int) -> int:
        """Count the tokens, 0 or 1, that no forward followed: the row's last, if it is text."""
        if row in self.scripts or self.n_scored == 0:
            return 0
        # Without our criterion the last choice is never seen.
        if not self.was_asked_to_stop or self.last_ids is None:
            return 1
        return int(int(self.last_ids[row, -1]) not in self._quiet_ids)

    def _lengths(self, input_ids: Tensor) -> tuple[int, ...]:
        whole = input_ids.shape[1]
        # Without a cache each forward passes the whole sequence.
        return (1, whole) if self.session.reader.is_prefilled else (whole,)

    def _active(self, input_ids: Tensor) -> Tensor | None:
        if not self.session.reader.is_prefilled or not len(self._quiet):
            return None
        if input_ids.is_cpu and self._quiet_ids.isdisjoint(input_ids[:, -1].tolist()):
            return None
        self._quiet = self._quiet.to(input_ids.device)
        return ~torch.isin(input_ids[:, -1], self._quiet)

    def _said(self, input_ids: Tensor) -> int:
        return input_ids.shape[1] - self.prompt_tokens

    def _park(self, suspects: Tensor, trips: Tensor, said: int) -> None:
        tripped = trips.tolist()
        for row in suspects.nonzero()[:, 0].tolist():
            if row not in self.scripts:
                error = None
                if not tripped[row]:
                    error = NonFiniteError(
                        f"row {row} has NaN in its scores before token {said - 1}, wanted finite "
                        "scores; check the model's weights and dtype."
                    )
                self.session.park(row, said=said, error=error)
                self._open_script(row, said)

    def _fail(self, error: GuardError, said: int) -> None:
        closes = self.session.roster.closes
        for row in range(self.session.batch):
            if closes and row not in self.scripts:
                self.session.park(row, said=said, error=error)
                self._open_script(row, said)
            self.session.errors.setdefault(row, error)

    def _open_script(self, row: int, said: int) -> None:
        self.scripts[row] = Script(self._script_ids(self.session.spans.closing(row), said))

    def _script_ids(self, closing: tuple[int, ...], said: int) -> tuple[int, ...]:
        refusal = closing + (self._refusal_after_ids if said else self._refusal_ids)
        text = () if self.session.roster.rows[0].policy.rule.says == "nothing" else refusal
        end = () if self._end_id is None else (self._end_id,)
        return (*text, *end) or (self._pad_id,)

    def _forced_there(self, late: LateForcing, scores: Tensor, alarms: Alarms) -> Tensor:
        if self.scripts:
            known = [row in self.scripts for row in range(self.session.batch)]
            alarms = alarms.but(sent(known, scores.device))
            scores = self._forced(scores)
        return late.force(scores, alarms, self._script_ids((), alarms.said)[0])

    def _forced(self, scores: Tensor) -> Tensor:
        due = {}
        for row, script in self.scripts.items():
            due[row] = script.force() if script.has_next else self._pad_id
        return forced_scores(scores, due) if due else scores

    def _check_arrivals(self, input_ids: Tensor) -> None:
        """Check that tripped rows say what was forced; what they say beyond it is not judged."""
        n_checked, self._n_checked = self._n_checked, input_ids.shape[1]
        if not self.scripts or n_checked == self._n_checked:
            return
        self._check_rows(input_ids, list(self.scripts))

    def _check_rows(self, input_ids: Tensor, rows: Sequence[int]) -> None:
        newest, lost = input_ids[:, -1].tolist(), {}
        for row in rows:
            script = self.scripts[row]
            is_over, due = script.is_done, script.check(newest[row])
            if is_over and newest[row] not in self._quiet_ids:
                # Which id fills ended rows is the foreign loop's to say; it is always the same.
                filler = self._fillers.setdefault(row, newest[row])
                due = None if filler == newest[row] else filler
            if due is not None:
                lost[row] = due
                self.session.errors[row] = ForcedTokenError(
                    f"row {row} was to say id {due} and said {newest[row]}; put the guard's "
                    "processor last in logits_processor."
                )
        if lost:
            self.last_ids = input_ids
            self.session.reader.discard()
            raise self.session.errors[min(lost)]
