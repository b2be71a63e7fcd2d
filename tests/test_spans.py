"""Marked reasoning: thresholds of its own, wherever and however a response is judged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from probes.conversations import Conversation
from probes.reasoning import NO_SCORE, add_reasoning, maxima_apart
from safe_decode.bundle import ProbeBundle
from safe_decode.certificate import Certificate
from safe_decode.errors import (
    BundleCorruptError,
    CertificateError,
    ConfigurationError,
    DataError,
    UnsupportedError,
)
from safe_decode.events import Ended
from safe_decode.guard import SafeDecoder
from safe_decode.monitor import MonitorConfig, RiskMonitor, reference
from safe_decode.portable import PortableBundle
from safe_decode.replay import replay
from safe_decode.selfcheck import HeaderCheck
from safe_decode.serving.guarded import GuardedEngine
from safe_decode.spans import ReasoningSpans, SpanMarks, SpanReader
from safe_decode.trace import read_traces
from tests.guarding import OPENER, REFUSAL, bundle_for, decoder_for, random_probe
from tests.models import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from tests.own_rows import as_own
from tests.test_laws import bare, same_row

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
            scores[:, self.ids[place]] = 0.0
        return scores


def thinking(tokenizer, prompts=PROMPTS):
    """Options that make rows open a span at token 2 and close it at token 16."""
    from safe_decode.inputs import from_prompts

    width = from_prompts(tokenizer, prompts, None, torch.device("cpu")).input_ids.shape[1]
    return {
        "max_new_tokens": 40,
        "min_new_tokens": 40,
        "logits_processor": LogitsProcessorList(
            [Says(tokenizer, OPENS, 2, width), Says(tokenizer, CLOSES, 16, width)]
        ),
    }


# --- marks


def test_phases_follow_marks_and_the_token_that_completes_one_counts():
    marks = SpanMarks((7, 8), (9,))
    assert marks.phases([1, 7, 8, 1, 9, 1]) == [False, False, False, True, True, False, False]
    assert marks.phases([9, 7, 7, 8, 7, 8, 9]) == [False] * 4 + [True, True, True, False]
    assert dataclasses.replace(marks, starts_inside=True).phases([1, 9]) == [True, True, False]


def test_a_reader_reads_columns_as_they_come_and_all_at_once_alike():
    marks, cpu = SpanMarks((7, 8), (9,)), torch.device("cpu")
    ids = torch.tensor([[0, 0, 5, 7, 8, 3, 9, 2], [5, 1, 7, 8, 9, 7, 8, 4]])
    whole = SpanReader(marks, starts=[3, 1], shifts=[2.0, -1.0], device=cpu).shift(ids, 5)
    steps = SpanReader(marks, starts=[3, 1], shifts=[2.0, -1.0], device=cpu)
    first = steps.shift(ids[:, :4], 1)
    later = [steps.shift(ids[:, :n], 1) for n in range(5, 9)]
    assert torch.equal(torch.cat([first, *later], 1), whole)
    assert whole.tolist() == [[0.0, 2.0, 2.0, 0.0, 0.0], [-1.0, 0.0, 0.0, -1.0, -1.0]]
    assert steps.closing(0) == () and steps.closing(1) == (9,)


def test_marks_are_added_tokens_where_the_tokenizer_has_them(tokenizer):
    spans = ReasoningSpans(OPENS, CLOSES, (certified(0.0),))
    assert spans.marks(tokenizer).opens == tuple(tokenizer.encode(OPENS))
    tokenizer.add_tokens([OPENS, CLOSES])
    marks = spans.marks(tokenizer)
    assert len(marks.opens) == len(marks.closes) == 1 and not marks.starts_inside
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|assistant|>' }}{% endif", f"'<|assistant|>{OPENS}' }}}}{{% endif")  # fmt: skip  # noqa: E501
    assert spans.marks(tokenizer).starts_inside, "the header leaves a span open"


# --- arithmetic


@pytest.mark.parametrize("kind", ["ema", "mean", "cusum"])
def test_lowered_values_follow_the_scalar_reference(kind):
    config = MonitorConfig(0.4, (0.0, 0.2), (0.1, -0.1), (1.0, 0.5), -0.2, kind=kind, window=3)
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
            assert [s.position for s in own if s.reasoning] == list(range(9, 24))
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
    # What was said, supplied again, is judged alike: the flagged text as a prefill.
    flag = reasoning_decoder(llama, tokenizer, redirect="flag", **limits)
    ids = flag.generate(PROMPTS, **thinking(tokenizer)).sequences
    for row, trace in enumerate(flag.generate(PROMPTS, **thinking(tokenizer)).traces):
        own = ids[row][ids[row] != 0][None]
        again = flag.generate(input_ids=own, max_new_tokens=1).traces[0]
        n = len(trace.steps) - 1
        assert again.end.prefill_tokens >= n
        for a, b in zip(again.steps[:n], trace.steps[:n], strict=True):
            assert a.reasoning == b.reasoning
            assert a.statistic == pytest.approx(b.statistic, abs=2e-4)


def test_beams_are_judged_with_their_spans(llama, tokenizer):
    decoder = reasoning_decoder(llama, tokenizer, inside=30.0, outside=30.0, redirect="flag")
    output = decoder.generate(["hello", "go"], num_beams=2, **thinking(tokenizer, ["hello", "go"]))
    for trace in output.traces:
        assert [step.position for step in trace.steps if step.reasoning] == list(range(9, 24))


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
    from safe_decode.inputs import from_prompts

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
    assert trace.end.trip_step == 9 == trace.steps[9].position
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
    output = decoder.generate(
        [list(row.messages) for row in rows],
        prefill=[row.response for row in rows],
        max_new_tokens=1,
        min_new_tokens=1,
    )
    given = [
        [step for step in trace.steps if step.position <= trace.end.prefill_tokens]
        for trace in output.traces
    ]
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
        PortableBundle.load(tmp_path / "b")


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
        GuardedEngine(decoder)
