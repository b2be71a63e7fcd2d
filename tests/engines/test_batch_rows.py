"""Rows of one served batch: what happens to one leaves its neighbours alone, and is told."""

import pytest

from safe_decode.engines.rows import Row, RowPolicy, RowRequest, Sampling
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.streaming.events import Finished, GuardText, Released, Tripped
from safe_decode.streaming.release import RowRelease
from tests.servers import staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT


def run(engine, *asked, on_event=None):
    """Run rows of (messages, redirect) in one batch; return the rows and their events."""
    told = [[] for _ in asked]
    rows = []
    for index, (messages, redirect) in enumerate(asked):
        policy = RowPolicy(engine.facts.alpha, redirect, engine.facts.holdback_tokens)

        def emit(event, index=index):
            told[index].append(event)
            if on_event is not None:
                on_event(rows[index], event)

        request = RowRequest(engine.chat(messages), Sampling(max_tokens=48, seed=0), policy)
        rows.append(Row(request, emit))
    engine.run(rows)
    return rows, told


def text_of(events):
    return "".join(e.text for e in events if isinstance(e, Released | GuardText))


@pytest.fixture
def engine():
    made = TransformersEngine(staged_engine()._decoder, keep_traces=True)
    yield made
    made.close()


@pytest.mark.parametrize("redirect", ["refuse", "rewind"])
def test_a_redirect_that_fails_closes_its_own_row_alone(engine, monkeypatch, redirect):
    def fails(*_):
        raise RuntimeError("no word comes out")

    monkeypatch.setattr(RowRelease, "speak", fails)
    rows, told = run(engine, (CALM, redirect), (ATTACK, redirect), (CALM, redirect))
    assert [events[-1].outcome for events in told] == ["released", "closed", "released"]
    assert "no word comes out" in told[1][-1].error
    assert text_of(told[0]) == text_of(told[2]) == CALM_TEXT
    assert all(row.trace is not None for row in rows)


def test_a_reader_who_leaves_while_the_row_goes_on_behind_a_trip_ends_it(engine):
    def leave(row, event):
        if isinstance(event, GuardText):
            row.cancel()

    rows, told = run(engine, (ATTACK, "rewind"), (CALM, "rewind"), on_event=leave)
    assert isinstance(told[0][-1], Finished) and told[0][-1].reason == "cancelled"
    assert sum(isinstance(event, Tripped) for event in told[0]) == 1
    assert rows[0].trace.end.outcome == "cancelled" and rows[0].trace.tripped
    assert rows[1].trace.end.outcome == "released" and text_of(told[1]) == CALM_TEXT


def test_a_reader_who_leaves_before_any_trip_is_told_of_in_the_trace(engine):
    def leave(row, event):
        if isinstance(event, Released):
            row.cancel()

    rows, told = run(engine, (CALM, "stop"), on_event=leave)
    assert told[0][-1].reason == "cancelled"
    end = rows[0].trace.end
    shown = sum(len(event.token_ids) for event in told[0] if isinstance(event, Released))
    assert (end.outcome, end.released_tokens) == ("cancelled", shown)
