"""How rows of vLLM are judged by seat, from scores that lie by slot; without vLLM."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from safe_decode.engines.vllm.rows.row_judge import NOTHING, JudgedRows, RowJudge
from safe_decode.engines.vllm.rows.row_seats import RowSeats
from safe_decode.engines.vllm.rows.row_terms import RowTerms
from safe_decode.engines.vllm.rows.score_slots import ScoreSlots
from safe_decode.engines.vllm.rows.signals import SignalIds
from safe_decode.errors import GuardError
from safe_decode.monitor.config import MonitorConfig, reference
from safe_decode.policy.policy import Policy
from safe_decode.policy.redirect import CannedTexts

ENDED, CAPPED, BLOCK = 98, 99, 4
REFUSAL, AFTER = (50, 51), (60, 61, 62)
TERMS = RowTerms(threshold=1.0, policy=Policy("refuse"), watched_from=2, prompt_tokens=4, cap=5)


class Desk:
    """One row that reads tokens at positions 0, 1, ..., with scores of our choice.

    Blocks of the cache are handed out backwards, so that no slot is its position.
    """

    def __init__(self, terms=TERMS, kind="ema"):
        self.config = MonitorConfig(0.5, (0.0,), (0.0,), (1.0,), 0.0, kind=kind)
        self.judge = RowJudge(
            3,
            monitor=self.config,
            texts=CannedTexts(REFUSAL, AFTER, (), ()),
            signals=SignalIds(ENDED, CAPPED),
            device=torch.device("cpu"),
        )
        self.slots = ScoreSlots(40, 1, torch.device("cpu"))
        self.blocks = torch.tensor([[9, 7, 5, 3, 1]])
        self.judge.seat(1, terms)
        self.tokens, self.scores, self.read = [7, 8, 9, 10], {}, 0

    def forward(self, n, scores=(), *, marks=0):
        """Read n tokens; `marks` is added to the tokens that are written."""
        positions = torch.arange(self.read, self.read + n)
        given = torch.tensor(list(scores) or [0.0] * n)[:, None]
        self.scores |= dict(zip(positions.tolist(), given[:, 0].tolist(), strict=True))
        self.slots.forward.add_(1)
        ids = torch.tensor(self.tokens)[positions] + marks
        self.slots.write(self.rows(n).slots(positions[None])[0], given, ids, positions)
        self.read += n

    def rows(self, n):
        return JudgedRows(
            seats=np.array([1]),
            read=np.array([self.read]),
            in_forward=np.array([n]),
            known=np.array([len(self.tokens)]),
            newest=torch.tensor([self.tokens[self.read - 1]]),
            blocks=self.blocks,
            block_size=BLOCK,
        )

    def step(self, n=1):
        """Judge; say the id that is forced, or 20; return what was forced."""
        rows = self.rows(n)
        first = int(self.judge.consumed[1])
        due = torch.tensor([self.tokens[first : self.read]])
        (forced,) = self.judge.step(rows, self.slots, due).tolist()
        if rows.is_whole[0]:
            self.tokens.append(20 if forced == NOTHING else forced)
        return forced

    def go(self, *scores):
        forced = []
        for score in scores:
            self.forward(1, [score])
            forced.append(self.step())
        return forced


def begun(**changes):
    desk = Desk(replace(TERMS, **changes))
    desk.forward(4)
    assert desk.step(4) == NOTHING
    return desk


@pytest.mark.parametrize("kind", ["ema", "shrunk", "cusum"])
def test_a_prompt_in_chunks_and_a_row_that_comes_back_are_judged_as_the_reference(kind):
    desk = Desk(replace(TERMS, threshold=9.0, cap=99), kind)
    desk.forward(1, [5.0])
    desk.step(1)
    desk.forward(2, [5.0, 0.5])
    desk.step(2)
    desk.forward(1, [0.25])
    desk.step(1)
    desk.go(0.75, -1.0)
    # Preempted: the cache is lost, and all that is known is read again in two chunks.
    desk.blocks, desk.read = torch.tensor([[2, 4, 6, 8, 0]]), 0
    desk.forward(4, [5.0, 5.0, 0.5, 0.25])
    assert desk.step(4) == NOTHING
    desk.forward(len(desk.tokens) - 4, [0.75, -1.0, 0.5])
    assert desk.step(3) == NOTHING
    scores = [desk.scores[position] for position in range(2, desk.read)]
    wanted = reference(desk.config, 9.0, [[score] for score in scores])
    assert desk.judge.n_scores[1] == len(scores)
    assert float(desk.judge.state.statistic[1]) == pytest.approx(wanted[-1].statistic, abs=1e-6)


def test_a_row_that_trips_says_the_refusal_and_ends():
    assert begun().go(0.0, 9.0, 0.0, 0.0, 0.0) == [NOTHING, *AFTER, ENDED]
    desk = Desk()
    desk.forward(4, [0.0, 0.0, 0.0, 9.0])
    assert desk.step(4) == REFUSAL[0]
    assert desk.go(0.0, 0.0) == [REFUSAL[1], ENDED]
    assert begun(policy=Policy("stop")).go(9.0) == [ENDED]
    assert begun(policy=Policy("flag")).go(9.0, 9.0) == [NOTHING] * 2


def test_the_last_token_before_the_cap_is_judged():
    assert begun().go(*[0.0] * 5) == [*[NOTHING] * 4, CAPPED]
    assert begun().go(*[0.0] * 4, 9.0) == [*[NOTHING] * 4, AFTER[0]]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_ends_the_row_in_the_refusal(score):
    assert begun().go(score)[0] == AFTER[0]


def test_a_mark_of_another_token_place_or_time_closes_the_row():
    desk = begun()
    desk.forward(1, marks=1)  # as if another token had been read
    assert desk.step() == AFTER[0]
    desk = begun()
    desk.read += 1  # no forward: the slot is empty
    assert desk.step() == AFTER[0]
    desk = begun()
    desk.forward(1)
    desk.slots.forward.add_(1)  # the score is of an earlier forward
    assert desk.step() == AFTER[0]
    desk = begun()
    desk.forward(1)
    desk.blocks = desk.blocks.flip(1)  # the cache of another row
    assert desk.step() == AFTER[0]


def test_a_row_that_chooses_without_a_new_score_is_closed():
    desk = begun()
    desk.tokens.pop()
    rows = desk.rows(1)
    assert rows.is_whole[0]
    (forced,) = desk.judge.step(rows, desk.slots, torch.empty(1, 0)).tolist()
    assert forced == REFUSAL[0]


def test_a_forced_id_that_did_not_arrive_ends_the_row():
    desk = begun()
    desk.go(9.0)
    desk.tokens[-1] = 20
    assert desk.go(0.0, 0.0) == [ENDED, ENDED]


def test_forcing_leaves_other_rows_as_they_are_but_for_the_signals():
    desk = begun()
    logits = torch.randn(3, 100)
    logits[1, 5] = torch.nan
    before = logits.clone()
    desk.judge.force(logits, torch.tensor([NOTHING, 7, NOTHING]))
    assert logits[1].argmax() == 7
    assert torch.isneginf(logits[1]).sum() == 99
    assert torch.equal(logits[::2, :ENDED], before[::2, :ENDED])
    assert torch.isneginf(logits[::2, ENDED:]).all()


def test_a_seat_is_kept_until_it_is_needed():
    seats = RowSeats(2)
    assert seats.take("a") == (0, True)
    assert seats.take("a") == (0, False)
    seats.leave("a")
    assert seats.take("b") == (1, True)
    assert seats.take("a") == (0, False)
    seats.leave("a")
    assert seats.take("c") == (0, True)
    with pytest.raises(GuardError, match="has no more seats"):
        seats.take("a")
    seats.leave("nobody")
