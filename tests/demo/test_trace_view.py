"""A trace, read as a story: every token in its place, none lost, the trip marked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_decode.demo.trace_view import side_of
from safe_decode.trace.schema import SafetyTrace, TraceEnd, TraceHeader, TraceStep
from safe_decode.trace.shown import pieces_of

HEADER = TraceHeader("digest", ("harm",), 0.01, "benign", 2.0, "valid", "rewind", 0)


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def trace_of(text, *, prefill="", trip=None, statistic=1.0, redirected="", **end):
    tokens = (None, *prefill.encode(), *text.encode())
    steps = []
    for position, token in enumerate(tokens):
        action = "trip" if position == trip else "scan" if position <= len(prefill) else "pass"
        why = "above_threshold" if position == trip else "below_threshold"
        steps.append(TraceStep(position, token, (0.0,), statistic, action, why))
    for position, token in enumerate(redirected.encode(), 1):
        steps.append(TraceStep(position, token, (0.0,), 0.0, "watch", "latched", attempt=1))
    given = len(prefill)
    outcome = "released" if trip is None else "rewound"
    ended = TraceEnd(outcome, 0, prefill_tokens=given, trip_step=trip, **end)
    return SafetyTrace(HEADER, tuple(steps), ended)


def story(side):
    return [(token.text, token.mark) for token in side.tokens]


def test_an_untripped_row_is_given_and_plain():
    side = side_of(trace_of("ab", prefill="P"), final_ids=b"ab", text="ab", decode=decode)
    assert story(side) == [("P", "prefill"), ("a", "plain"), ("b", "plain")]
    assert not side.tripped
    assert all(token.risk == pytest.approx(0.2689, abs=1e-4) for token in side.tokens)


def test_a_rewound_row_keeps_drops_trips_and_goes_on():
    trace = trace_of("abcd", trip=4, redirected="no")
    side = side_of(trace, final_ids=b"abno", text="abno", decode=decode, verdict="refusal")
    assert story(side) == [
        ("a", "plain"),
        ("b", "plain"),
        ("c", "dropped"),
        ("d", "trip"),
        ("n", "redirect"),
        ("o", "redirect"),
    ]
    assert side.tripped
    assert side.verdict == "refusal"


def test_what_was_said_after_the_tripping_token_is_dropped_too():
    side = side_of(trace_of("abc", trip=2), final_ids=b"a", text="a", decode=decode)
    assert story(side) == [("a", "plain"), ("b", "trip"), ("c", "dropped")]


def test_a_redirect_that_starts_like_what_was_dropped_hides_no_trip():
    side = side_of(trace_of("ab", trip=1), final_ids=b"abc", text="abc", decode=decode)
    assert story(side)[0] == ("a", "trip")
    assert [mark for _, mark in story(side)].count("redirect") == 3


@pytest.mark.parametrize(("trip", "place"), [(0, 0), (1, 1), (2, 2)])
def test_a_trip_within_the_prompt_keeps_the_prefill_whole(trip, place):
    trace = trace_of("", prefill="PQ", trip=trip)
    side = side_of(trace, final_ids=b"no", text="no", decode=decode)
    marks = [mark for _, mark in story(side)]
    assert marks.index("trip") == place
    assert "".join(text for text, mark in story(side) if mark == "prefill") == "PQ"
    assert "".join(text for text, mark in story(side) if mark == "redirect") == "no"


def test_in_flag_mode_every_token_stands_and_the_trip_is_marked():
    trace = trace_of("abc", trip=2, statistic=9.0, unprotected=True)
    trace = replace(trace, header=replace(HEADER, redirect="flag"))
    side = side_of(trace, final_ids=b"abc", text="abc", decode=decode)
    assert story(side) == [("a", "plain"), ("b", "plain"), ("", "trip"), ("c", "plain")]
    assert side.tokens[0].risk > 0.99


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_pieces_join_to_the_text_even_where_tokens_split_characters(text):
    ids = text.encode()
    pieces = pieces_of(ids, decode)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
