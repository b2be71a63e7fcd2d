"""What a notebook shows of a row, and what a console does."""

import dataclasses
from html.parser import HTMLParser

import pytest

from safe_decode.testing.bundles import decoder_for, peaks, threshold_between
from safe_decode.trace.notebook import trace_as_html
from safe_decode.trace.schema import SafetyTrace, TraceEnd, TraceHeader, TraceStep, read_traces

PROMPTS = ["hello", "what is it?", "tell me a long story", "go"]
HEADER = TraceHeader("digest", ("harm",), 0.01, "benign", 2.0, "valid", "rewind", 0)


def trace_of(text, *, trip=None, statistic=1.0, **header):
    steps = [TraceStep(0, None, (0.0,), 0.0, "scan", "below_threshold")]
    steps += [
        TraceStep(
            position,
            ord(letter),
            (0.0,),
            3.0 if position == trip else statistic,
            "trip" if position == trip else "pass",
            "above_threshold" if position == trip else "below_threshold",
        )
        for position, letter in enumerate(text, 1)
    ]
    outcome = "released" if trip is None else "refused"
    released = len(text) if trip is None else trip - 1
    end = TraceEnd(outcome, released, trip_step=trip)
    return SafetyTrace(dataclasses.replace(HEADER, **header), tuple(steps), end)


def letters(ids):
    return "".join(map(chr, ids))


class Tags(HTMLParser):
    """Tags, which must nest, and the text between them."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "hr":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(markup):
    tags = Tags()
    tags.feed(markup)
    assert not tags.open
    return tags


def test_markup_of_a_model_is_text_and_nothing_else():
    hostile = "<img src=x onerror=alert(1)>\u202e&amp;"
    drawn = trace_as_html(trace_of(hostile), decode=letters, text=hostile)
    tags = parsed(drawn)
    assert {tag for tag, _ in tags.seen} <= {"div", "p", "b", "span"}
    assert "\u202e" not in drawn and "onerror=alert(1)>" in tags.text


def test_the_trip_is_marked_by_a_sign_and_the_tokens_by_their_risk():
    drawn = trace_as_html(trace_of("abcdef", trip=4), decode=letters, text="No.")
    tags = parsed(drawn)
    assert "▲ trips" in tags.text and tags.text.index("abc") < tags.text.index("▲ trips")
    assert "trips at score 4" in tags.text and "threshold 2" in tags.text
    assert "The reader gets: No." in tags.text
    risks = [attrs["title"] for tag, attrs in tags.seen if tag == "span"]
    assert risks[3] == "risk 0.73" and risks[0] == "risk 0.27"


def test_nothing_is_asked_from_outside_and_letters_take_the_colour_of_the_page():
    drawn = trace_as_html(trace_of("abc"), decode=letters)
    for word in ("http", "src=", "<script", "<style", "@import", "url("):
        assert word not in drawn
    assert ";color:" not in drawn.replace("background", "") and "rgba(" in drawn


def test_a_trace_alone_shows_ids_and_warnings():
    tags = parsed(trace_of("abc", warnings=("not located",))._repr_html_())
    assert "97 98 99" in tags.text and "not located" in tags.text


def test_a_trace_without_ids_is_drawn_without_them():
    trace = trace_of("abc")
    (again,) = read_traces(list(trace.lines()))
    assert "· · · " in parsed(trace_as_html(again, decode=letters)).text


def test_a_long_row_stays_small():
    drawn = trace_as_html(trace_of("x" * 5000), decode=letters)
    assert len(drawn) < 300_000 and "and 3,000 tokens more" in drawn


@pytest.fixture
def output(llama, tokenizer):
    flagged = decoder_for(llama, tokenizer, redirect="flag").generate(PROMPTS, max_new_tokens=12)
    decoder = decoder_for(
        llama, tokenizer, redirect="refuse", threshold=threshold_between(peaks(flagged))
    )
    return decoder.generate(PROMPTS, max_new_tokens=12)


def test_an_output_shows_texts_in_a_notebook_and_none_in_a_log(output):
    assert {trace.tripped for trace in output.traces} == {True, False}
    tags = parsed(output._repr_html_())
    assert tags.text.count("The reader gets:") == len(PROMPTS)
    assert "I can't help with that." in tags.text and "▲ trips" in tags.text
    shown = repr(output)
    assert len(shown) < 120 and "refused" in shown and "released" in shown
    assert not any(text and text in shown for text in output.texts)
    assert repr(output.traces) == f"<{len(PROMPTS)} traces>"
    assert len(repr(output.traces[0])) < 200
