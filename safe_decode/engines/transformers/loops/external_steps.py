"""The guard's side of a loop that somebody else wrote.

Knows one call before and one after each choice, forced ids and ends of rows. Does not know the
loop around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.errors import (
    BeatError,
    ConfigurationError,
    ForcedTokenError,
    GuardError,
    NonFiniteError,
    UnsupportedError,
    as_guard_error,
)
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

    def on_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `ScoresStep`.

        Raises:
            UnsupportedError: Before the first token, if the rows are not the session's.
            ForcedTokenError: A forced id did not arrive: a processor after ours un-forced it.
            ConfigurationError: At the second token, if no stopping criterion of the guard and
                no EOS could end a row.
        """
        if not self.session.reader.is_prefilled:
            self._require_rows(input_ids, scores)
        said = self._said(input_ids)
        self._check_arrivals(input_ids)
        try:
            self._require_alternation(said)
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
            if bool(suspects.any()):
                self._park(suspects, trips, said)
        return self._forced(scores) if self.scripts else scores

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
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if self._ended:
            done[sorted(self._ended)] = True
        return done

    def finish(self) -> None:
        """Check, after the loop, that nothing ran unseen.

        Raises:
            BeatError: Forwards passed that the processor never judged.
        """
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

    def _require_alternation(self, said: int) -> None:
        if said != self.n_scored:
            raise BeatError(
                f"the processor runs before token {said}, wanted token {self.n_scored}; pass it "
                "to generate once."
            )
        if said > 0 and not self.was_asked_to_stop and self._end_id is None:
            raise ConfigurationError(
                "the model has no EOS in its generation configuration, so a refusal could not "
                "end; pass stopping_criteria=[handle.stopping_criteria] to generate as well."
            )

    def _require_rows(self, input_ids: Tensor, scores: Tensor) -> None:
        if input_ids.shape[0] != self.session.batch:
            raise UnsupportedError(
                f"generate runs {input_ids.shape[0]} rows, the guard was opened for "
                f"{self.session.batch}; pass the same input_ids to decoder.processor, its "
                "num_return_sequences, and num_beams=1."
            )
        # Beam search hands log-probabilities over: they sum to one, raw scores hardly ever do.
        total = torch.logsumexp(scores.float(), -1)
        if scores.shape[-1] > 1 and bool((total.abs() < 1e-4).all()):
            raise UnsupportedError(
                "scores are log-probabilities, as in num_beams > 1 or renormalised scores; pass "
                "num_beams=1 and put the guard's processor on raw scores."
            )

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
        refusal = self._refusal_after_ids if said else self._refusal_ids
        refusal = self.session.spans.closing(row) + refusal
        text = () if self.session.roster.rows[0].policy.rule.says == "nothing" else refusal
        end = () if self._end_id is None else (self._end_id,)
        self.scripts[row] = Script((*text, *end) or (self._pad_id,))

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
        newest, lost = input_ids[:, -1].tolist(), {}
        for row, script in self.scripts.items():
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
