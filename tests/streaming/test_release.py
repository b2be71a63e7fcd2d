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
