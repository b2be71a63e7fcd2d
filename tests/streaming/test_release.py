"""The release room on its own: what a reader sees of a row whose text ends it."""

import pytest

from safe_decode.policy.redirect import Cut
from safe_decode.session.records import Trip
from safe_decode.session.turns import Turns
from safe_decode.streaming.events import Released
from safe_decode.streaming.release import ReleaseRules, RowRelease

WORDS = ["a ", "b ", "END.", "EN", "D", " tail", "x", "y", "z"]


class WordTokenizer:
    """One id a word of `WORDS`."""

    def decode(self, ids, **_):
        return "".join(WORDS[i] for i in ids)


def released(said, *, k, stop=("END",), includes_stop=False, hears=False, tells_notes=False):
    """Let a row say ids; at its stop string it is cut, and looks ahead for k tokens."""
    events = []
    row = RowRelease(
        0,
        WordTokenizer(),
        holdback_tokens=k,
        redirect="refuse",
        rules=ReleaseRules(stop, includes_stop, tells_notes),
        emit=events.append,
        is_cancelled=lambda: False,
    )
    for place, token in enumerate(said):
        row.judge()
        is_last = place == len(said) - 1
        if hears:
            assert row.hear(token, logprob=-1.0) == is_last
        row.take(token, 0, Turns(["cut" if is_last else "says"], [False], [k]))
    for n in range(k):
        row.judge()
        row.take(6, 0, Turns(["looks"], [n == k - 1], [k]))
    if k:
        row.judge()
        row.take(6, 0, Turns(["looks"], [False], [k]))
    else:
        row.judge()
        row.end(0)
    assert row.is_over
    return row, events


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("hears", [False, True])
@pytest.mark.parametrize("said", [[0, 1, 2], [0, 1, 3, 4]])
def test_no_part_of_a_stop_string_is_shown_while_its_row_looks_ahead(said, k, hears):
    row, events = released(said, k=k, hears=hears)
    assert "".join(e.text for e in events) == row.text == "a b "
    assert row.stop_string == "END" and row.reason == "stop"
    assert row.token_ids == [0, 1]


def test_a_stop_string_is_kept_where_it_is_asked_for():
    row, events = released([0, 1, 2], k=2, includes_stop=True)
    assert "".join(e.text for e in events) == row.text == "a b END."


def test_notes_say_what_is_shown_and_no_more():
    row, events = released([0, 3, 4], k=1, stop=("ND",), hears=True, tells_notes=True)
    notes = [note for e in events if isinstance(e, Released) for note in e.notes]
    assert [note.text for note in notes] == ["a ", "E"] and row.text == "a E"
    assert [note.token for note in notes] == [0, 3], "what is shown in part is a token too"
    assert {note.logprob for note in notes} == {-1.0}
    assert row.shown_tokens == 2


def test_a_trip_behind_a_stop_string_shows_none_of_it():
    events = []
    row = RowRelease(
        0,
        WordTokenizer(),
        holdback_tokens=1,
        redirect="refuse",
        rules=ReleaseRules(("END",), includes_stop=False),
        emit=events.append,
        is_cancelled=lambda: False,
    )
    for token, turn in ((0, "says"), (2, "cut"), (6, "looks")):
        row.judge()
        row.take(token, 0, Turns([turn], [False], [1]))
    row.trip(Trip(Cut(kept=2, released=2, dropped=0), None, None))
    assert "".join(e.text for e in events if isinstance(e, Released)) == row.text == "a "


def row_of(events, *, k=0, stop=(), tokenizer=None, **rules):
    return RowRelease(
        0,
        tokenizer or WordTokenizer(),
        holdback_tokens=k,
        redirect="refuse",
        rules=ReleaseRules(stop, **rules),
        emit=events.append,
        is_cancelled=lambda: False,
    )


class ByteTokenizer:
    """One id a byte; what is no whole character is shown as the replacement character."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def test_stop_strings_stay_and_notes_are_left_out_unless_asked_for():
    assert ReleaseRules() == ReleaseRules((), includes_stop=True, tells_notes=False)
    events = []
    row = row_of(events)
    row.say(0)
    row.judge()
    assert events[0].notes == ()


@pytest.mark.parametrize("includes_stop", [False, True])
def test_a_row_that_ends_with_its_stop_string_shows_all_before_it(includes_stop):
    events = []
    row = row_of(events, k=5, stop=("END",), includes_stop=includes_stop)
    for token in (0, 1, 3, 4):
        row.say(token)
        row.judge()
    assert not events, "the row is shorter than what it holds back"
    row.end()
    assert row.token_ids == ([0, 1, 3, 4] if includes_stop else [0, 1])
    assert row.text == ("a b END" if includes_stop else "a b ")
    assert row.stop_string == "END"


def test_a_stop_string_may_end_where_a_token_ends_and_the_next_one_begins():
    events = []
    row = row_of(events, k=9, stop=("b ",), includes_stop=False, tells_notes=True)
    for token in (0, 1):
        row.say(token)
    row.judge()
    row.end()
    assert (row.text, row.token_ids, row.shown_tokens) == ("a ", [0], 1)
    assert [note.token for note in events[0].notes] == [0]


def test_notes_hold_the_statistic_of_the_score_that_judged_the_token():
    events = []
    row = row_of(events, tells_notes=True)
    for statistic, token in ((None, 0), (0.25, 1), (0.75, 3), (None, 4)):
        row.judge(statistic)
        row.say(token)
    row.trip(Trip(Cut(kept=2, released=2, dropped=2), None, None), 1.5)
    notes = [note for e in events if isinstance(e, Released) for note in e.notes]
    assert [(n.token, n.statistic) for n in notes] == [(0, 0.25), (1, 0.75), (3, None)]
    tripped = events[-1]
    assert tripped.statistic == 1.5 and [n.statistic for n in tripped.dropped] == [1.5]
    assert [n.text for n in tripped.dropped] == ["D"]


def test_a_character_is_shown_when_it_is_whole_and_its_beginning_at_the_end():
    events = []
    row = row_of(events, tokenizer=ByteTokenizer(), tells_notes=True)
    for token in b"a\xc3":
        row.say(token)
        row.judge()
    assert row.text == "a" and row.token_ids == [0x61, 0xC3]
    row.say(0xA9)
    row.judge()
    assert row.text == "a\u00e9"
    row.say(0xC3)
    row.judge()
    row.end()
    assert row.text == "a\u00e9\ufffd" and row.shown_tokens == 4
    assert "".join(note.text for e in events for note in e.notes) == "a\u00e9"


def test_what_a_trip_cuts_inside_a_character_is_completed_unless_a_stop_string_cuts_it():
    for stop, text in (((), "a\ufffd"), (("\u00e9",), "a\ufffd")):
        events = []
        row = row_of(events, tokenizer=ByteTokenizer(), stop=stop, includes_stop=False)
        for token in b"a\xc3":
            row.say(token)
            row.judge()
        row.trip(Trip(Cut(kept=2, released=2, dropped=0), None, None))
        row.complete()
        assert row.text == text and "".join(getattr(e, "text", "") for e in events) == text
