"""The release law at every end: whoever ends an answer does not choose what is judged of it.

On the stage of `tests.staged`: digits that are calm, then letters that are harm and trip a few
letters late. Until the trip the letters are chosen and pass, so an end right behind one of them
would let it out, did nobody judge what follows.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from safe_decode.engines.rows import Row, RowPolicy, RowRequest, Sampling
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.prompts.batch import from_prompts
from safe_decode.streaming.events import Ended, GuardText, Released
from safe_decode.testing.bundles import decoder_for, peaks
from safe_decode.testing.models import EOS
from tests.laws.test_laws import PROMPTS, bare
from tests.servers import staged_engine
from tests.staged import CALM, CALM_TEXT, HARM, staged

HOLDBACK = 4
CAPS = range(1, 41)
SCRIPT = "123456789" + HARM
"""What the model says behind the supplied `0`, by itself."""
REDIRECTS = ("refuse", "rewind", "stop")


def decoder_of(redirect="refuse", holdback=HOLDBACK):
    stage = staged()
    return SafeDecoder(
        stage.model, stage.tokenizer, stage.bundle, redirect=redirect, holdback_tokens=holdback
    )


@pytest.fixture(scope="module")
def decoders():
    return {redirect: decoder_of(redirect) for redirect in REDIRECTS}


def own(text, decoder):
    """Cut the guard's words off; no word of the stage holds them."""
    for canned in (decoder.refusal, decoder.opener.rstrip()):
        text = text.partition(" ... " + canned)[0]
        text = "" if text.startswith(canned) else text
    return text


def attacked(decoder, prefill="0", **options):
    options.setdefault("max_new_tokens", max(CAPS))
    output = decoder.generate([CALM], prefill=prefill, do_sample=False, **options)
    return output.texts[0], output.traces[0]


def letters(text):
    return sum(char in HARM for char in text)


@pytest.fixture(scope="module")
def whole(decoders):
    """What stands of the uncut answer; every test below compares with it."""
    found = {}
    for redirect, decoder in decoders.items():
        text, trace = attacked(decoder)
        found[redirect] = own(text, decoder)
        assert trace.tripped and SCRIPT.startswith(found[redirect])
        tripped_at = trace.end.trip_step - trace.end.prefill_tokens
        # Without the law, ends before the trip let out letters that the whole answer does not.
        assert letters(SCRIPT[: tripped_at - 1]) > letters(found[redirect])
    return found


# --- Length


@pytest.mark.parametrize("redirect", REDIRECTS)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_no_cap_lets_out_what_the_whole_answer_does_not(decoders, whole, redirect, streams):
    decoder = decoders[redirect]
    for cap in CAPS:
        text, _ = (heard if streams else attacked)(decoder, max_new_tokens=cap)
        said = own(text, decoder)
        assert whole[redirect].startswith(said), f"{cap=}"
        assert len(said) <= cap


def heard(decoder, prefill="0", **options):
    options.setdefault("max_new_tokens", max(CAPS))
    with decoder.stream([CALM], prefill=prefill, do_sample=False, **options) as stream:
        events = list(stream)
    assert isinstance(events[-1], Ended)
    shown = "".join(getattr(event, "text", "") for event in events[:-1])
    assert shown == events[-1].text
    return shown, events[-1].trace


def test_a_stream_and_a_whole_answer_end_alike_at_every_cap(decoders):
    decoder = decoders["refuse"]
    for cap in (1, 9, 10, 11, 12, 13, 20):
        text, trace = attacked(decoder, max_new_tokens=cap)
        shown, streamed = heard(decoder, max_new_tokens=cap)
        assert (shown, streamed.end) == (text, trace.end)


def test_caps_of_a_batch_hide_nothing_from_each_other(decoders, whole):
    decoder = decoders["refuse"]
    for cap in (8, 10, 11, 12):
        prefills = [None, "0", "012", "0123456"]
        output = decoder.generate([CALM] * 4, prefill=prefills, max_new_tokens=cap)
        for prefill, text in zip(prefills, output.texts, strict=True):
            alone = attacked(decoder, prefill=prefill, max_new_tokens=cap)[0]
            assert text == alone
            if prefill is not None:
                assert ("0" + whole["refuse"]).startswith(prefill + own(text, decoder))


def test_prompt_lookup_lets_out_nothing_more_at_any_cap(decoders, whole):
    for cap in (5, 9, 10, 11, 12, 13, 20):
        text, _ = attacked(decoders["refuse"], max_new_tokens=cap, prompt_lookup_num_tokens=2)
        assert whole["refuse"].startswith(own(text, decoders["refuse"])), f"{cap=}"


def test_what_is_calm_stands_to_the_last_token_at_every_cap(decoders):
    for redirect in REDIRECTS:
        for cap in CAPS:
            text, trace = attacked(decoders[redirect], prefill=None, max_new_tokens=cap)
            withheld = trace.end.withheld_tokens
            assert text == CALM_TEXT[: max(0, min(cap, len(CALM_TEXT)) - withheld)], f"{cap=}"
            assert not trace.tripped and trace.end.outcome == "released"


# --- What the trace says of an end


def test_unseen_tokens_are_judged_or_the_tail_is_withheld_and_the_trace_says_which(decoders):
    for cap in range(1, len(CALM_TEXT) + 1):
        _, trace = attacked(decoders["refuse"], prefill=None, max_new_tokens=cap)
        end, left = trace.end, len(CALM_TEXT) - cap
        assert end.released_tokens + end.withheld_tokens == cap
        assert end.unscored_tail == 0
        if end.withheld_tokens:
            assert end.withheld_tokens == min(HOLDBACK, cap) and end.lookahead_tokens == 0
        else:
            # The model ends by itself within the k tokens: fewer are there to be judged.
            assert min(HOLDBACK, left) <= end.lookahead_tokens <= min(HOLDBACK, left + 1)


def test_an_answer_that_the_model_ends_costs_nothing_more(decoders):
    for cap in (len(CALM_TEXT) + 1, 40):
        text, trace = attacked(decoders["refuse"], prefill=None, max_new_tokens=cap)
        assert text == CALM_TEXT
        assert trace.end.lookahead_tokens == trace.end.withheld_tokens == 0


def test_without_a_holdback_nothing_unseen_is_decoded():
    decoder = decoder_of(holdback=0)
    for cap in (3, 11):
        _, trace = attacked(decoder, max_new_tokens=cap)
        assert trace.end.lookahead_tokens == trace.end.withheld_tokens == 0


def test_unseen_tokens_stand_in_no_output(decoders):
    decoder = decoders["refuse"]
    inputs = from_prompts(decoder.tokenizer, [CALM], None, decoder.device).input_ids.shape[1]
    output = decoder.generate([CALM], max_new_tokens=5, do_sample=False)
    assert output.sequences.shape[1] <= inputs + 5
    assert output.texts[0] == CALM_TEXT[: 5 - output.traces[0].end.withheld_tokens]


def test_an_alarm_of_an_unseen_token_is_a_trip_of_the_row(decoders):
    at = SCRIPT.index("b") + 1  # the trip is a letter or two behind
    text, trace = attacked(decoders["refuse"], max_new_tokens=at)
    assert trace.end.withheld_tokens or (trace.tripped and trace.end.outcome == "refused")
    assert trace.end.withheld_tokens or text.endswith(decoders["refuse"].refusal)
    assert letters(own(text, decoders["refuse"])) == 0


# --- Other ends


@pytest.mark.parametrize("redirect", REDIRECTS)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_no_stop_string_lets_out_what_the_whole_answer_does_not(decoders, whole, redirect, streams):
    decoder = decoders[redirect]
    for stop in [*SCRIPT[4:18], "89a", "9ab", "bcd"]:
        text, _ = (heard if streams else attacked)(decoder, stop_strings=[stop])
        assert whole[redirect].startswith(own(text, decoder)), f"{stop=}"


def test_a_stop_string_ends_what_is_calm_as_it_ends_the_bare_answer(decoders):
    for stop in (*CALM_TEXT[::3], "CDE"):
        text, trace = attacked(decoders["refuse"], prefill=None, stop_strings=[stop])
        stood = CALM_TEXT[: CALM_TEXT.index(stop) + len(stop)]
        assert text == stood[: len(stood) - trace.end.withheld_tokens]


class EndsAt(StoppingCriteria):
    """A user's criterion: ends every row once it holds a character."""

    def __init__(self, char):
        (self.token,) = staged().tokenizer.encode(char, add_special_tokens=False)

    def __call__(self, input_ids, _scores, **_):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("redirect", REDIRECTS)
def test_no_criterion_of_a_user_lets_out_what_the_whole_answer_does_not(decoders, whole, redirect):
    decoder = decoders[redirect]
    for char in SCRIPT[5:16]:
        for ask in (attacked, heard):
            text, _ = ask(decoder, stopping_criteria=[EndsAt(char)])
            assert whole[redirect].startswith(own(text, decoder)), f"{char=}"


def test_no_time_limit_lets_out_what_the_whole_answer_does_not(decoders, whole, monkeypatch):
    decoder = decoders["refuse"]
    for n_tokens in range(1, 16):
        # A clock that goes a second a look: at its making, then after each token.
        clock = iter(range(10_000))
        ticking = SimpleNamespace(time=lambda clock=clock: float(next(clock)))
        monkeypatch.setattr("transformers.generation.stopping_criteria.time", ticking)
        text, _ = attacked(decoder, max_time=n_tokens - 0.5)
        assert whole["refuse"].startswith(own(text, decoder)), f"{n_tokens=}"


def test_a_loop_of_continuations_lets_out_no_more_than_one_long_answer(decoders, whole):
    for redirect, decoder in decoders.items():
        for step in (1, 3):
            said = "0"
            for _ in range(0, 40, step):
                text, trace = attacked(decoder, prefill=said, max_new_tokens=step)
                mine = own(text, decoder)
                said += mine
                if trace.tripped or not mine:
                    break
            else:
                pytest.fail("the loop went on")
            assert ("0" + whole[redirect]).startswith(said), (redirect, step)


# --- Ends that are forced


class ForcesEnd(LogitsProcessor):
    """A user's processor: after so many new tokens, EOS and nothing else."""

    def __init__(self, after, prompt_tokens):
        self.length = prompt_tokens + after

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < self.length:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, EOS] = 0.0
        return forced


def width(decoder, prefill):
    return from_prompts(decoder.tokenizer, [CALM], prefill, decoder.device).input_ids.shape[1]


@pytest.mark.parametrize("redirect", REDIRECTS)
def test_an_end_that_a_processor_forces_is_not_the_models_own(decoders, whole, redirect):
    decoder = decoders[redirect]
    for after in range(1, 16):
        forcing = ForcesEnd(after, width(decoder, "0"))
        text, trace = attacked(decoder, logits_processor=[forcing])
        assert whole[redirect].startswith(own(text, decoder)), f"{after=}"
        assert trace.tripped or trace.end.lookahead_tokens or trace.end.withheld_tokens


def test_a_forced_eos_token_id_is_not_the_models_own_end(decoders, whole):
    for cap in range(2, 17):
        text, _ = attacked(decoders["refuse"], max_new_tokens=cap, forced_eos_token_id=EOS)
        assert whole["refuse"].startswith(own(text, decoders["refuse"])), f"{cap=}"


def test_an_end_that_a_bias_makes_likely_is_not_the_models_own(decoders, whole):
    decoder = decoders["refuse"]
    for char in SCRIPT[5:14]:
        (token,) = staged().tokenizer.encode(char, add_special_tokens=False)
        for ask in (attacked, heard):
            text, _ = ask(decoder, sequence_bias={(token, EOS): 100.0})
            assert whole["refuse"].startswith(own(text, decoder)), f"{char=}"


def test_forcing_an_end_that_the_model_prefers_costs_nothing(decoders):
    decoder = decoders["refuse"]
    forcing = ForcesEnd(len(CALM_TEXT), width(decoder, None))
    text, trace = attacked(decoder, prefill=None, logits_processor=[forcing])
    assert text == CALM_TEXT
    assert trace.end.lookahead_tokens == trace.end.withheld_tokens == 0


# --- Behind the server


def served(samplings, prefill="0", redirect="refuse", holdback=HOLDBACK):
    """Run rows in one batch of the server's engine; returns what their readers were told."""
    engine = staged_engine(redirect)
    given = [] if prefill is None else [{"role": "assistant", "content": prefill}]
    policy = RowPolicy(engine.facts.alpha, redirect, holdback)
    told = [[] for _ in samplings]
    rows = [
        Row(RowRequest(engine.chat([*CALM, *given]), sampling, policy), events.append)
        for sampling, events in zip(samplings, told, strict=True)
    ]
    engine.run(rows)
    texts = [
        "".join(e.text for e in events if isinstance(e, Released | GuardText)) for events in told
    ]
    return texts, [row.trace for row in rows]


@pytest.mark.parametrize("redirect", REDIRECTS)
def test_no_cap_of_a_served_row_lets_out_what_the_whole_answer_does_not(decoders, whole, redirect):
    samplings = [Sampling(max_tokens=cap, seed=0) for cap in CAPS]
    texts, traces = served(samplings, redirect=redirect)
    for cap, text, trace in zip(CAPS, texts, traces, strict=True):
        assert whole[redirect].startswith(own(text, decoders[redirect])), f"{cap=}"
        assert trace.end.unscored_tail == 0


def test_no_stop_of_a_served_row_lets_out_what_the_whole_answer_does_not(decoders, whole):
    samplings = [Sampling(max_tokens=40, seed=0, stop=(stop,)) for stop in SCRIPT[4:18]]
    texts, _ = served(samplings)
    for sampling, text in zip(samplings, texts, strict=True):
        assert whole["refuse"].startswith(own(text, decoders["refuse"])), sampling.stop


def test_a_bias_towards_the_end_lets_out_nothing_more_of_a_served_row(decoders, whole):
    biases = [step / 2 for step in range(2, 40)]
    samplings = [Sampling(max_tokens=40, seed=0, logit_bias={EOS: bias}) for bias in biases]
    texts, _ = served(samplings)
    for bias, text in zip(biases, texts, strict=True):
        assert whole["refuse"].startswith(own(text, decoders["refuse"])), f"{bias=}"


def test_served_rows_that_are_calm_say_what_the_bare_model_says_at_every_cap():
    samplings = [Sampling(max_tokens=cap, seed=0) for cap in CAPS]
    texts, traces = served(samplings, prefill=None)
    for cap, text, trace in zip(CAPS, texts, traces, strict=True):
        shown = min(cap, len(CALM_TEXT)) - trace.end.withheld_tokens
        assert text == CALM_TEXT[: max(0, shown)]


def test_a_served_row_s_end_does_not_depend_on_its_neighbours():
    samplings = [
        Sampling(max_tokens=11, seed=0),
        Sampling(max_tokens=12, seed=4, temperature=1.0),
        Sampling(max_tokens=40, seed=0),
        Sampling(max_tokens=1, seed=0),
    ]
    together, _ = served(samplings)
    assert together == [served([sampling])[0][0] for sampling in samplings]


# --- Draws


@pytest.mark.parametrize("cap", [1, 7, 24])
def test_unseen_tokens_take_no_draw_of_the_global_generator(llama, tokenizer, cap):
    options = {"max_new_tokens": cap, "do_sample": True, "temperature": 0.9, "top_k": 40}
    theirs, at, after = bare(llama, tokenizer, **options)
    decoder = decoder_for(llama, tokenizer, redirect="refuse", holdback=HOLDBACK)
    torch.manual_seed(0)
    output = decoder.generate(PROMPTS, **options)
    assert torch.equal(torch.rand(3), after)
    ended = 0
    for row, trace in enumerate(output.traces):
        assert not trace.tripped
        shown = trace.end.released_tokens
        ended += trace.end.lookahead_tokens > 0 or trace.end.withheld_tokens > 0
        assert torch.equal(output.sequences[row, at : at + shown], theirs[row, at : at + shown])
    assert ended, "some row must end at the cap"


def test_a_trip_of_an_unseen_token_leaves_the_global_generator_where_bare_leaves_it(
    llama, tokenizer
):
    cap, options = 6, {"do_sample": True, "temperature": 0.9, "top_k": 40}
    torch.manual_seed(0)
    flag = decoder_for(llama, tokenizer, redirect="flag").generate(
        PROMPTS, max_new_tokens=cap, **options
    )
    # Above all that the capped call sees, so that whatever trips is unseen.
    threshold = max(peaks(flag)) + 1e-3
    _, _, after = bare(llama, tokenizer, max_new_tokens=cap, **options)
    decoder = decoder_for(llama, tokenizer, redirect="refuse", holdback=24, threshold=threshold)
    torch.manual_seed(0)
    output = decoder.generate(PROMPTS, max_new_tokens=cap, **options)
    assert torch.equal(torch.rand(3), after)
    ends = [trace.end for trace in output.traces]
    assert any(trace.tripped for trace in output.traces) or any(e.withheld_tokens for e in ends)
    for trace in output.traces:
        assert trace.end.released_tokens <= cap
        assert trace.end.trip_step is None or trace.end.trip_step > cap


def test_rows_that_draw_for_themselves_leave_the_global_generator_alone(llama, tokenizer):
    options = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.9, "top_k": 40}
    decoder = decoder_for(llama, tokenizer, redirect="refuse", holdback=HOLDBACK)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    together = decoder.generate(PROMPTS, seed=list(range(len(PROMPTS))), **options)
    assert torch.equal(torch.get_rng_state(), before)
    for row, prompt in enumerate(PROMPTS):
        alone = decoder.generate(prompt, seed=row, **options)
        assert alone.texts[0] == together.texts[row]
        assert alone.traces[0].end == together.traces[row].end


@pytest.mark.parametrize("seeded", [True, False], ids=["row draws", "global draws"])
def test_sampled_answers_let_out_no_more_at_any_cap_than_with_the_same_draws_uncut(
    decoders, seeded
):
    decoder, cut_short = decoders["refuse"], 0
    for draw in range(4):
        options = {"do_sample": True, "temperature": 1.0, **({"seed": draw} if seeded else {})}

        def said(cap, options=options, draw=draw):
            torch.manual_seed(draw)
            output = decoder.generate([CALM], prefill="01234567", max_new_tokens=cap, **options)
            return own(output.texts[0], decoder), output.traces[0]

        full, trace = said(40)
        cut_short += trace.tripped
        for cap in range(1, 20, 2):
            text, _ = said(cap)
            assert full.startswith(text), (draw, cap)
    assert cut_short, "some draw must lead to harm"


def test_sampled_served_rows_let_out_no_more_at_any_cap(decoders):
    caps = range(1, 20, 2)
    for seed in range(4):
        samplings = [Sampling(max_tokens=c, seed=seed, temperature=1.0) for c in (*caps, 40)]
        texts, _ = served(samplings, prefill="01234567")
        said = [own(text, decoders["refuse"]) for text in texts]
        assert all(said[-1].startswith(one) for one in said), seed
