"""While nothing trips, a guarded step makes the host wait no more often than the bare one."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_decode.engines.transformers.loops.choices import ChoiceJudge
from safe_decode.engines.transformers.loops.row_state import EndIds
from safe_decode.engines.transformers.loops.row_status import RowStatus
from safe_decode.testing.bundles import decoder_for, peaks, threshold_between
from safe_decode.testing.models import BOS, EOS, PAD, byte_tokenizer, tiny_model
from tests.fake_cuda import World, fake_cuda, on_device

NEW_TOKENS = 8
PROMPTS = [[BOS, *b"tell me"], [PAD, PAD, BOS, *b"hello"[:5]]]


@dataclass
class Steps:
    """A stopping criterion that notes where one step ends; ends rows where it is told to."""

    world: World
    ends: dict[int, int]

    def __post_init__(self) -> None:
        self.at: list[tuple[int, int]] = []

    def __call__(self, input_ids: Any, _scores: object, **_: object) -> Any:
        self.at.append((len(self.world.waits), self.world.n_operations))
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for row, step in self.ends.items():
            if len(self.at) > step:
                done[row] = True
        return done


@dataclass
class Run:
    """What a call made the host wait for.

    Attributes:
        steps: Of each step but the first: its waits by place.
        before: Waits until the first token was chosen.
        after: Waits behind the last.
        operations: Queued in each step but the first.
    """

    ids: list[list[int]]
    steps: list[Counter[tuple[str, str]]]
    before: Counter[tuple[str, str]]
    after: Counter[tuple[str, str]]
    operations: list[int]


def run(how: str, *, ends: dict[int, int] | None = None, **options: Any) -> Run:
    """Generate on the fake device, `how` being "bare" or a redirect."""
    decoder_options = {k: options.pop(k) for k in ("holdback",) if k in options}
    with fake_cuda() as world, torch.no_grad():
        model = on_device(tiny_model("llama"), world)
        ids = torch.tensor(PROMPTS, device=model.device)
        steps = Steps(world, ends or {})
        generate = model.generate
        if how != "bare":
            generate = decoder_for(
                model, byte_tokenizer(), redirect=how, **decoder_options
            ).generate
        began = len(world.waits)
        torch.manual_seed(0)
        output = generate(
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            stopping_criteria=[steps],
            **{"do_sample": False, **options},
        )
        ended = len(world.waits)
        found = getattr(output, "sequences", output).tolist()
    pairs = list(zip(steps.at, steps.at[1:], strict=False))

    def between(first: int, last: int) -> Counter[tuple[str, str]]:
        return Counter((who, f"{place} ({kind})") for who, place, kind in world.waits[first:last])

    return Run(
        found,
        [between(a, b) for (a, _), (b, _) in pairs],
        between(began, steps.at[0][0]),
        between(steps.at[-1][0], ended),
        [b - a for (_, a), (_, b) in pairs],
    )


def of_guard(waits: Counter[tuple[str, str]]) -> dict[str, int]:
    return {place: n for (who, place), n in waits.items() if who == "guard"}


SAMPLED = [{}, {"do_sample": True}, {"do_sample": True, "seed": 5}]


@pytest.mark.parametrize("how", ["refuse", "flag"])
@pytest.mark.parametrize("options", SAMPLED)
def test_a_step_waits_no_more_often_than_the_bare_one(how, options):
    bare = run("bare", **{k: v for k, v in options.items() if k != "seed"})
    guarded = run(how, **options)
    assert [of_guard(step) for step in guarded.steps] == [{}] * (NEW_TOKENS - 1)
    assert [step.total() for step in guarded.steps] == [step.total() for step in bare.steps]
    if "seed" not in options:
        assert guarded.ids == bare.ids


def test_a_step_in_which_a_row_ends_waits_no_more_often_either():
    assert [of_guard(step) for step in run("refuse", ends={0: 3}).steps] == [{}] * (NEW_TOKENS - 1)


def test_a_wait_that_is_put_in_is_found(monkeypatch):
    sort = ChoiceJudge._sort
    monkeypatch.setattr(
        ChoiceJudge, "_sort", lambda self, choice: (choice.input_ids.tolist(), sort(self, choice))
    )
    bare, guarded = run("bare"), run("refuse")
    assert [s.total() for s in guarded.steps] == [s.total() + 1 for s in bare.steps]


@pytest.mark.parametrize("sampled", [False, True])
def test_nan_is_seen_on_the_device_and_closes_its_row_as_on_the_cpu(sampled):
    def told(model: Any) -> Any:
        ids = torch.tensor(PROMPTS, device=model.device)

        def breaks(input_ids: Any, scores: Any) -> Any:
            if input_ids.shape[1] == ids.shape[1] + 3:
                scores = scores.clone()
                scores[1] = torch.nan
            return scores

        torch.manual_seed(0)
        found = decoder_for(model, byte_tokenizer(), redirect="refuse").generate(
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=sampled,
            logits_processor=[breaks],
        )
        return found.sequences.tolist(), list(found.traces)

    wanted = told(tiny_model("llama"))
    with fake_cuda() as world:
        found = told(on_device(tiny_model("llama"), world))
    assert found == wanted
    assert [trace.tripped for trace in found[1]] == [False, True]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_processor_in_a_foreign_loop_forces_there_and_says_what_it_says_on_the_cpu(sampled):
    tokenizer, ids = byte_tokenizer(), torch.tensor([*PROMPTS, [BOS, *b"go to it"[:7]]])

    def told(model: Any, threshold: float, redirect: str = "refuse", world: Any = None) -> Any:
        given, seen = ids.to(model.device), []

        def note(input_ids: Any, _scores: object, **_: object) -> Any:
            seen.append(0 if world is None else len(world.by("guard")))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        decoder = decoder_for(model, tokenizer, threshold=threshold, redirect=redirect)
        torch.manual_seed(0)
        mask = (given != PAD).long()
        with decoder.processor(given, attention_mask=mask, redirect=redirect) as handle:
            found = model.generate(
                given,
                attention_mask=mask,
                max_new_tokens=24,
                do_sample=sampled,
                logits_processor=[handle.logits_processor],
                stopping_criteria=[note, handle.stopping_criteria],
            )
        return found.tolist(), handle.traces, seen

    _, flagged, _ = told(tiny_model("llama"), 1e9, "flag")
    tops = [max(step.statistic for step in trace.steps) for trace in flagged]
    threshold = threshold_between(tops)
    with fake_cuda() as world:
        model = on_device(tiny_model("llama"), world)
        found = told(model, threshold, world=world)
        *_, calm = told(model, 1e9, world=world)
    wanted = told(tiny_model("llama"), threshold)
    assert found[:2] == wanted[:2]
    assert {trace.tripped for trace in found[1]} == {True, False}
    assert calm[1] == calm[-1], "no wait of the guard's between the second token and the last"


class _Reader:
    """A streamer, which is handed texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def put(self, value: object) -> None:
        self.texts.append(str(value))

    def end(self) -> None:
        self.texts.append("end")


def test_a_stream_s_step_waits_for_nothing_either(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", PROMPTS[:1])
    reader = _Reader()
    streamed = run("refuse", streamer=reader)
    assert [of_guard(step) for step in streamed.steps] == [{}] * (NEW_TOKENS - 1)
    assert len(reader.texts) > 2 and reader.texts[-1] == "end"


def test_a_call_asks_a_device_for_few_things_before_its_first_token_and_behind_its_last():
    guarded = run("refuse")
    before, after = of_guard(guarded.before), of_guard(guarded.after)
    assert sum(before.values()) <= 4, before  # the ids and mask of the prompt, and two end ids
    assert sum(after.values()) <= 8, after


@pytest.mark.parametrize(("ends", "n_closing"), [((), 1), ((0,), 1), ((0, 1), 0)])
def test_only_rows_that_did_not_end_themselves_get_a_closing_forward(ends, n_closing):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    ids = torch.tensor(PROMPTS)
    bare = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=3)
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    # The last token of some rows becomes an end id.
    last = [int(bare[row, -1]) for row in ends] or [EOS]
    decoder = decoder_for(model, tokenizer, holdback=0, redirect="refuse")
    decoder.generate(
        input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=3, eos_token_id=last
    )
    assert len(widths) == 3 + n_closing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device to wait for")
@pytest.mark.parametrize("sampled", [False, True])
def test_on_a_cuda_device_a_step_synchronises_no_more_often_than_the_bare_one(sampled):
    model = tiny_model("llama").to("cuda")
    ids = torch.tensor(PROMPTS, device="cuda")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": sampled}

    def synchronised(generate: Any) -> list[int]:
        at: list[int] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")

            def criterion(input_ids: Any, _scores: object, **_: object) -> Any:
                at.append(sum("synchroniz" in str(one.message) for one in caught))
                return torch.zeros(len(input_ids), dtype=torch.bool, device="cuda")

            torch.cuda.set_sync_debug_mode("warn")
            try:
                generate(
                    input_ids=ids,
                    attention_mask=(ids != PAD).long(),
                    stopping_criteria=[criterion],
                    **options,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [b - a for a, b in zip(at, at[1:], strict=False)]

    decoder = decoder_for(model, byte_tokenizer(), redirect="refuse")
    for generate in (model.generate, decoder.generate):
        synchronised(generate)  # the first calls set the device up
    assert synchronised(decoder.generate) == synchronised(model.generate)


def test_a_step_queues_few_operations():
    # Three sites: a selection each; what is left reads, levels, compares and sends.
    assert run("refuse").operations[3] - run("bare").operations[3] <= 30


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("redirect", ["refuse", "rewind", "flag"])
def test_a_device_says_and_tells_what_the_cpu_does(redirect, sampled):
    tokenizer = byte_tokenizer()
    texts = ["hello", "what is it?", "tell me a long story", "go", "abc"]
    options = {"max_new_tokens": 12, "do_sample": sampled, "eos_token_id": [EOS, 40, 90, 120, 200]}

    def told(model: Any, threshold: float, kind: str) -> Any:
        torch.manual_seed(0)
        decoder = decoder_for(model, tokenizer, threshold=threshold, redirect=kind)
        return decoder.generate(texts, **options)

    threshold = threshold_between(peaks(told(tiny_model("llama"), 1e9, "flag")))
    wanted = told(tiny_model("llama"), threshold, redirect)
    with fake_cuda() as world:
        found = told(on_device(tiny_model("llama"), world), threshold, redirect)
        ids, traces = found.sequences.tolist(), list(found.traces)
    assert ids == wanted.sequences.tolist()
    assert found.texts == wanted.texts
    assert traces == list(wanted.traces)
    if redirect != "flag":
        assert {trace.tripped for trace in traces} == {True, False}


@st.composite
def batches(draw):
    n = draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    steps = draw(st.lists(st.tuples(rows, rows), min_size=1, max_size=8))
    return draw(rows), draw(rows), steps, draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(batches())
def test_what_a_device_is_asked_is_what_the_host_decides_later(batch):
    wanted, limits, steps, pads = batch
    policies = [SimpleNamespace(unseen_tokens=n) for n in wanted]
    session: Any = SimpleNamespace(
        batch=len(wanted),
        roster=SimpleNamespace(policies=policies),
        parked=None,
        trips={},
        close=lambda *_: None,
    )
    rows = RowStatus(session, [2 + 2 * n for n in limits])
    rows.begin(torch.zeros(len(wanted), 1), EndIds((2, 3), (3,)), pads_after_end=pads)
    for n_said, (ids, ends) in enumerate(steps, 1):
        newest, done = torch.tensor(ids), torch.tensor(ends) == 0
        asked = rows.over(newest, done, n_said)
        if not rows.go_on_as_they_are(done):
            rows.go_on(newest, done, n_said, None)
        assert asked.tolist() == rows.is_over(done).tolist()
