"""Monitor, policy, redirect and hold-back together, against plain Python one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from safe_decode.holdback import HoldBack
from safe_decode.monitor import MonitorConfig, RiskMonitor, reference
from safe_decode.policy import Policy
from safe_decode.session import Session

CONFIG = MonitorConfig(0.4, (0.0, 0.2), (0.1, -0.1), (1.0, 0.5), -0.2)
LOGIT = st.floats(-3, 3, width=16)
WILD = st.one_of(LOGIT, LOGIT, LOGIT, LOGIT, st.sampled_from([math.nan, math.inf, -math.inf]))


class Heard:
    """Stands for a tap: one forward is whatever was put last."""

    columns, n_columns = (0, 1), 2

    def __init__(self):
        self.features, self.forwards, self.positions = None, 0, 0

    def hear(self, features):
        self.features, self.forwards, self.positions = features, 1, features.shape[1]

    def keep_last(self, _n):
        pass

    def take(self):
        self.forwards = self.positions = 0
        return self.features

    def take_step(self):
        return self.take()[:, -1]

    discard = take


class GuardedRows(RuleBasedStateMachine):
    """A batch whose rows have their own threshold, redirect and hold-back, and end at will."""

    @initialize(data=st.data(), batch=st.integers(1, 4))
    def begin(self, data, batch):
        draw = data.draw
        kinds = st.sampled_from(["refuse", "rewind", "stop", "flag"])
        self.policies = [Policy(draw(kinds), draw(st.integers(0, 3))) for _ in range(batch)]
        self.thresholds = draw(st.lists(LOGIT, min_size=batch, max_size=batch))
        self.scanned = draw(st.lists(st.integers(1, 3), min_size=batch, max_size=batch))
        self.beats = Heard()
        self.session = Session(
            probe=lambda features: features,
            monitor=RiskMonitor(CONFIG, torch.tensor(self.thresholds)),
            policy=self.policies,
            beats=self.beats,
            scanned=self.scanned,
            device=torch.device("cpu"),
        )
        self.logits = [[] for _ in range(batch)]
        self.holds = [HoldBack(policy.holdback_tokens) for policy in self.policies]
        self.active = [True] * batch
        width = max(self.scanned)
        prompt = draw(
            st.lists(
                st.lists(heads(), min_size=width, max_size=width), min_size=batch, max_size=batch
            )
        )
        for row, scores in enumerate(prompt):
            self.logits[row] += scores[width - self.scanned[row] :]
        self._judge(torch.tensor(prompt), (width,), None)

    @precondition(lambda self: any(self.active))
    @rule(data=st.data())
    def choose_and_judge(self, data):
        """Every active row says a token; the next forward judges it."""
        new = [data.draw(heads()) for _ in self.active]
        for row, is_active in enumerate(self.active):
            if is_active:
                self.holds[row].say()
                self.logits[row].append(new[row])
        self._judge(torch.tensor(new)[:, None], (1,), torch.tensor(self.active))

    @precondition(lambda self: any(self.active))
    @rule(data=st.data())
    def end(self, data):
        """An active row ends by an end id; it is judged no more."""
        row = data.draw(st.sampled_from([r for r, a in enumerate(self.active) if a]))
        self.active[row] = False
        self.holds[row].end()

    @precondition(lambda self: hasattr(self, "active") and not any(self.active))
    @rule()
    def rest(self):
        """Every row has ended or tripped."""
        self.active = [False] * len(self.active)

    @invariant()
    def agrees(self):
        if not hasattr(self, "session"):
            return
        records = self.session.records()
        for row, record in enumerate(records):
            self._compare(row, record)

    def _judge(self, features, positions, active):
        self.beats.hear(features)
        trips = self.session.judge(positions, active)
        for row, is_active in enumerate(self.active):
            if not is_active:
                continue
            if bool(trips[row]) and self.policies[row].protects:
                said = max(0, len(self.logits[row]) - self.scanned[row])
                self.session.park(row, said=said)
                self.active[row] = False
                self.holds[row].trip()
            elif self.holds[row].said:
                self.holds[row].judge()

    def _compare(self, row, record):
        policy, k, first = self.policies[row], self.policies[row].holdback_tokens, self.scanned[row]
        steps = reference(CONFIG, self.thresholds[row], self.logits[row])
        sick = next((i for i, step in enumerate(steps) if not step.finite), len(steps))
        alarm = next((i for i, step in enumerate(steps[:sick]) if step.alarm), None)
        at = alarm if alarm is not None else (sick if sick < len(steps) else None)
        for index, step in enumerate(steps[:sick]):
            assert record.statistic[index] == pytest.approx(step.statistic, abs=1e-4)
        judged = len(steps) - first
        if at is None or not policy.protects:
            assert record.trip is None and record.judged == judged
            ended = self.holds[row].phase == "ended"
            assert self.holds[row].released == (judged if ended else max(0, judged - k))
            return
        # The prompt is scanned to its end; a row that tripped is judged no more.
        assert len(steps) == max(at + 1, first)
        passed = max(0, at - first)
        released = max(0, passed - k)
        clear = max(
            (i + 1 - first for i in range(at + 1) if steps[i].smoothed < CONFIG.low_mark), default=0
        )
        kept = released
        if policy.redirect == "rewind" and sick > at:
            kept = max(released, min(max(0, clear), passed))
        cut, hold = record.trip.cut, self.holds[row]
        assert (cut.kept, cut.released) == (kept, released)
        assert cut.kept + cut.dropped == max(0, at + 1 - first)
        assert hold.phase == "tripped" and hold.released == released <= cut.kept
        assert (record.trip.error is not None) == (sick < max(at + 1, first))
        if not kept:
            assert record.trip.snapshot is None, "a row of which nothing is kept starts anew"
            return
        wanted = steps[first + kept - 1]
        assert float(record.trip.snapshot.statistic) == pytest.approx(wanted.statistic, abs=1e-4)
        assert int(record.trip.snapshot.step) == first + kept


def heads():
    return st.lists(WILD, min_size=2, max_size=2)


QUICK = settings(
    max_examples=25,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_rows_follow_the_scalar_reference():
    run_state_machine_as_test(GuardedRows, settings=QUICK)


@pytest.mark.slow
def test_rows_follow_the_scalar_reference_in_10000_examples():
    run_state_machine_as_test(GuardedRows, settings=settings(QUICK, max_examples=10_000))
