"""Rows that leave, join and move are judged as if each had a session of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_decode.errors import ConfigurationError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.policy.policy import Policy
from safe_decode.probe.interface import Probe
from safe_decode.session.session import BatchUpdate, JoiningRow, Session, SessionRow

CPU = torch.device("cpu")
CONFIG = MonitorConfig(
    start=(0.0, 0.0), scale=(1.0, 2.0), offset=(0.0, 0.5), smoothing=0.4, low_mark=0.5
)


class Identity(Probe):
    """A probe whose logits are its features."""

    def __call__(self, features):
        if features.shape[-1] != 2:
            raise ConfigurationError(f"{features.shape[-1]} features, wanted 2.")
        return features


class Silent:
    """A recorder that nobody talks to: features are given."""

    def keep_last(self, n_positions):
        pass


def session_of(*rows):
    return Session(probe=Identity(), config=CONFIG, rows=rows, recorder=Silent(), device=CPU)


def row_of(number):
    redirect = ("refuse", "rewind", "stop", "flag")[number % 4]
    return SessionRow(0.5 + number % 3, Policy(redirect, number % 3), scanned=1 + number % 2)


def features_of(number, n):
    """Draw the features of a row, the same ones whoever asks."""
    return torch.randn(40, 2, generator=torch.Generator().manual_seed(number))[:n] * 1.5


class Solo:
    """One row in a session of its own, fed one position at a time."""

    def __init__(self, number):
        self.number, self.row = number, row_of(number)
        self.session, self.fed = session_of(self.row), 0
        for _ in range(self.row.scanned):
            self.feed()

    def next_features(self):
        return features_of(self.number, self.fed + 1)[-1]

    def feed(self):
        trips = self.session.judge_features(self.next_features()[None])
        self.fed += 1
        return bool(trips[0])

    def record(self):
        return self.session.records()[0]


def same(got, wanted):
    assert got.statistic == wanted.statistic and got.logits == wanted.logits
    assert got.smoothed == wanted.smoothed and got.alarm == wanted.alarm
    assert got.threshold == wanted.threshold and got.scanned == wanted.scanned
    assert (got.trip is None) == (wanted.trip is None)
    if got.trip is not None:
        assert got.trip.cut == wanted.trip.cut
        held, alone = got.trip.snapshot, wanted.trip.snapshot
        assert (held is None) == (alone is None)
        if held is not None:
            assert all(torch.equal(a, b) for a, b in zip(held, alone, strict=True))


def joining(number):
    row = row_of(number)
    return JoiningRow(row, features_of(number, row.scanned))


class Batch:
    """Rows in one session, each beside its own."""

    def __init__(self):
        self.rows, self.n_rows = [Solo(0)], 1
        self.session = session_of(row_of(0))
        for position in features_of(0, row_of(0).scanned):
            self.session.judge_features(position[None])

    def say(self):
        """Every row says a token; protected ones that trip are parked, and fed all the same."""
        features = torch.stack([solo.next_features() for solo in self.rows])
        trips = self.session.judge_features(features)
        for place, solo in enumerate(self.rows):
            assert bool(trips[place]) == solo.feed()
            if trips[place] and solo.row.policy.protects:
                said = solo.fed - solo.row.scanned
                solo.session.park(0, said=said)
                self.session.park(place, said=said)

    def change(self, leaving, n_new, swaps):
        """Let rows leave and others join, fill the gaps from behind, and swap two rows."""
        places = {place: solo for place, solo in enumerate(self.rows) if place not in leaving}
        free = [*leaving, *range(len(self.rows), len(self.rows) + n_new)][:n_new]
        added = {place: self.n_rows + i for i, place in enumerate(free)}
        self.n_rows += n_new
        places |= {place: Solo(number) for place, number in added.items()}
        moved = []
        for gap in range(len(places)):
            if gap not in places:
                moved.append((max(places), gap))
                places[gap] = places.pop(max(places))
        if len(places) > 1:
            one, other = swaps % len(places), (swaps + 1) % len(places)
            moved.append((one, other))
            places[one], places[other] = places[other], places[one]
        left = [self.rows[place] for place in leaving]
        joins = {place: joining(number) for place, number in added.items()}
        for got, solo in zip(
            self.session.update(BatchUpdate(leaving, joins, moved)), left, strict=True
        ):
            same(got, solo.record())
        self.rows = [places[place] for place in range(len(places))]

    def compare(self):
        parked = self.session.parked
        for place, (got, solo) in enumerate(zip(self.session.records(), self.rows, strict=True)):
            same(got, solo.record())
            assert self.session.judged(place) == solo.session.judged(0)
            has_tripped = bool(solo.session.trips)
            assert (place in self.session.trips) == has_tripped
            assert (parked is not None and bool(parked[place])) == has_tripped


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_that_come_and_go_are_judged_as_if_alone(data):
    batch = Batch()
    for _ in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(0, 4))):
            batch.say()
        n_rows = len(batch.rows)
        leaving = sorted(data.draw(st.sets(st.integers(0, n_rows - 1))))
        n_new = data.draw(st.integers(0 if len(leaving) < n_rows else 1, 3))
        batch.change(leaving, n_new, data.draw(st.integers(0, 5)))
        batch.compare()
    batch.say()
    batch.compare()


def test_a_row_resumes_where_it_stood():
    whole = Solo(1)
    begun = session_of(row_of(1))
    for position in features_of(1, 4):
        begun.judge_features(position[None])
        if whole.fed < 4:
            whole.feed()
    state = begun.state.row(0)
    prompt = features_of(1, 5)[4:]
    resumed = SessionRow(row_of(1).threshold, row_of(1).policy, 1, state)
    other = session_of(row_of(2))
    other.judge_features(torch.zeros(1, 2))
    other.update(BatchUpdate(added={1: JoiningRow(resumed, prompt)}))
    whole.feed()
    got, wanted = other.state.row(1), whole.session.state.row(0)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


ALLOWS = SessionRow(1.0, Policy("refuse", on_error="allow"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (BatchUpdate(removed=[2]), "place 2, where no row stands"),
        (BatchUpdate(added={0: joining(3)}), "place 0, where a row stands"),
        (BatchUpdate(removed=[0]), r"the places \[1\], wanted 0 to n - 1"),
        (BatchUpdate(removed=[0, 1]), "at least one row"),
        (BatchUpdate(moved=[(4, 0)]), "place 4, where no row stands"),
        (
            BatchUpdate(added={2: JoiningRow(row_of(0), torch.zeros(3, 2))}),
            "has 3 positions, wanted scanned=1",
        ),
        (
            BatchUpdate(removed=[1], added={1: JoiningRow(ALLOWS, torch.zeros(1, 2))}),
            "on_error differs between rows",
        ),
        (
            BatchUpdate(removed=[1], added={1: JoiningRow(row_of(0), torch.zeros(1, 7))}),
            "7 features, wanted 2",
        ),
    ],
)
def test_a_change_that_cannot_be_is_refused_and_nothing_has_changed(change, says):
    session = session_of(row_of(0), row_of(1))
    session.judge_features(torch.zeros(2, 2))
    before = session.records()
    with pytest.raises(ConfigurationError, match=says):
        session.update(change)
    assert session.batch == 2 and session.records() == before
    assert session.roster.rows == (row_of(0), row_of(1))
    session.judge_features(torch.zeros(2, 2))
    assert [len(record.statistic) for record in session.records()] == [2, 2]
