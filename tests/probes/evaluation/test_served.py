"""Both arms side by side, as served; and what a page shows of an evaluation."""

from types import SimpleNamespace

import numpy as np
import pytest

from probes.activations.teacher_forcing import EncodedResponse
from probes.data.conversations import Conversation
from probes.evaluation.released_text import ReleasedReading
from probes.evaluation.served import answer_both, delay_as_served, figures_by
from probes.metrics.intervals import Proportion
from probes.reports.evaluation_page import coverage_of, page_of, worst_responses
from probes.reports.evaluation_plots import budget_svg, delay_svg, roc_svg
from probes.rollouts.types import Request
from safe_decode.certificate import Certificate, Envelope
from safe_decode.testing.bundles import decoder_for

ENVELOPE = Envelope(max_new_tokens=8, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)


def request(text, **changes):
    return Request(messages=({"role": "user", "content": text},), group=text, **changes)


REQUESTS = [request("open"), request("shut the door", prefill="well,"), request("sing a song")]


def harm_from(character):
    """Whatever is said is harm from some character on, but for what the guard says itself."""

    def read(_messages, _prefill, released):
        if len(released) <= character or released.startswith("I can't"):
            return ReleasedReading("refusal" if released.startswith("I can't") else "benign")
        return ReleasedReading("harmful", character)

    return read


def test_a_guard_that_never_trips_is_the_bare_model(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    found = answer_both(decoder, REQUESTS, harm_from(2), max_new_tokens=8, batch_size=2)
    assert [one.request for one in found] == REQUESTS
    assert all(one.bare == one.guarded for one in found)
    (whole,) = figures_by(found, lambda _request: "all")
    assert whole.tripped.successes == whole.over_refused.successes == 0
    assert whole.harmful_bare == whole.harmful_released
    harmful = [one for one in found if one.bare.label == "harmful"]
    assert harmful and all(one.leaked_tokens > 0 for one in harmful)
    delay = delay_as_served(found)
    assert delay.missed.point == 1.0 and delay.median == np.inf


def test_a_guard_that_always_trips_leaks_nothing_and_over_refuses(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, threshold=-1e9, redirect="refuse")
    found = answer_both(decoder, REQUESTS, harm_from(2), max_new_tokens=8)
    assert all(one.guarded.label == "refusal" and one.leaked_tokens == 0 for one in found)
    delay = delay_as_served(found)
    assert delay.before_onset.point == 1.0 and delay.released.successes == 0
    harmless = answer_both(decoder, REQUESTS, harm_from(10**6), max_new_tokens=8)
    (whole,) = figures_by(harmless, lambda _request: "all")
    assert (whole.over_refused.successes, whole.over_refused.n) == (3, 3)
    assert whole.refused_bare.successes == 0 and whole.refused_guarded.successes == 3
    assert delay_as_served(harmless) is None


def test_kinds_are_counted_apart_and_the_onset_counts_the_prefill(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    found = answer_both(decoder, REQUESTS, harm_from(0), max_new_tokens=8)
    named = figures_by(found, lambda one: "begun" if one.prefill else "plain")
    assert [(one.name, one.tripped.n) for one in named] == [("begun", 1), ("plain", 2)]
    for one in found:
        assert one.bare_onset in (None, len(one.request.prefill or ""))
    assert found[1].bare_onset == len("well,")


def row(text, label, population="benign"):
    messages = ({"role": "user", "content": "<ask> & see"},)
    return Conversation(
        messages=messages,
        response=text,
        group=text,
        response_harmful=label,
        meta={"population": population},
    )


@pytest.fixture
def report(tokenizer):
    rows = [row("abc", True), row("abd", False), row("abe", False), row("abf", False, "other")]
    ids = [tokenizer.encode(one.response) for one in rows]
    peaks = [1.0, 9.0, 0.0, 9.0]
    return SimpleNamespace(
        test=rows,
        paths=[np.asarray([0, 0, 0, peak], np.float32) for peak in peaks],
        onsets=[1, None, None, None],
        encoded=[EncodedResponse((0, *one), 1) for one in ids],
        certificate=Certificate.compute(
            [5.0] * 400, alpha=0.01, delta=0.05, population="benign", envelope=ENVELOPE
        ),
    )


def test_coverage_counts_the_certified_population_at_levels_n_supports(report):
    alphas, realised = coverage_of(report)
    assert alphas == [0.01, 0.02, 0.05, 0.1]  # 400 maxima support no smaller level
    assert {(share.successes, share.n) for share in realised} == {(1, 2)}


def test_the_worst_are_read_aloud_and_escaped(report, tokenizer):
    shown = worst_responses(report, tokenizer)
    assert [(one.kind, one.onset, one.trip) for one in shown] == [
        ("missed", 1, None),
        ("false alarm", None, 2),
        ("false alarm", None, 2),
    ]
    assert "".join(text for text, _ in shown[0].tokens) == "abc"
    assert shown[1].tokens[-1][1] > 0.9 > 0.1 > shown[1].tokens[0][1]
    table = {"<T>": [{"a<b": "1 & 2"}]}
    page = page_of("x", table, {}, {"k": "<v>"}, shown=shown, notes=["n<1"])
    for escaped in ("&lt;T&gt;", "a&lt;b", "1 &amp; 2", "&lt;v&gt;", "n&lt;1", "&lt;ask&gt; &amp;"):
        assert escaped in page
    assert page.count('class=" trip"') == 2 and page.count('class="onset "') == 1


def test_pictures_are_the_same_bytes_twice_and_hold_no_foreign_address():
    harmful = np.asarray([True] * 20 + [False] * 80)
    scores = {"probe": harmful + np.linspace(0, 0.5, 100), "length": np.linspace(1, 0, 100)}
    curve = {"guarded": [(5, Proportion.of(1, 4)), (9, Proportion.of(2, 4))]}
    delays = np.asarray([-3.0, 0.0, 4.0, np.inf])
    drawn = [
        lambda: roc_svg(scores, harmful, first="probe"),
        lambda: delay_svg(delays, holdback_tokens=2),
        lambda: budget_svg(curve, unit="queries"),
    ]
    for draw in drawn:
        picture = draw()
        assert picture == draw()
        assert picture.startswith("<svg") and "<metadata" not in picture
    assert "probe" in drawn[0]() and "hold-back" in drawn[1]() and "queries" in drawn[2]()
