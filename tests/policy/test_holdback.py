import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_decode.errors import BeatError, ConfigurationError
from safe_decode.policy.holdback import HoldBack, released_tokens

events = st.lists(st.sampled_from(["say", "judge", "pin", "unpin", "end", "trip"]), max_size=60)


@given(st.integers(0, 8), events)
def test_release_never_precedes_evaluation(k, names):
    hold, released, tripped = HoldBack(k), 0, False
    for name in names:
        try:
            if name == "say":
                hold.say()
            elif name == "judge":
                released += hold.judge()
            elif name == "pin":
                pinned = hold.said
                released += hold.pin(pinned)
            elif name == "unpin":
                released += hold.pin(None)
            elif name == "end":
                released += hold.end()
            else:
                hold.trip()
                tripped = True
        except BeatError:
            pass
        assert hold.released == released <= hold.judged <= hold.said
        if hold.phase == "open":
            assert released <= released_tokens(hold.judged, k)
        if hold.phase == "ended":
            assert not tripped and released == hold.said


def test_a_token_waits_for_itself_and_the_k_after_it():
    hold = HoldBack(2)
    hold.say(4)
    assert [hold.judge() for _ in range(4)] == [0, 0, 1, 1]
    assert hold.end() == 2


def test_trip_drops_what_is_not_released_and_latches():
    hold = HoldBack(1)
    hold.say(5)
    hold.judge(4)
    assert hold.trip() == 2
    with pytest.raises(BeatError, match="tripped"):
        hold.judge()


def test_an_unjudged_tail_cannot_be_released():
    hold = HoldBack(0)
    hold.say(2)
    hold.judge()
    with pytest.raises(BeatError, match="1 tokens not judged"):
        hold.end()


def test_a_token_cannot_be_judged_before_it_is_said():
    with pytest.raises(BeatError, match="judged 1 tokens of 0 said"):
        HoldBack(0).judge()


def test_a_pinned_stop_string_is_held_whatever_is_judged():
    hold = HoldBack(0)
    hold.say(3)
    hold.pin(1)
    assert hold.judge(3) == 1
    assert hold.pin(None) == 2


def test_negative_hold_back_is_refused():
    with pytest.raises(ConfigurationError, match="holdback_tokens=-1"):
        HoldBack(-1)


CALLS = {
    "say": lambda hold: hold.say(),
    "judge": lambda hold: hold.judge(0),
    "pin": lambda hold: hold.pin(0),
    "close": lambda hold: hold.close(),
    "end": lambda hold: hold.end(),
    "trip": lambda hold: hold.trip(),
}


@pytest.mark.parametrize(("last", "phase"), [("end", "ended"), ("trip", "tripped")])
@pytest.mark.parametrize("action", CALLS)
def test_nothing_happens_to_a_row_that_is_over(last, phase, action):
    hold = HoldBack(0)
    CALLS[last](hold)
    with pytest.raises(BeatError, match=f"^cannot {action}: the row has {phase};"):
        CALLS[action](hold)
    assert hold.phase == phase


@pytest.mark.parametrize("looked", [0, 1, 2, 3])
def test_a_tail_that_lacks_unseen_tokens_is_withheld(looked):
    hold = HoldBack(2)
    hold.say(4)
    assert hold.judge(4) == 2
    hold.close()
    hold.say(looked)
    assert hold.judge(looked) == min(looked, 2)
    assert hold.withheld == 0, "nothing is withheld while the row may go on"
    hold.end(wanted=2)
    assert hold.released == min(4, 2 + looked) and hold.withheld == max(0, 2 - looked)


def test_a_tripped_row_withholds_nothing():
    hold = HoldBack(3)
    hold.say(2)
    hold.trip()
    assert hold.withheld == 0
