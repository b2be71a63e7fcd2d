"""Every bundle of the catalogue says what it holds, and fits the model that it names."""

from __future__ import annotations

import pytest

from safe_decode import SafeDecoder, load_bundle, load_model
from safe_decode.bundle.plausible import require_plausible
from safe_decode.bundle.summary import summary_of
from safe_decode.catalogue import catalogue, is_address, model_folder

NAMES = [name for name, entry in catalogue().items() if not is_address(entry.bundle)]


def test_the_catalogue_ships_bundles():
    assert "qwen2.5-coder-0.5b-instruct" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_its_certificates_recompute_from_the_maxima_stored_with_them(name):
    bundle = load_bundle(name)
    require_plausible(bundle)
    for certificate in bundle.all_certificates:
        certificate.verify()
        assert certificate.evidence.source == "on-policy"
    assert bundle.canary is not None


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_located_units_and_was_measured(name):
    summary = summary_of(load_bundle(name))
    assert summary.is_located
    assert summary.worth is not None and summary.worth.recall is not None
    assert summary.worth.recall.n >= 30
    assert summary.finds
    assert len(load_bundle(name).seen) > 1000


@pytest.mark.reference
@pytest.mark.parametrize("name", NAMES)
def test_it_guards_its_model(name):
    folder = model_folder(catalogue()[name])
    if not folder.is_dir():
        pytest.skip(f"{name} is not on this machine; fetch it with: safe-decode fetch {name}")
    loaded = load_model(name)
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, load_bundle(name), redirect="refuse")
    assert decoder.check() <= decoder.bundle.canary.tolerance
    own = decoder.certificate.envelope
    output = decoder.generate(
        ["Why is the sky blue?"],
        max_new_tokens=16,
        do_sample=own.do_sample,
        temperature=own.temperature,
        top_p=own.top_p,
        top_k=own.top_k,
    )
    assert output.traces[0].header.certificate == "valid"
    assert not output.traces[0].tripped
