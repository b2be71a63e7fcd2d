"""Guarded decoding under `torch.compile`: taps that graphs read, and that nothing skips.

Backend "eager" traces as every backend does and compiles nothing, so most tests take seconds;
those with inductor and over families are slow.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
from transformers import CompileConfig

from safe_decode.activations.compiled.forward_patch import compiled_part
from safe_decode.activations.site import Site
from safe_decode.activations.tap import ActivationTap
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import BeatError, UnsupportedError
from safe_decode.policy.self_check import SelfCheck
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import (
    REFUSAL,
    SITES,
    bundle_for,
    decoder_for,
    peaks,
    random_probe,
    threshold_between,
)
from safe_decode.testing.models import FAMILIES, tiny_model
from tests.laws.test_failure_injection import At, hooks_of
from tests.laws.test_laws import bare, same_row

# Dynamo describes each step of tracing there; collecting that costs more than tracing.
logging.getLogger("torch.__trace").disabled = True

PROMPTS = ["hello", "what is it?", "go", "abc"]
CAP = 12


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Dynamo keeps a few graphs of a piece of code, and runs what is beyond them eagerly."""
    torch.compiler.reset()


def counting():
    """A backend that counts what it is given; a function, since configurations are copied."""

    def backend(graph, _example_inputs):
        backend.graphs += 1
        return graph.forward

    backend.graphs = 0
    return backend


def auto(backend="eager", **options):
    """Options under which `generate` compiles its decoding steps by itself, on the CPU too."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return {
        "cache_implementation": "static",
        "compile_config": config,
        "max_new_tokens": CAP,
        **options,
    }


def own_forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_one_score_each(output, width):
    """Law 4."""
    for trace, ids in zip(output.traces, output.sequences[:, width:].tolist(), strict=True):
        own = [step.token for step in trace.steps[1:]]
        assert own == ids[: len(own)] and trace.end.error is None
        assert [step.position for step in trace.steps] == list(range(len(own) + 1))
        assert trace.end.released_tokens == len(own) and trace.end.unscored_tail == 0


def check_laws(family, tokenizer, *, whole, backend="eager", tolerance=2e-4, dtype=None, **options):
    """Laws 1, 2 and 4 of a compiled model, against its compiled twin and the eager one."""

    def model_of():
        model = tiny_model(family)
        return model if dtype is None else model.to(dtype)

    twin, model, options = model_of(), model_of(), auto(backend, **options)
    if whole:
        del options["compile_config"]
        twin.compile(backend=backend)
        model.compile(backend=backend)
    # The twin is compiled first: its graphs are there to be taken for ours.
    theirs, width, after = bare(twin, tokenizer, PROMPTS, **options)
    eager = decoder_for(model_of(), tokenizer, redirect="flag")
    plain = {key: value for key, value in options.items() if key != "compile_config"}
    torch.manual_seed(0)
    expected = eager.generate(PROMPTS, **plain)
    decoder = decoder_for(model, tokenizer, redirect="flag")
    with decoder.installed():
        torch.manual_seed(0)
        flagged = decoder.generate(PROMPTS, **options)
        assert torch.equal(torch.rand(3), after)
    assert torch.equal(flagged.sequences, theirs)
    assert_one_score_each(flagged, width)
    for ours, other in zip(flagged.traces, expected.traces, strict=True):
        for mine, step in zip(ours.steps, other.steps, strict=False):
            if mine.token != step.token:
                break  # rounding has chosen another token: from here on another text
            assert mine.statistic == pytest.approx(step.statistic, abs=tolerance)
    threshold = threshold_between(peaks(flagged))
    decoder = decoder_for(model, tokenizer, redirect="rewind", threshold=threshold)
    with decoder.installed():
        torch.manual_seed(0)
        output = decoder.generate(PROMPTS, **options)
    assert {trace.tripped for trace in output.traces} == {True, False}
    untouched = 0
    for row, trace in enumerate(output.traces):
        assert trace.end.error is None
        if not trace.tripped and not trace.end.pruned_beams:
            untouched += 1
            assert same_row(output.sequences[row], theirs[row])
    assert untouched and not own_forwards(model) and not hooks_of(model)


def test_laws_hold_where_generate_compiles_by_itself(tokenizer):
    check_laws("llama", tokenizer, whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "mistral_window", "phi", "mixtral"])
@pytest.mark.parametrize("whole", [False, True])
def test_laws_hold_compiled_in_every_family(tokenizer, family, whole):
    check_laws(family, tokenizer, whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"do_sample": True, "top_k": 40}, {"num_beams": 3}, {"return_dict_in_generate": 1}]
)
def test_laws_hold_compiled_in_further_modes(tokenizer, options):
    if "return_dict_in_generate" in options:
        options = {"num_return_sequences": 2, "do_sample": True}
    check_laws("llama", tokenizer, whole=False, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("whole", [False, True])
def test_laws_hold_with_inductor(tokenizer, whole):
    check_laws("llama", tokenizer, whole=whole, backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_laws_hold_compiled_in_half_precision(tokenizer, dtype):
    check_laws("llama", tokenizer, whole=False, dtype=dtype, tolerance=0.15)


# --- the other ways in


def test_streams_and_processors_read_compiled_steps(tokenizer):
    model, backend = tiny_model(), counting()
    decoder = decoder_for(model, tokenizer, redirect="flag")
    plain = decoder.generate("hello", max_new_tokens=CAP)
    inputs = from_prompts(tokenizer, "hello", None, model.device)
    given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with decoder.installed():
        with decoder.stream("hello", **auto(backend)) as stream:
            events = list(stream)
        with decoder.processor(**given, redirect="flag") as guard:
            ids = model.generate(
                **given,
                **auto(backend),
                logits_processor=[guard.logits_processor],
                stopping_criteria=[guard.stopping_criteria],
            )
    assert backend.graphs == 1
    streamed, own = events[-1].trace, guard.traces[0]
    assert events[-1].text == plain.texts[0] and torch.equal(ids, plain.sequences)
    for trace in (streamed, own):
        assert trace.end.error is None
        wanted = plain.traces[0].steps[: len(trace.steps)]
        assert len(wanted) >= CAP
        for mine, step in zip(trace.steps, wanted, strict=True):
            assert mine.statistic == pytest.approx(step.statistic, abs=2e-4)


# --- the twin without taps


def test_a_twin_compiled_before_does_not_lend_its_graph(tokenizer):
    backend = counting()
    bare(tiny_model(), tokenizer, PROMPTS, **auto(backend))
    n_twins = backend.graphs
    assert n_twins == 1
    model = tiny_model()
    decoder, unguarded = decoder_for(model, tokenizer, redirect="flag"), []
    plain = decoder.generate(PROMPTS, cache_implementation="static", max_new_tokens=CAP)
    assert backend.graphs == n_twins, "outside, generation runs eagerly"
    with decoder.installed():
        for _ in range(3):
            output = decoder.generate(PROMPTS, **auto(backend))
            assert output.traces[0].end.error is None
            assert torch.equal(output.sequences, plain.sequences)
            assert peaks(output) == pytest.approx(peaks(plain), abs=2e-4)
            unguarded.append(bare(model, tokenizer, PROMPTS, **auto(backend))[0])
    assert backend.graphs == n_twins + 1, "one graph with taps, for three sessions and between"
    unguarded.append(bare(model, tokenizer, PROMPTS, **auto(backend))[0])
    assert backend.graphs == n_twins + 1, "after it, the twin's graph again"
    assert all(torch.equal(ids, plain.sequences) for ids in unguarded)


def test_two_tapped_models_of_one_shape_write_to_their_own_registers(tokenizer):
    backend = counting()
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    decoders = [decoder_for(model, tokenizer, redirect="flag") for model in (first, second)]
    wanted = [decoder.generate(PROMPTS, max_new_tokens=CAP) for decoder in decoders]
    with decoders[0].installed(), decoders[1].installed():
        for decoder, plain in zip(decoders, wanted, strict=True):
            output = decoder.generate(PROMPTS, **auto(backend))
            assert output.traces[0].end.error is None
            assert peaks(output) == pytest.approx(peaks(plain), abs=2e-4)


def test_two_taps_in_one_module_are_both_read():
    model = tiny_model("opt")
    # A flattened MLP asks the first block for the rows, whose output is a site too.
    tap = ActivationTap(model, [Site(0, "mlp", (1, 5, 9)), Site(0, "resid", (0, 3))])
    ids = torch.tensor([[5, 8, 9], [6, 7, 8]])
    with torch.no_grad():
        with tap.listening() as beats:
            beats.keep_last(None)
            model(input_ids=ids, use_cache=False)
            wanted = beats.take()
        for _ in range(2):
            with tap.built_in(), tap.listening() as beats:
                beats.keep_last(2)
                torch.compile(model, backend="eager")(input_ids=ids, use_cache=False)
                torch.testing.assert_close(beats.take(), wanted[:, -2:])
                model(input_ids=ids, use_cache=False)
                torch.testing.assert_close(beats.take(), wanted[:, -2:])
    assert not own_forwards(model)


# --- what would not be read


@pytest.mark.parametrize(
    "compiles",
    [
        lambda model: model.compile(backend="eager"),
        lambda model: model.model.layers[1].compile(backend="eager"),
        lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    ],
)
def test_hooks_of_a_call_on_a_compiled_model_are_refused_by_name(tokenizer, compiles):
    model = tiny_model()
    decoder = decoder_for(model, tokenizer)
    compiles(model)
    with pytest.raises(
        UnsupportedError, match=r"torch.compile='.*' is refused: .* decoder.installed"
    ):
        decoder.generate("hello", max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="torch.compile"):
        decoder.stream("hello", max_new_tokens=2)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(UnsupportedError, match="torch.compile"), decoder.processor(ids):
        pytest.fail("entered")
    with (
        pytest.raises(UnsupportedError, match="is compiled and would skip the hooks"),
        ActivationTap(model, SITES).listening(),
    ):
        pytest.fail("entered")
    assert not hooks_of(model)


def test_what_is_compiled_is_named():
    model = tiny_model()
    assert compiled_part(model) is None
    model.model.layers[1].mlp.compile(backend="eager")
    assert compiled_part(model) == "model.layers.1.mlp"
    assert compiled_part(torch.compile(tiny_model(), backend="eager")) == "model"


def test_the_wrapper_of_torch_compile_generates_as_its_original(tokenizer):
    backend = counting()
    model = tiny_model()
    wrapped = torch.compile(model, backend=backend)
    theirs, width, _ = bare(wrapped, tokenizer, PROMPTS, max_new_tokens=CAP)
    decoder = SafeDecoder(wrapped, tokenizer, bundle_for(model, tokenizer), redirect="flag")
    output = decoder.generate(PROMPTS, max_new_tokens=CAP)
    assert torch.equal(output.sequences, theirs) and backend.graphs == 0
    assert_one_score_each(output, width)


def test_what_installed_taps_cannot_hear_is_refused_by_name(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    with pytest.raises(
        UnsupportedError, match=r"compile_config=<CompileConfig> .* decoder.installed"
    ):
        decoder.generate("hello", compile_config=CompileConfig())
    with decoder.installed():
        with pytest.raises(UnsupportedError, match=r"prefill_chunk_size=2 .* newest chunk"):
            decoder.generate("hello", prefill_chunk_size=2)
        with pytest.raises(UnsupportedError, match="cannot be installed twice"):
            decoder.installed().__enter__()
        other = decoder_for(llama, tokenizer)
        with pytest.raises(UnsupportedError, match="another decoder's taps"):
            other.installed().__enter__()
    assert not own_forwards(llama)
    check = SelfCheck(random_probe(), threshold=0.0)
    with pytest.raises(UnsupportedError, match="refused with self_check"):
        decoder_for(llama, tokenizer, self_check=check).installed().__enter__()
    with (
        decoder._tap.listening(),
        pytest.raises(UnsupportedError, match="while a call is running"),
    ):
        decoder.installed().__enter__()


def test_one_session_at_a_time_reads_installed_taps(llama, tokenizer):
    decoder, caught = decoder_for(llama, tokenizer, redirect="flag"), []

    def intrude():
        def call():
            try:
                decoder.generate("go", max_new_tokens=2)
            except UnsupportedError as error:
                caught.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with decoder.installed():
        output = decoder.generate("hello", max_new_tokens=6, logits_processor=[At(3, intrude)])
        assert "being read by another session" in caught[0]
        assert output.traces[0].end.error is None
        again = decoder.generate("hello", max_new_tokens=6)
    assert again.sequences.tolist() == output.sequences.tolist()


# --- closed


@pytest.mark.parametrize("n_forwards", [1, 2])
def test_a_compiled_forward_of_somebody_else_closes_the_rows(tokenizer, n_forwards):
    model = tiny_model()
    decoder = decoder_for(model, tokenizer, redirect="rewind")
    ids = torch.tensor([[5], [6]])

    def stranger():
        for _ in range(n_forwards):
            model(input_ids=ids, use_cache=False)

    with decoder.installed():
        model.compile(backend="eager")
        output = decoder.generate(
            ["hello", "go"],
            max_new_tokens=8,
            use_cache=False,
            logits_processor=[At(4, stranger)],
        )
    for trace, text in zip(output.traces, output.texts, strict=True):
        assert trace.end.outcome == "closed" and "BeatError" in trace.end.error
        assert text.endswith(REFUSAL)


def test_taps_removed_while_generating_close_the_rows(tokenizer):
    model = tiny_model()
    decoder, stack = decoder_for(model, tokenizer, redirect="rewind"), ExitStack()
    stack.enter_context(decoder.installed())
    output = decoder.generate(
        PROMPTS, logits_processor=[At(4, stack.close)], stopping_criteria=[], **auto()
    )
    for trace, text in zip(output.traces, output.texts, strict=True):
        assert trace.end.outcome == "closed" and "BeatError" in trace.end.error
        assert text.endswith(REFUSAL) and trace.end.released_tokens <= 4
    assert not own_forwards(model)


def test_a_graph_that_ran_unread_is_an_error_on_the_host_and_nan_on_a_device(monkeypatch):
    model = tiny_model()
    tap = ActivationTap(model, SITES)
    ids = torch.tensor([[5], [6]])
    with tap.built_in(), torch.no_grad():
        run = torch.compile(model, backend="eager")
        with tap.listening() as beats:
            run(input_ids=ids, use_cache=False)
            wanted = beats.take()
            assert wanted.isfinite().all()
            run(input_ids=ids, use_cache=False)
            run(input_ids=ids, use_cache=False)
            assert beats.forwards == 1, "the newest alone is there"
            with pytest.raises(BeatError, match="ran more than once before one choice"):
                beats.take()
            beats.discard()
            run(input_ids=ids, use_cache=False)
            assert torch.equal(beats.take(), wanted)
            # An accelerator is not asked; its features say it.
            monkeypatch.setattr(type(beats), "_waits", staticmethod(lambda _flag: True))
            run(input_ids=ids, use_cache=False)
            assert torch.equal(beats.take(), wanted)
            run(input_ids=ids, use_cache=False)
            run(input_ids=ids, use_cache=False)
            assert beats.take().isnan().all()


def test_where_dynamo_gives_up_compiling_the_hooks_hear_instead(tokenizer):
    backend, model = counting(), tiny_model()
    decoder = decoder_for(model, tokenizer, redirect="flag")
    plain = decoder.generate(PROMPTS, max_new_tokens=CAP)
    with decoder.installed(), torch._dynamo.config.patch(recompile_limit=1):
        model.compile(backend=backend)
        output = decoder.generate(PROMPTS, max_new_tokens=CAP)
    assert backend.graphs >= 1
    assert torch.equal(output.sequences, plain.sequences)
    assert peaks(output) == pytest.approx(peaks(plain), abs=2e-4)


# --- nothing is left


def test_installed_taps_leave_nothing_after_success_and_failure(tokenizer):
    model = tiny_model()
    names = set(vars(model.model.layers[0].mlp.down_proj))
    decoder = decoder_for(model, tokenizer)
    with pytest.raises(ZeroDivisionError), decoder.installed():
        assert len(own_forwards(model)) == len(SITES)
        raise ZeroDivisionError
    assert not own_forwards(model) and set(vars(model.model.layers[0].mlp.down_proj)) == names
    with decoder.installed():
        registers = weakref.ref(decoder._tap._built_in.registers)
    del decoder
    gc.collect()
    assert registers() is None, "whoever keeps the model keeps nothing of the decoder"


def test_installing_again_finds_the_graphs_of_the_first_time(tokenizer):
    backend, model = counting(), tiny_model()
    decoder = decoder_for(model, tokenizer, redirect="flag")
    for _ in range(3):
        with decoder.installed():
            output = decoder.generate(PROMPTS, **auto(backend))
        assert output.traces[0].end.error is None
        assert all(register.value is None for register in decoder._tap._spare.registers.by_site)
    assert backend.graphs == 1


def test_a_forward_that_stood_there_is_put_back(llama, tokenizer):
    module = llama.model.layers[0].mlp.down_proj
    own = module.forward
    module.forward = own
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    plain = decoder.generate("hello", max_new_tokens=5)
    with decoder.installed():
        assert module.forward is not own
        output = decoder.generate("hello", max_new_tokens=5)
    assert module.forward is own and output.sequences.tolist() == plain.sequences.tolist()
    assert peaks(output) == peaks(plain)
