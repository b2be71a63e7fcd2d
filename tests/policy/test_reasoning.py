"""Marked reasoning: thresholds of its own, wherever and however a response is judged."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from probes.data.conversations import Conversation
from probes.recipes.reasoning import NO_SCORE, add_reasoning, maxima_apart
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.numpy_runtime import NumpyBundle
from safe_decode.certificate import Certificate
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import (
    BundleCorruptError,
    CertificateError,
    ConfigurationError,
    DataError,
    UnsupportedError,
)
from safe_decode.monitor.monitor import MonitorConfig, RiskMonitor, StatisticKind, reference
from safe_decode.policy.reasoning import OpenTurn, ReasoningSpans, SpanMarks, SpanReader
from safe_decode.policy.self_check import HeaderCheck
from safe_decode.prompts.batch import from_prompts
from safe_decode.prompts.chat import encode_chat
from safe_decode.streaming.events import Ended
from safe_decode.testing.bundles import OPENER, REFUSAL, bundle_for, decoder_for, random_probe
from safe_decode.testing.models import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from safe_decode.trace.replay import replay
from safe_decode.trace.schema import read_traces
from tests.laws.test_laws import bare, same_row
from tests.own_rows import as_own

OPENS, CLOSES = "<think>", "</think>"
PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]


def certified(threshold, *, alpha=0.5):
    envelope = bundle_for(tiny_model(), byte_tokenizer()).certificate().envelope
    return Certificate.compute(
        [threshold] * 20, alpha=alpha, delta=0.05, population="benign", envelope=envelope
    )


def reasoning_decoder(model, tokenizer, *, inside, outside, **options):
    spans = ReasoningSpans(OPENS, CLOSES, (certified(inside),))
    holdback = options.pop("holdback", 2)
    bundle = bundle_for(model, tokenizer, threshold=outside, holdback=holdback, reasoning=spans)
    return SafeDecoder(model, tokenizer, bundle, **options)


class Says(LogitsProcessor):
    """Makes every row say given text, in the middle of its own tokens."""

    def __init__(self, tokenizer, text, at, prompt_tokens):
        self.ids, self.at = tokenizer.encode(text), at
        self.prompt_tokens = prompt_tokens

    def __call__(self, ids, scores):
        place = ids.shape[1] - self.prompt_tokens - self.at
        if 0 <= place < len(self.ids):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.ids[place]] = 1.0  # 0 would be a log-probability
        return scores


def thinking(tokenizer, prompts=PROMPTS):
    """Options that make rows open a span at once and close it at token 16."""
    width = from_prompts(tokenizer, prompts, None, torch.device("cpu")).input_ids.shape[1]
    return {
        "max_new_tokens": 40,
        "min_new_tokens": 40,
        "logits_processor": LogitsProcessorList(
            [Says(tokenizer, OPENS, 0, width), Says(tokenizer, CLOSES, 16, width)]
        ),
    }


# --- marks


MARKS, CPU = SpanMarks((7, 8), (9,)), torch.device("cpu")


def test_a_span_opens_by_the_first_ids_of_the_turn_and_closes_once():
    assert MARKS.phases([7, 8, 1, 9, 1], OpenTurn()) == [False, False, True, True, False, False]
    assert MARKS.phases([7, 8, 9, 7, 8, 1], OpenTurn())[3:] == [False] * 4, "a turn has one span"
    assert MARKS.phases([1, 7, 8, 1], OpenTurn()) == [False] * 5, "in the middle a mark is text"
    assert MARKS.phases([7, 7, 8], OpenTurn()) == [False] * 4
    opened = OpenTurn(is_open=True)
    assert MARKS.phases([1, 9, 7, 8], opened) == [True, True, False, False, False]
    assert MARKS.phases([7, 8, 9, 1], opened) == [True, True, True, False, False]


@pytest.mark.parametrize("given", [1, 2, 3])
def test_supplied_ids_open_nothing_not_even_half_of_a_mark(given):
    turn = MARKS.turn([5, *[7, 8, 1][:given]], given, is_chat=True, shift=2.0)
    assert MARKS.phases([7, 8, 1, 4], turn) == [False] * 5
    assert MARKS.phases([7, 8, 1, 4], replace(turn, may_open=True, given=0))[2], "the same, said"


def test_a_raw_completion_has_no_place_for_a_mark():
    turn = replace(MARKS, header=(5,)).turn([7, 8, 5], 0, is_chat=False, shift=2.0)
    assert MARKS.phases([7, 8, 1], turn) == [False] * 4


@pytest.mark.parametrize(("shift", "closes"), [(2.0, True), (0.0, True), (-2.0, False)])
def test_a_supplied_closing_mark_closes_where_that_lowers_the_threshold(shift, closes):
    marks = SpanMarks((7, 8), (9, 6), header=(3,))
    turn = marks.turn([5, 3, 1, 9, 6, 2], 4, is_chat=True, shift=shift)
    assert turn.is_open and turn.start == 2
    phases = marks.phases([1, 9, 6, 2, 4], turn)
    assert phases == [True, True, True, not closes, not closes, not closes]
    # Half supplied, half said: the reader of the row wrote a part of it.
    half = marks.turn([5, 3, 1, 9], 2, is_chat=True, shift=shift)
    assert marks.phases([1, 9, 6, 2], half)[-1] != closes
    own = marks.phases([1, 9, 4, 9, 6, 2], half)
    assert own[-2:] == [False, False], "what the model says by itself closes"


def test_a_header_counts_where_the_row_has_it():
    marks = replace(MARKS, header=(3, 7, 8))
    assert marks.turn([5, 3, 7, 8], 0, is_chat=True, shift=1.0).is_open
    assert not marks.turn([5, 3], 0, is_chat=True, shift=1.0).is_open
    assert not MARKS.turn([5, 3, 7, 8], 0, is_chat=True, shift=1.0).is_open


def test_a_reader_reads_columns_as_they_come_and_all_at_once_alike():
    ids = torch.tensor([[0, 0, 5, 7, 8, 3, 9, 2], [5, 7, 8, 9, 7, 8, 4, 7]])
    turns = [OpenTurn(start=3, shift=2.0), OpenTurn(start=1, shift=-1.0)]
    whole = SpanReader(MARKS, turns, CPU).shift(ids, 5)
    steps = SpanReader(MARKS, turns, CPU)
    first = steps.shift(ids[:, :4], 1)
    later = [steps.shift(ids[:, :n], 1) for n in range(5, 9)]
    assert torch.equal(torch.cat([first, *later], 1), whole)
    assert whole.tolist() == [[0.0, 2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    begun = SpanReader(MARKS, turns, CPU)
    assert begun.shift(ids[:, :3], 1).tolist() == [[0.0], [-1.0]]
    assert begun.closing(0) == () and begun.closing(1) == (9,)


def test_marks_are_added_tokens_where_the_tokenizer_has_them(tokenizer):
    spans = ReasoningSpans(OPENS, CLOSES, (certified(0.0),))
    assert spans.marks(tokenizer).opens == tuple(tokenizer.encode(OPENS))
    tokenizer.add_tokens([OPENS, CLOSES])
    marks = spans.marks(tokenizer)
    assert len(marks.opens) == len(marks.closes) == 1 and not marks.header


@pytest.mark.parametrize(
    ("header", "is_open"),
    [(OPENS, True), (f"{OPENS}\n\n{CLOSES}", False), (f"{CLOSES}{OPENS}\n", True), ("", False)],
)
def test_the_templates_header_leaves_a_span_open_or_not(tokenizer, header, is_open):
    spans = ReasoningSpans(OPENS, CLOSES, (certified(0.0),))
    tokenizer.chat_template = with_header(header)
    marks = spans.marks(tokenizer)
    assert bool(marks.header) == is_open
    encoded = encode_chat(tokenizer, "hello")
    assert marks.turn(encoded.ids, 0, is_chat=True, shift=1.0).is_open == is_open


def with_header(text):
    return CHAT_TEMPLATE.replace("'<|assistant|>' }}{% endif", f"'<|assistant|>{text}' }}}}{{% endif")  # fmt: skip  # noqa: E501


# --- arithmetic


@pytest.mark.parametrize("kind", get_args(StatisticKind))
def test_lowered_values_follow_the_scalar_reference(kind):
    n = 2 if kind == "bank" else 1
    config = MonitorConfig(
        0.4, (0.0, 0.2), (0.1, -0.1) * n, (1.0, 0.5) * n, -0.2, kind=kind, window=3
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, 2, generator=generator)
    shifts = torch.randint(0, 2, (30, 4), generator=generator) * torch.tensor([1.0, -1, 0.5, 2])
    monitor = RiskMonitor(config, 1.5)
    state = monitor.start(4)
    wanted = [
        reference(config, 1.5, logits[:, row].tolist(), shifts[:, row].tolist()) for row in range(4)
    ]
    for step in range(30):
        state = monitor.step(state, logits[step], None, shifts[step])
        for row in range(4):
            assert float(state.statistic[row]) == pytest.approx(wanted[row][step].statistic, 1e-4)
            assert bool(state.alarm[row]) == wanted[row][step].alarm
            assert int(state.clear_point[row]) == wanted[row][step].clear_point


# --- generation


def middle_of(tokenizer, model, inside):
    """Thresholds of which one lies among the peaks inside, or outside, of spans."""
    flagged = reasoning_decoder(
        model, tokenizer, inside=30.0, outside=30.0, redirect="flag"
    ).generate(PROMPTS, **thinking(tokenizer))
    tops = []
    for trace in flagged.traces:
        config = bundle_for(model, tokenizer).monitor
        steps = reference(config, 0.0, trace.logits_of())
        tops.append(
            max(
                one.smoothed
                for one, step in zip(steps, trace.steps, strict=True)
                if step.reasoning == inside
            )
        )
    return sorted(tops)[2] - 1e-3, tops


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("redirect", ["refuse", "rewind"])
def test_each_threshold_judges_its_own_phase(llama, tokenizer, inside, redirect):
    options = thinking(tokenizer)
    threshold, tops = middle_of(tokenizer, llama, inside)
    limits = {"inside": 30.0, "outside": 30.0, ("inside" if inside else "outside"): threshold}
    decoder = reasoning_decoder(llama, tokenizer, redirect=redirect, **limits)
    output = decoder.generate(PROMPTS, **options)
    theirs, _, _ = bare(llama, tokenizer, PROMPTS, **options)
    assert [trace.tripped for trace in output.traces] == [top > threshold for top in tops]
    assert {trace.tripped for trace in output.traces} == {True, False}
    for row, trace in enumerate(output.traces):
        own = [step for step in trace.steps if not step.attempt]
        if trace.tripped:
            assert own[-1].action == "trip" and own[-1].reasoning == inside
        else:
            assert same_row(output.sequences[row], theirs[row])
            assert [s.position for s in own if s.reasoning] == list(range(7, 24))
        assert replay(trace, decoder.bundle.monitor).differences == ()
        (read,) = read_traces(trace.lines(token_ids=True))
        assert read == trace and trace.header.reasoning_threshold == pytest.approx(limits["inside"])


@pytest.mark.parametrize("inside", [True, False])
def test_streamed_forced_and_generated_agree(llama, tokenizer, inside):
    threshold, _ = middle_of(tokenizer, llama, inside)
    limits = {"inside": 30.0, "outside": 30.0, ("inside" if inside else "outside"): threshold}
    decoder = reasoning_decoder(llama, tokenizer, redirect="rewind", **limits)
    whole = decoder.generate(PROMPTS, **thinking(tokenizer))
    with decoder.stream(PROMPTS, **thinking(tokenizer)) as stream:
        ends = {event.row: event for event in stream if isinstance(event, Ended)}
    assert [ends[row].text for row in range(5)] == whole.texts
    assert [ends[row].trace for row in range(5)] == list(whole.traces)
    # What was said, supplied again, gives the same logits, and none of it lies inside a span.
    flag = reasoning_decoder(llama, tokenizer, redirect="flag", **limits)
    ids = flag.generate(PROMPTS, **thinking(tokenizer)).sequences
    for row, trace in enumerate(flag.generate(PROMPTS, **thinking(tokenizer)).traces):
        own = ids[row][ids[row] != 0][None]
        again = flag.generate(input_ids=own, max_new_tokens=1).traces[0]
        n = len(trace.steps) - 1
        assert again.end.prefill_tokens >= n
        for a, b in zip(again.steps[:n], trace.steps[:n], strict=True):
            assert not a.reasoning
            assert a.logits == pytest.approx(b.logits, abs=2e-4)


def test_beams_are_judged_with_their_spans(llama, tokenizer):
    decoder = reasoning_decoder(llama, tokenizer, inside=30.0, outside=30.0, redirect="flag")
    output = decoder.generate(["hello", "go"], num_beams=2, **thinking(tokenizer, ["hello", "go"]))
    for trace in output.traces:
        assert [step.position for step in trace.steps if step.reasoning] == list(range(7, 24))


def test_a_refusal_inside_a_span_closes_it_first(llama, tokenizer):
    """Readers hide reasoning: a refusal inside would not be seen."""
    threshold, row = late_inside(tokenizer, llama)
    limits = {"inside": threshold, "outside": 30.0, "holdback": 0}
    refused = reasoning_decoder(llama, tokenizer, redirect="refuse", **limits).generate(
        PROMPTS, **thinking(tokenizer)
    )
    text = refused.texts[row]
    assert OPENS in text and text.endswith(f"{CLOSES} ... {REFUSAL}") and text.count(CLOSES) == 1
    rewound = reasoning_decoder(llama, tokenizer, redirect="rewind", **limits).generate(
        PROMPTS, **{**thinking(tokenizer), "max_new_tokens": 120}
    )
    first = [step for step in rewound.traces[row].steps if step.attempt == 1]
    assert tokenizer.decode([step.token for step in first]).startswith(f"{CLOSES} ... {OPENER}")
    closed = [step.reasoning for step in first[: len(CLOSES) + 1]]
    assert closed == [True] * (len(CLOSES) - 1) + [False, False]


def late_inside(tokenizer, model):
    """A threshold that a row first exceeds inside a span, some tokens behind its beginning."""
    flag = reasoning_decoder(model, tokenizer, inside=30.0, outside=30.0, redirect="flag")
    config = bundle_for(model, tokenizer).monitor
    for row, trace in enumerate(flag.generate(PROMPTS, **thinking(tokenizer)).traces):
        line = reference(config, 0.0, trace.logits_of())
        values = [
            one.smoothed for one, step in zip(line, trace.steps, strict=True) if step.reasoning
        ]
        for at in range(3, len(values)):
            if values[at] > max(values[:at]) + 0.01:
                return (values[at] + max(values[:at])) / 2, row
    raise AssertionError("no row rises inside its span")


def test_a_foreign_loop_is_judged_with_its_spans(llama, tokenizer):
    decoder = reasoning_decoder(llama, tokenizer, inside=-30.0, outside=30.0)
    inputs = from_prompts(tokenizer, ["hello"], None, llama.device)
    options = thinking(tokenizer, ["hello"])
    with decoder.processor(inputs.input_ids, inputs.attention_mask) as guard:
        ids = llama.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=60,
            logits_processor=[options["logits_processor"][0], guard.logits_processor],
            stopping_criteria=[guard.stopping_criteria],
        )
    (trace,) = guard.traces
    assert trace.end.trip_step == 7 == trace.steps[7].position
    text = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert text.endswith(f"{OPENS}{CLOSES} ... {REFUSAL}")


# --- workbench


def test_maxima_inside_and_outside_are_taken_apart():
    path = np.asarray([0.0, 3.0, 1.0, 2.0], dtype=np.float32)
    within, without = maxima_apart([path, path], [[False, True, False, True], [False] * 4])
    assert within.tolist() == [3.0, NO_SCORE] and without.tolist() == [1.0, 3.0]


def responses(n, *, thinks=True):
    rng = np.random.default_rng(0)

    def words(k):
        return bytes(rng.integers(97, 117, size=k).tolist()).decode()

    return [
        Conversation(
            messages=({"role": "user", "content": words(4)},),
            response=(OPENS + words(6) + CLOSES if thinks else "") + words(8),
            group=f"g{i}",
            response_harmful=False,
        )
        for i in range(n)
    ]


def saying(tokenizer, prompts, words):
    """Options that make each row say words of its own, from its first token on."""
    width = from_prompts(tokenizer, prompts, None, CPU).input_ids.shape[1]
    ids = torch.tensor([tokenizer.encode(text) for text in words])

    class SaysOwn(LogitsProcessor):
        def __call__(self, input_ids, scores):
            place = input_ids.shape[1] - width
            if place >= n:
                return scores  # what is only looked at, behind the cap
            return torch.full_like(scores, -torch.inf).scatter(1, ids[:, place, None], 0.0)

    n = ids.shape[1]
    return {
        "max_new_tokens": n,
        "min_new_tokens": n,
        "logits_processor": LogitsProcessorList([SaysOwn()]),
    }


def test_both_thresholds_are_certified_and_what_is_deployed_keeps_the_promise(
    llama, tokenizer, tmp_path
):
    rows = as_own(llama, tokenizer, responses(60), top_k=50)
    plain = bundle_for(llama, tokenizer)
    bundle = add_reasoning(llama, tokenizer, rows, plain, opens=OPENS, closes=CLOSES)
    bundle.save(tmp_path / "b")
    bundle = ProbeBundle.load(tmp_path / "b")
    assert bundle.reasoning.certificate(0.5).n == 60 == bundle.certificate().n
    assert len(bundle.all_certificates) == 2
    decoder = SafeDecoder(llama, tokenizer, bundle, redirect="refuse")
    prompts, words = [list(row.messages) for row in rows], [row.response for row in rows]
    flag = SafeDecoder(llama, tokenizer, bundle, redirect="flag")
    output = flag.generate(prompts, **saying(tokenizer, prompts, words))
    assert output.texts == words
    given = [trace.steps for trace in output.traces]
    # Deployed, so many responses trip as the two certificates allow, and no more.
    guarded = decoder.generate(prompts, **saying(tokenizer, prompts, words))
    allowed = bundle.reasoning.certificate(0.5).j + bundle.certificate().j
    assert 0 < sum(trace.tripped for trace in guarded.traces) <= allowed
    for phase, certificate in ((True, bundle.reasoning.certificate(0.5)), (False, bundle.certificate())):  # fmt: skip  # noqa: E501
        config = bundle.monitor
        tops = []
        for steps in given:
            line = reference(config, 0.0, [list(step.logits) for step in steps])
            tops.append(
                max(a.smoothed for a, b in zip(line, steps, strict=True) if b.reasoning == phase)
            )
        above = sum(top > certificate.threshold + 1e-3 for top in tops)
        assert above <= certificate.j and sorted(tops) == pytest.approx(
            sorted(certificate.maxima), abs=2e-4
        )
    with pytest.raises(BundleCorruptError, match="thresholds for reasoning"):
        NumpyBundle.load(tmp_path / "b")


def test_what_cannot_be_certified_or_combined_is_refused(llama, tokenizer):
    plain = bundle_for(llama, tokenizer)
    with pytest.raises(CertificateError, match="no threshold inside reasoning"):
        add_reasoning(
            llama,
            tokenizer,
            as_own(llama, tokenizer, responses(20, thinks=False), top_k=50),
            plain,
            opens=OPENS,
            closes=CLOSES,
        )
    unjudged = [dataclasses.replace(responses(1)[0], response_harmful=None)]
    with pytest.raises(DataError, match="not judged"):
        add_reasoning(llama, tokenizer, unjudged, plain, opens=OPENS, closes=CLOSES)
    with pytest.raises(ConfigurationError, match="two different marks"):
        ReasoningSpans(OPENS, OPENS, (certified(0.0),))
    with pytest.raises(CertificateError, match="no certificate"):
        ReasoningSpans(OPENS, CLOSES, ())
    spans = ReasoningSpans(OPENS, CLOSES, (certified(0.0),))
    with pytest.raises(ConfigurationError, match="hits=2"):
        bundle_for(
            llama, tokenizer, reasoning=spans, monitor=dataclasses.replace(plain.monitor, hits=2)
        )
    check = HeaderCheck(random_probe(), 0.0, (certified(0.0),))
    both = bundle_for(llama, tokenizer, reasoning=spans, header_check=check)
    with pytest.raises(ConfigurationError, match="not certified together"):
        SafeDecoder(llama, tokenizer, both, self_check="bundle")
    assert decoder_for(llama, tokenizer)._marks is None


def test_the_server_refuses_what_it_does_not_follow(llama, tokenizer):
    decoder = reasoning_decoder(llama, tokenizer, inside=1.0, outside=0.0)
    with pytest.raises(UnsupportedError, match="does not follow spans"):
        TransformersEngine(decoder)


# --- marks that others write


class Holds(LogitsProcessor):
    """Makes every row begin with given ids, none for a row that is to go on by itself."""

    def __init__(self, ids, prompt_tokens):
        self.ids, self.prompt_tokens = ids, prompt_tokens

    def __call__(self, ids, scores):
        place = ids.shape[1] - self.prompt_tokens
        if place < len(self.ids):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.ids[place]] = 1.0
        return scores


def spans_of(decoder, prompt, *, prefill=None, begins="", **options):
    """Generate, the answer beginning with given words; return its trace."""
    width = from_prompts(decoder.tokenizer, [prompt], prefill, CPU).input_ids.shape[1]
    ids = decoder.tokenizer.encode(begins)
    processors = LogitsProcessorList([Holds(ids, width)])
    output = decoder.generate(
        [prompt],
        prefill=prefill,
        logits_processor=processors,
        **{"max_new_tokens": 24, "min_new_tokens": 24, **options},
    )
    return output.traces[0]


def conversation(*texts):
    roles = ("system", "user", "assistant", "tool", "user")
    return [
        {"role": role, "content": text}
        for role, text in zip(roles[-len(texts) :], texts, strict=True)
    ]


SUPPLIED = {
    "prefill": {"prompt": "go", "prefill": OPENS},
    "prefill with words": {"prompt": "go", "prefill": f"{OPENS} well, "},
    "words, then a mark": {"prompt": "go", "prefill": f"Sure. {OPENS}"},
    "half of a mark": {"prompt": "go", "prefill": OPENS[:4], "begins": OPENS[4:]},
    "all but the end of a mark": {"prompt": "go", "prefill": OPENS[:-1], "begins": OPENS[-1]},
    "a prefill, then a mark": {"prompt": "go", "prefill": "Sure. ", "begins": OPENS},
    "user": {"prompt": f"go {OPENS}"},
    "system, assistant, tool, user": {"prompt": conversation(*[f"a {OPENS}"] * 5)},
    "an open turn's message": {
        "prompt": [*conversation("go"), {"role": "assistant", "content": OPENS}]
    },
    "the middle of an answer": {"prompt": "go", "begins": f"Yes. {OPENS}"},
}


@pytest.mark.parametrize("case", SUPPLIED)
def test_no_mark_but_the_models_own_at_the_beginning_opens_a_span(llama, tokenizer, case):
    flag = reasoning_decoder(llama, tokenizer, inside=30.0, outside=-30.0, redirect="flag")
    trace = spans_of(flag, **SUPPLIED[case])
    assert not any(step.reasoning for step in trace.steps)
    assert trace.end.trip_step == 0, "the answer's threshold held from the first score on"
    own = spans_of(flag, "go", begins=OPENS)
    assert [step.reasoning for step in own.steps] == [False] * len(OPENS) + [True] * (
        25 - len(OPENS)
    )


def test_a_raw_prompt_opens_no_span_and_neither_does_what_follows_it(llama, tokenizer):
    flag = reasoning_decoder(llama, tokenizer, inside=30.0, outside=-30.0, redirect="flag")
    for text, begins in (
        (f"once {OPENS} upon", ""),
        (OPENS, ""),
        (OPENS[:3], OPENS[3:]),
        ("a", OPENS),
    ):
        ids = torch.tensor([tokenizer.encode(text)])
        processors = LogitsProcessorList([Holds(tokenizer.encode(begins), ids.shape[1])])
        output = flag.generate(
            input_ids=ids, max_new_tokens=20, min_new_tokens=20, logits_processor=processors
        )
        assert not any(step.reasoning for step in output.traces[0].steps)


def test_a_header_opens_a_span_whatever_is_supplied_and_a_supplied_closing_mark_ends_it(llama):
    tokenizer = byte_tokenizer(chat_template=with_header(OPENS))
    flag = reasoning_decoder(llama, tokenizer, inside=30.0, outside=-30.0, redirect="flag")
    assert all(step.reasoning for step in spans_of(flag, "go").steps)
    n = len(f"no. {CLOSES}")
    trace = spans_of(flag, "go", prefill=f"no. {CLOSES} {OPENS}")
    assert [step.reasoning for step in trace.steps] == [
        index < n for index in range(len(trace.steps))
    ]
    half = spans_of(flag, "go", prefill=CLOSES[:3], begins=CLOSES[3:])
    assert [step.reasoning for step in half.steps][len(CLOSES) - 1 : len(CLOSES) + 1] == [
        True,
        False,
    ]
    # Where reasoning has the lower threshold, only the model's own mark leads to the higher one.
    strict = reasoning_decoder(llama, tokenizer, inside=-30.0, outside=30.0, redirect="flag")
    assert all(step.reasoning for step in spans_of(strict, "go", prefill=CLOSES).steps)
    assert not spans_of(strict, "go", begins=CLOSES).steps[-1].reasoning


@pytest.mark.parametrize("prefill", [None, "x"])
def test_the_guards_own_opener_opens_no_span(llama, tokenizer, prefill):
    opener = f"{OPENS} no, "
    decoder = reasoning_decoder(
        llama, tokenizer, inside=30.0, outside=-30.0, redirect="rewind", opener=opener
    )
    (trace,) = decoder.generate(["go"], prefill=prefill, max_new_tokens=90).traces
    tries = [step for step in trace.steps if step.attempt]
    assert trace.end.tries == 2, "the answer's threshold held in each try"
    assert tokenizer.decode([step.token for step in tries]) == opener * 2
    assert not any(step.reasoning for step in trace.steps)
