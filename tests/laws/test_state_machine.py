"""Monitor, policy, redirect and hold-back together, against plain Python one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from safe_decode.monitor.monitor import MonitorConfig, reference
from safe_decode.policy.holdback import HoldBack
from safe_decode.policy.policy import Policy
from safe_decode.policy.redirect import Script, forced_scores
from safe_decode.probe.interface import Probe
from safe_decode.session.session import Session, SessionRow

_HEADS = {"start": (0.0, 0.2), "offset": (0.1, -0.1), "scale": (1.0, 0.5), "low_mark": -0.2}
_BANK = {"offset": (0.1, -0.1, 0.0, 0.2), "scale": (1.0, 0.5, 0.8, 0.7)}
CONFIGS = (
    MonitorConfig(0.4, **_HEADS),
    MonitorConfig(1.0, **_HEADS),
    MonitorConfig(0.4, **_HEADS, hits=2),
    MonitorConfig(1.0, **_HEADS, kind="mean", window=3),
    MonitorConfig(1.0, **_HEADS, kind="cusum", drift=0.5, hits=2),
    MonitorConfig(1.0, **_HEADS, kind="shrunk", window=4),
    MonitorConfig(1.0, **_HEADS, kind="top", window=3, best=2),
    MonitorConfig(0.5, **{**_HEADS, **_BANK}, kind="bank", window=4),
)
N_HEADS, VOCAB, REFUSAL = 2, 7, (3, 1, 4)
_SICK = {255: math.nan, 254: math.inf, 253: -math.inf}
CPU = torch.device("cpu")


def logits_of(drawn):
    """One byte a logit, -3.6 to 2.5, so that rows last; three of the 256 are not finite."""
    return [_SICK.get(byte, (byte - 150) / 42) for byte in drawn]


def heads_of(drawn):
    flat = logits_of(drawn)
    return [flat[i : i + N_HEADS] for i in range(0, len(flat), N_HEADS)]


class Heard:
    """Stands for a tap: one forward is whatever was put last."""

    def __init__(self):
        self.features, self.forwards, self.positions = None, 0, 0

    def hear(self, features):
        self.features, self.forwards, self.positions = features, 1, features.shape[1]

    def keep_last(self, _n):
        pass

    def take(self):
        self.forwards = self.positions = 0
        return self.features

    discard = take


class Unchanged(Probe):
    """A probe whose logits are its features, on every way to them."""

    def __call__(self, features):
        return features


def session_of(config, thresholds, policies, scanned, resume=None):
    return Session(
        probe=Unchanged(),
        config=config,
        rows=[
            SessionRow(threshold, policy, n, resume)
            for threshold, policy, n in zip(thresholds, policies, scanned, strict=True)
        ],
        recorder=Heard(),
        device=CPU,
    )


class GuardedRows(RuleBasedStateMachine):
    """A batch whose rows have their own threshold, redirect and hold-back, and end at will."""

    @initialize(
        config=st.sampled_from(CONFIGS),
        rows=st.lists(
            st.tuples(
                st.sampled_from(["refuse", "rewind", "stop", "flag"]),
                st.integers(0, 6),
                st.integers(0, 16),
                st.integers(1, 3),
            ),
            min_size=1,
            max_size=4,
        ),
        data=st.data(),
    )
    def begin(self, config, rows, data):
        self.config = config
        self.policies = [Policy(kind, k) for kind, k, _, _ in rows]
        # Off the grid of the scores: at a tie float32 and the float64 reference may differ.
        self.thresholds = [quarters / 4 + 0.0137 for _, _, quarters, _ in rows]
        self.scanned = [n for _, _, _, n in rows]
        self.session = session_of(config, self.thresholds, self.policies, self.scanned)
        self.logits = [[] for _ in rows]
        self.holds = [HoldBack(policy.holdback_tokens) for policy in self.policies]
        self.active = [True] * len(rows)
        self.scripts, self.emitted = {}, {}
        width = max(self.scanned)
        drawn = data.draw(_bytes(len(rows) * width))
        prompt = [heads_of(drawn[i :: len(rows)]) for i in range(len(rows))]
        for row, scores in enumerate(prompt):
            self.logits[row] += scores[width - self.scanned[row] :]
        self._judge(prompt, width, None)

    # One rule: hypothesis leaves rules out of most examples, and without this one nothing happens.
    @rule(data=st.data(), n_tokens=st.integers(0, 7), looks=st.integers(0, 4))
    def go_on(self, data, n_tokens, looks):
        """Every active row says tokens, each judged by the next forward; then one may end."""
        drawn = heads_of(data.draw(_bytes(len(self.active) * n_tokens)))
        for step in range(n_tokens):
            self._force(data)
            if any(self.active):
                self._say(drawn[step::n_tokens])
        ends = data.draw(st.integers(0, 15))
        if ends < len(self.active) and self.active[ends]:
            self.active[ends] = False
            self.holds[ends].end()
        if looks == 0:  # traces may be read at any time; nothing changes by it
            self._compare_all()

    def teardown(self):
        if hasattr(self, "session"):
            self._compare_all()
            event(f"tripped: {len(self.session.trips)}")

    def _say(self, new):
        for row, is_active in enumerate(self.active):
            if is_active:
                self.holds[row].say()
                self.logits[row].append(new[row])
        self._judge([[heads] for heads in new], 1, torch.tensor(self.active))

    def _judge(self, features, positions, active):
        self.session.reader._recorder.hear(torch.tensor(features))
        trips = self.session.judge((positions,), active)
        for row, is_active in enumerate(self.active):
            if not is_active:
                continue
            steps = reference(self.config, self.thresholds[row], self.logits[row])
            assert bool(trips[row]) == (steps[-1].alarm or not steps[-1].finite)
            if bool(trips[row]) and self.policies[row].protects:
                said = max(0, len(self.logits[row]) - self.scanned[row])
                self.session.park(row, said=said)
                self.active[row] = False
                self.holds[row].trip()
                if self.policies[row].redirect == "refuse":
                    self.scripts[row], self.emitted[row] = Script(REFUSAL), []
                if self.policies[row].redirect == "rewind":
                    self._continue(row, steps)
            elif self.holds[row].said:
                self.holds[row].judge()

    def _force(self, data):
        """Rows that refuse emit the next id of the refusal, whatever their scores hold."""
        due = {row: script for row, script in self.scripts.items() if script.has_next}
        if not due:
            return
        scores = torch.tensor([logits_of(data.draw(st.binary(min_size=VOCAB, max_size=VOCAB)))])
        scores = scores.expand(len(self.active), -1)
        forced = forced_scores(scores, {row: script.force() for row, script in due.items()})
        lost = data.draw(st.integers(0, 15)) == 0
        for row, is_forced in enumerate([row in due for row in range(len(self.active))]):
            if not is_forced:
                assert torch.equal(forced[row].nan_to_num(), scores[row].nan_to_num())
                continue
            wanted = REFUSAL[len(self.emitted[row])]
            token = int(forced[row].argmax())
            assert token == wanted and int(forced[row].isfinite().sum()) == 1
            if lost:
                token = (token + 1) % VOCAB
            assert self.scripts[row].check(token) == (wanted if lost else None)
            self.emitted[row].append(token)
            assert self.scripts[row].is_done == (len(self.emitted[row]) == len(REFUSAL))

    def _continue(self, row, steps):
        """A rewound row goes on from its snapshot as if what was cut had never been said."""
        trip, first = self.session.trips[row], self.scanned[row]
        if trip.error is not None or not trip.cut.kept:
            return
        config, threshold = self.config, self.thresholds[row]
        own = self.logits[row][: first + trip.cut.kept]
        opener = [[[1.5, -0.5], [0.25, 0.75]]]
        session = session_of(config, [threshold], [self.policies[row]], [2], trip.snapshot)
        session.reader._recorder.hear(torch.tensor(opener))
        trips = session.judge((2,))
        wanted = reference(config, threshold, [*own, *opener[0]])
        assert bool(trips[0]) == wanted[-1].alarm
        assert session.records()[0].statistic == pytest.approx(
            [step.statistic for step in wanted[-2:]], abs=1e-4
        )
        assert int(session.state.clear_point[0]) == wanted[-1].clear_point
        assert not steps[first + trip.cut.kept - 1].alarm, "what is kept had not tripped"

    def _compare_all(self):
        for row, record in enumerate(self.session.records()):
            self._compare(row, record)

    def _compare(self, row, record):
        policy, k, first = self.policies[row], self.policies[row].holdback_tokens, self.scanned[row]
        steps = reference(self.config, self.thresholds[row], self.logits[row])
        sick = next((i for i, step in enumerate(steps) if not step.finite), len(steps))
        alarm = next((i for i, step in enumerate(steps[:sick]) if step.alarm), None)
        at = alarm if alarm is not None else (sick if sick < len(steps) else None)
        assert sum(record.logits, []) == pytest.approx(sum(self.logits[row], []), nan_ok=True)
        assert record.statistic[:sick] == pytest.approx(
            [step.statistic for step in steps[:sick]], abs=1e-4
        )
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
        kept = released
        if policy.redirect == "rewind" and sick > at:
            kept = max(released, min(max(0, steps[at].clear_point + 1 - first), passed))
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


def _bytes(n):
    return st.binary(min_size=n * N_HEADS, max_size=n * N_HEADS)


QUICK = settings(
    max_examples=100,
    stateful_step_count=6,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_rows_follow_the_scalar_reference():
    run_state_machine_as_test(GuardedRows, settings=QUICK)


@pytest.mark.slow
def test_rows_follow_the_scalar_reference_in_10000_examples():
    run_state_machine_as_test(GuardedRows, settings=settings(QUICK, max_examples=10_000))
