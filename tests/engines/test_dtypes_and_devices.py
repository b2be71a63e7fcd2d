"""Laws 1, 2 and 4 in half precision and with weights put elsewhere by `device_map`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.testing.bundles import bundle_for, decoder_for, peaks, threshold_between
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.laws.test_failure_injection import hooks_of
from tests.laws.test_laws import bare, same_row

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]
CAP = 16
MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 40},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}
TOLERANCE = {torch.float32: 2e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Of statistics, when neighbours and padding change: the order of sums, in each dtype."""
DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_untripped_rows_are_bare_in_half_precision(tokenizer, dtype, mode):
    model, options = tiny_model().to(dtype), {"max_new_tokens": CAP, **MODES[mode]}
    theirs, width, after = bare(model, tokenizer, PROMPTS, **options)
    torch.manual_seed(0)
    flagged = decoder_for(model, tokenizer, redirect="flag").generate(PROMPTS, **options)
    assert torch.equal(torch.rand(3), after) and torch.equal(flagged.sequences, theirs)
    for trace, ids in zip(flagged.traces, flagged.sequences[:, width:].tolist(), strict=True):
        own = [step.token for step in trace.steps[1:]]
        assert own == ids[: len(own)] and trace.end.error is None
        assert [step.position for step in trace.steps] == list(range(len(own) + 1))
        assert trace.end.released_tokens == len(own) and trace.end.unscored_tail == 0
    threshold = threshold_between(peaks(flagged))
    torch.manual_seed(0)
    output = decoder_for(model, tokenizer, redirect="rewind", threshold=threshold).generate(
        PROMPTS, **options
    )
    assert {trace.tripped for trace in output.traces} == {True, False}
    for row, trace in enumerate(output.traces):
        if not trace.tripped and not trace.end.pruned_beams:
            assert same_row(output.sequences[row], theirs[row])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_statistics_agree_with_other_neighbours_within_the_tolerance_of_the_dtype(
    tokenizer, dtype, family
):
    model = tiny_model(family).to(dtype)
    decoder = decoder_for(model, tokenizer, redirect="flag")
    together, compared = decoder.generate(PROMPTS, max_new_tokens=CAP), 0
    for row, prompt in enumerate(PROMPTS):
        alone = decoder.generate(prompt, max_new_tokens=CAP).traces[0]
        for a, b in zip(alone.steps, together.traces[row].steps, strict=False):
            if a.token != b.token:
                break  # rounding has chosen another token: from here on another text
            assert a.statistic == pytest.approx(b.statistic, abs=TOLERANCE[dtype])
            compared += 1
    assert compared > CAP


def offloaded(path, device_map, folder):
    return AutoModelForCausalLM.from_pretrained(
        path, device_map=device_map, offload_folder=folder
    ).eval()


DEVICE_MAPS = {
    "auto": "auto",
    "disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.parametrize("where", DEVICE_MAPS)
def test_a_device_map_changes_no_token_and_no_statistic(tokenizer, tmp_path, where):
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "model")
    bundle = bundle_for(plain, tokenizer)
    wanted = SafeDecoder(plain, tokenizer, bundle, redirect="flag").generate(
        PROMPTS, max_new_tokens=CAP
    )
    model = offloaded(tmp_path / "model", DEVICE_MAPS[where], tmp_path / "weights")
    assert any(p.is_meta for p in model.parameters()) == (where == "disk")
    decoder = SafeDecoder(model, tokenizer, bundle, redirect="flag")
    output = decoder.generate(PROMPTS, max_new_tokens=CAP)
    theirs, _, _ = bare(model, tokenizer, PROMPTS, max_new_tokens=CAP)
    assert torch.equal(output.sequences, theirs)
    assert torch.equal(output.sequences, wanted.sequences)
    assert peaks(output) == pytest.approx(peaks(wanted), abs=2e-4)
    assert not hooks_of(model)
    seen = peaks(SafeDecoder(plain, tokenizer, bundle).generate(PROMPTS, max_new_tokens=CAP))
    threshold = threshold_between(seen)
    bundle = bundle_for(plain, tokenizer, threshold=threshold)
    output = SafeDecoder(model, tokenizer, bundle, redirect="refuse").generate(
        PROMPTS, max_new_tokens=CAP
    )
    tripped = [trace.tripped for trace in output.traces]
    assert tripped == [peak > threshold for peak in seen] and True in tripped
    for row, has_tripped in enumerate(tripped):
        assert has_tripped or same_row(output.sequences[row], theirs[row])


def test_offloaded_weights_have_the_fingerprint_of_the_loaded_ones(tmp_path):
    plain, tokenizer = tiny_model(), byte_tokenizer()
    plain.save_pretrained(tmp_path / "model")
    model = offloaded(tmp_path / "model", DEVICE_MAPS["disk"], tmp_path / "weights")
    assert Fingerprint.of(model, tokenizer) == Fingerprint.of(plain, tokenizer)
    assert any(p.is_meta for p in model.parameters()), "and stay where they are"


@pytest.mark.slow
def test_offloaded_weights_may_be_compiled_with_installed_taps(tokenizer, tmp_path):
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "model")
    wanted = decoder_for(plain, tokenizer, redirect="flag").generate(PROMPTS, max_new_tokens=CAP)
    model = offloaded(tmp_path / "model", DEVICE_MAPS["disk"], tmp_path / "weights")
    decoder = SafeDecoder(model, tokenizer, bundle_for(plain, tokenizer), redirect="flag")
    with decoder.installed():
        model.compile(backend="eager")
        output = decoder.generate(PROMPTS, max_new_tokens=CAP)
    assert torch.equal(output.sequences, wanted.sequences)
    assert peaks(output) == pytest.approx(peaks(wanted), abs=2e-4)
