"""What breaks the guard while it runs, done for real: each case must end closed."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessor

from safe_decode.activations.tap import unwatched
from safe_decode.errors import (
    BeatError,
    ConfigurationError,
    ForcedTokenError,
    SafeDecodeError,
    UnsupportedError,
)
from safe_decode.probe.interface import Probe
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import REFUSAL, decoder_for, peaks
from safe_decode.testing.models import tiny_model

PROMPTS = ["hello", "what is it?", "go"]


class At(LogitsProcessor):
    """Does something once, before a given token."""

    def __init__(self, step, act):
        self.left, self.act = step, act

    def __call__(self, _ids, scores):
        if self.left == 0:
            self.act()
        self.left -= 1
        return scores


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def drop_all_hooks(model):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def drop_one_hook(model):
    module = next(m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


def assert_closed(output, released=None):
    for trace, text in zip(output.traces, output.texts, strict=True):
        assert trace.end.outcome == "closed"
        assert "BeatError" in trace.end.error
        assert text.endswith(REFUSAL)
        if released is not None:
            assert trace.end.released_tokens <= released


@pytest.mark.parametrize("drop", [drop_all_hooks, drop_one_hook])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_a_hook_removed_while_generating_closes_every_row(llama, tokenizer, drop, options):
    decoder = decoder_for(llama, tokenizer, redirect="rewind", holdback=1)
    vandal = At(5, lambda: drop(llama))
    output = decoder.generate(
        PROMPTS, max_new_tokens=20, min_new_tokens=20, logits_processor=[vandal], **options
    )
    # Token 5 is chosen on a whole forward; the next forward is unheard.
    assert_closed(output, released=5)
    assert not hooks_of(llama)


def test_a_second_forward_between_score_and_choice_closes_every_row(llama, tokenizer):
    ids = torch.full((3, 1), 70)
    decoder = decoder_for(llama, tokenizer, redirect="refuse", holdback=0)
    vandal = At(4, lambda: llama(input_ids=ids))
    output = decoder.generate(
        PROMPTS, max_new_tokens=12, min_new_tokens=12, logits_processor=[vandal]
    )
    assert_closed(output, released=4)
    assert "2 forwards" in output.traces[0].end.error


def test_a_second_forward_marked_internal_changes_nothing(llama, tokenizer):
    def forward():
        with unwatched():
            llama(input_ids=torch.full((3, 1), 70))

    decoder = decoder_for(llama, tokenizer, redirect="refuse")
    plain = decoder.generate(PROMPTS, max_new_tokens=12)
    output = decoder.generate(PROMPTS, max_new_tokens=12, logits_processor=[At(4, forward)])
    assert output.texts == plain.texts
    assert [trace.end.outcome for trace in output.traces] == ["released"] * 3


def test_the_guards_processor_dropped_while_generating_closes_every_row(
    llama, tokenizer, monkeypatch
):
    from safe_decode.engines.transformers.loops.processor import SafetyLogitsProcessor

    whole, calls = SafetyLogitsProcessor.__call__, []

    def skips(self, input_ids, scores):
        calls.append(1)
        return scores if len(calls) > 6 else whole(self, input_ids, scores)

    monkeypatch.setattr(SafetyLogitsProcessor, "__call__", skips)
    decoder = decoder_for(llama, tokenizer, redirect="rewind", holdback=0)
    output = decoder.generate(PROMPTS, max_new_tokens=12, min_new_tokens=12)
    assert_closed(output, released=5)


def test_a_probe_that_fails_closes_every_row(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="rewind")

    class Fails(Probe):
        def __call__(self, _features):
            raise RuntimeError("expected all tensors on one device")

    decoder._probe = Fails()
    output = decoder.generate(PROMPTS, max_new_tokens=5)
    for trace, text in zip(output.traces, output.texts, strict=True):
        assert trace.end.outcome == "closed" and text == REFUSAL
        assert "expected all tensors on one device" in trace.end.error


def test_a_failing_guard_may_be_allowed_and_then_shows(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="refuse", on_error="allow")
    plain = decoder.generate(PROMPTS, max_new_tokens=8)
    vandal = At(3, lambda: drop_all_hooks(llama))
    output = decoder.generate(PROMPTS, max_new_tokens=8, logits_processor=[vandal])
    assert output.texts == plain.texts
    for trace in output.traces:
        assert trace.end.unprotected and "BeatError" in trace.end.error


def test_an_exception_leaves_no_hook_and_the_next_call_is_whole(llama, tokenizer):
    def fails():
        raise ZeroDivisionError("user code")

    decoder = decoder_for(llama, tokenizer)
    plain = decoder.generate(PROMPTS, max_new_tokens=6)
    with pytest.raises(ZeroDivisionError):
        decoder.generate(PROMPTS, max_new_tokens=6, logits_processor=[At(3, fails)])
    assert not hooks_of(llama)
    assert decoder.generate(PROMPTS, max_new_tokens=6).texts == plain.texts


def test_two_threads_on_one_model_are_isolated(llama, tokenizer):
    decoders = [decoder_for(llama, tokenizer, redirect=kind) for kind in ("flag", "rewind")]
    alone = [d.generate(PROMPTS, max_new_tokens=25) for d in decoders]
    outputs, gate = [None, None], threading.Barrier(2)

    def work(index):
        gate.wait()
        outputs[index] = decoders[index].generate(PROMPTS, max_new_tokens=25)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for before, after in zip(alone, outputs, strict=True):
        assert after.texts == before.texts and peaks(after) == peaks(before)
    assert not hooks_of(llama)


# --- inside a user's own generate


def encoded(model, tokenizer):
    inputs = from_prompts(tokenizer, PROMPTS, None, model.device)
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}


class UnForces(LogitsProcessor):
    def __call__(self, _ids, scores):
        wild = torch.full_like(scores, -1.0)
        wild[:, 77] = 5.0
        return wild


def run_bare(decoder, model, inputs, *, extra=(), **options):
    redirect = "flag" if decoder.policy.redirect == "flag" else "refuse"
    with decoder.processor(**inputs, redirect=redirect) as handle:
        ids = model.generate(
            **inputs,
            logits_processor=[handle.logits_processor, *extra],
            stopping_criteria=[handle.stopping_criteria],
            **options,
        )
    return ids, handle.traces


class Restores(LogitsProcessor):
    """Puts the model's own scores back, from a step on, for one row or all."""

    def __init__(self, held, *, start=0, row=None):
        self.held, self.start, self.row, self.steps, self.seen = held, start, row, -1, []

    def __call__(self, ids, scores):
        self.steps += 1
        self.seen.append(ids[:, -1].tolist())
        if self.steps < self.start:
            return scores
        own = self.held[-1].clone()
        if self.row is not None:
            scores = scores.clone()
            scores[self.row] = own[self.row]
            return scores
        return own


class Notes(LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, _ids, scores):
        self.scores.append(scores.clone())
        return scores


@pytest.mark.parametrize("with_criterion", [True, False])
@pytest.mark.parametrize("caught", ["outside", "inside"])
@pytest.mark.parametrize("redirect", ["refuse", "stop"])
def test_a_processor_after_ours_that_un_forces_ends_the_call_by_an_error(
    llama, tokenizer, with_criterion, caught, redirect
):
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer, threshold=-1e9)
    notes = Notes()
    after, choices = Restores(notes.scores), []

    def run(handle):
        criteria = [handle.stopping_criteria] if with_criterion else []
        choices.append(
            llama.generate(
                **inputs,
                logits_processor=[notes, handle.logits_processor, after],
                stopping_criteria=criteria,
                max_new_tokens=20,
            )
        )

    wanted = pytest.raises(ForcedTokenError, match="put the guard's processor last")
    if caught == "outside":
        with wanted, decoder.processor(**inputs, redirect=redirect) as handle:
            run(handle)
    else:
        with decoder.processor(**inputs, redirect=redirect) as handle, wanted:
            run(handle)
    assert not choices and not hooks_of(llama)
    assert len(after.seen) == 1, "nothing is said behind the lost id"
    assert len(handle.traces) == 3
    for trace in handle.traces:
        assert trace.end.outcome == "closed" and "ForcedTokenError" in trace.end.error


@pytest.mark.parametrize("with_eos", [True, False])
def test_a_row_that_talks_on_behind_its_refusal_ends_the_call_by_an_error(tokenizer, with_eos):
    """The refusal arrives; what is un-forced is the end, or the pads behind it."""
    model = tiny_model("llama")
    decoder = decoder_for(model, tokenizer)
    if not with_eos:
        model.generation_config.eos_token_id = None
    inputs, notes = encoded(model, tokenizer), Notes()
    flagged = decoder_for(model, tokenizer, redirect="flag")
    _, traces = run_bare(flagged, model, inputs, max_new_tokens=4)
    tops = [max(step.statistic for step in trace.steps[:1]) for trace in traces]
    first = max(range(3), key=lambda row: tops[row])
    decoder = decoder_for(model, tokenizer, threshold=sorted(tops)[-1] - 1e-4)
    n = len(tokenizer.encode(REFUSAL))
    after = Restores(notes.scores, start=n, row=first)
    with (
        pytest.raises(ForcedTokenError, match=f"row {first}"),
        decoder.processor(**inputs) as handle,
    ):
        model.generate(
            **inputs,
            logits_processor=[notes, handle.logits_processor, after],
            stopping_criteria=[handle.stopping_criteria],
            max_new_tokens=80,
            min_new_tokens=60,
        )
    said = [newest[first] for newest in after.seen[1:]]
    assert tokenizer.decode(said[:n]) == REFUSAL and len(said) <= n + 2


def test_rows_that_are_forced_and_end_meet_no_error(tokenizer):
    """Whatever fills an ended row is not taken for talk."""
    model = tiny_model("llama")
    inputs = encoded(model, tokenizer)
    _, traces = run_bare(
        decoder_for(model, tokenizer, redirect="flag"), model, inputs, max_new_tokens=4
    )
    tops = [trace.steps[0].statistic for trace in traces]
    decoder = decoder_for(model, tokenizer, threshold=max(tops) - 1e-4)
    for options in ({}, {"pad_token_id": 70}, {"do_sample": True}):
        ids, traces = run_bare(
            decoder, model, inputs, max_new_tokens=60, min_new_tokens=50, **options
        )
        assert ids.shape[1] > inputs["input_ids"].shape[1] + len(REFUSAL) + 3
        assert [trace.end.outcome for trace in traces].count("refused") >= 1
    model.generation_config.eos_token_id = None
    decoder = decoder_for(model, tokenizer, threshold=max(tops) - 1e-4)
    run_bare(decoder, model, inputs, max_new_tokens=60)


def test_what_a_user_allows_comes_before_the_guard(llama, tokenizer):
    """A function of allowed ids cannot take the refusal back, in our loop or in a foreign one."""
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer, threshold=-1e9, redirect="refuse")
    options = {"prefix_allowed_tokens_fn": lambda _row, _ids: [77, 78], "max_new_tokens": 60}
    ids, _ = run_bare(decoder, llama, inputs, **options)
    for row in ids:
        assert tokenizer.decode(row, skip_special_tokens=True).endswith(REFUSAL)
    assert decoder.generate(PROMPTS, **options).texts == [REFUSAL] * 3
    with pytest.raises(ForcedTokenError):
        run_bare(decoder, llama, inputs, extra=[UnForces()], max_new_tokens=20)


def test_a_bare_processor_dropped_ends_every_row_and_raises(llama, tokenizer):
    inputs = encoded(llama, tokenizer)
    decoder, held = decoder_for(llama, tokenizer), []

    def drop():
        held[0].__class__ = type("Gone", (LogitsProcessor,), {"__call__": lambda _s, _i, x: x})

    # Nothing can be forced without the processor: the loop ends at once, and the exit says so.
    with pytest.raises(BeatError), decoder.processor(**inputs) as handle:
        held.append(handle.logits_processor)
        ids = llama.generate(
            **inputs,
            logits_processor=[At(6, drop), handle.logits_processor],
            stopping_criteria=[handle.stopping_criteria],
            max_new_tokens=20,
            min_new_tokens=20,
        )
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 7
    for trace in handle.traces:
        assert trace.end.outcome == "closed" and "BeatError" in trace.end.error


def test_a_guard_that_is_not_passed_at_all_raises(llama, tokenizer):
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer)
    with pytest.raises(BeatError, match="after the last choice"), decoder.processor(**inputs):
        llama.generate(**inputs, max_new_tokens=4)


def test_a_bare_hook_removed_forces_the_refusal(llama, tokenizer):
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer)
    with decoder.processor(**inputs) as handle:
        ids = llama.generate(
            **inputs,
            logits_processor=[At(4, lambda: drop_all_hooks(llama)), handle.logits_processor],
            stopping_criteria=[handle.stopping_criteria],
            max_new_tokens=60,
            min_new_tokens=10,
        )
    for row, trace in enumerate(handle.traces):
        assert trace.end.outcome == "closed" and "BeatError" in trace.end.error
        assert tokenizer.decode(ids[row], skip_special_tokens=True).endswith(REFUSAL)


def test_a_bare_second_forward_forces_the_refusal(llama, tokenizer):
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer)
    second = At(4, lambda: llama(input_ids=torch.full((3, 1), 70)))
    with decoder.processor(**inputs) as handle:
        ids = llama.generate(
            **inputs,
            logits_processor=[second, handle.logits_processor],
            stopping_criteria=[handle.stopping_criteria],
            max_new_tokens=60,
            min_new_tokens=10,
        )
    for row, trace in enumerate(handle.traces):
        assert "2 forwards" in trace.end.error
        assert tokenizer.decode(ids[row], skip_special_tokens=True).endswith(REFUSAL)


def test_beams_in_a_foreign_generate_are_refused_before_the_first_token(llama, tokenizer):
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer)
    with pytest.raises(UnsupportedError, match="num_beams"):
        run_bare(decoder, llama, inputs, num_beams=2, max_new_tokens=4)
    assert not hooks_of(llama)


def test_a_missing_criterion_on_a_model_without_eos_is_a_clear_error(tokenizer):
    model = tiny_model("llama")
    decoder = decoder_for(model, tokenizer)
    model.generation_config.eos_token_id = None
    inputs = encoded(model, tokenizer)
    with (
        pytest.raises(ConfigurationError, match="handle.stopping_criteria"),
        decoder.processor(**inputs) as handle,
    ):
        model.generate(**inputs, logits_processor=[handle.logits_processor], max_new_tokens=4)
    assert issubclass(ConfigurationError, SafeDecodeError)
