"""The self-check that comes with a bundle: fitted, certified, saved, and as it serves."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from probes.activations.harvest import score_responses
from probes.activations.teacher_forcing import encode_response
from probes.calibration.certify import group_maxima
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import by_split
from probes.recipes.self_check import (
    NO_LOOK,
    UNCLEARED,
    HeaderConfig,
    HeaderReader,
    fit_header_check,
    looks_of,
    response_scalars,
)
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import CertificateError, ConfigurationError, DataError
from safe_decode.policy.policy import RequestPolicy
from safe_decode.policy.self_check import SelfCheck, looks_due
from safe_decode.testing.bundles import bundle_for, decoder_for, random_probe
from safe_decode.testing.models import byte_tokenizer, tiny_model
from safe_decode.trace.replay import replay
from tests.own_rows import as_own
from tests.planted import planted_bundle, planted_rows

CONFIG = HeaderConfig(first_share=0.4, every_tokens=5, max_looks=6, cuts=2, alphas=(0.05,))


@pytest.fixture(scope="module")
def made():
    model, tokenizer = tiny_model(), byte_tokenizer()
    rows = planted_rows(540)
    plain = planted_bundle(model, tokenizer, by_split(rows))
    rows = as_own(model, tokenizer, rows, cap=48)
    rows = [row for row in rows if row.split != "fit"] + by_split(rows)["fit"][:60]
    return model, tokenizer, rows, fit_header_check(model, tokenizer, rows, plain, CONFIG)


def test_looks_follow_each_other_until_they_are_spent():
    assert looks_due(3, 20, 5, 9) == [3, 8, 13, 18]
    assert looks_due(3, 20, 5, 4) == [3, 8, 13, 18] and looks_due(3, 20, 5, 3) is None
    path = np.asarray([0, 0, 2, 0, 0, 0, 0], dtype=np.float32)
    check = SelfCheck(random_probe(), 0.0, every_tokens=2, max_looks=9)
    assert looks_of(path, 1.0, check) == [2, 4, 6] and looks_of(path, 3.0, check) == []
    assert looks_of(path, 1.0, check, prefill_tokens=3) == [3, 5], "a prefill is looked at whole"


def test_the_certified_scalar_is_the_largest_header_logit_over_the_looks(made):
    model, tokenizer, rows, bundle = made
    check = bundle.header_check
    harmless = [r for r in by_split(rows)["calibrate"] if not r.response_harmful]
    paths = smoothed_paths(
        score_responses(model, tokenizer, harmless, bundle.probe), bundle.monitor
    )
    scalars = response_scalars(model, tokenizer, harmless, paths, check.first_threshold, check)
    (certificate,) = check.certificates
    assert certificate.maxima == tuple(group_maxima(scalars, [r.group for r in harmless]))
    assert NO_LOOK < certificate.threshold < UNCLEARED
    reader, seen = HeaderReader(model, tokenizer, check.probe.sites), 0
    for row, path, scalar in zip(harmless[:30], paths, scalars, strict=False):
        due = looks_of(path, check.first_threshold, check)
        if not due:
            continue
        encoded = encode_response(tokenizer, row)
        logits = [float(check.probe(reader.read(encoded, at)[None])) for at in due]
        assert scalar == max(logits)
        seen += len(due) > 1
    assert seen


def test_the_first_threshold_is_fixed_on_select_alone(made):
    model, tokenizer, rows, bundle = made
    select = [r for r in by_split(rows)["select"] if not r.response_harmful]
    paths = smoothed_paths(score_responses(model, tokenizer, select, bundle.probe), bundle.monitor)
    tops = [float(path.max()) for path in paths]
    above = sum(top > bundle.header_check.first_threshold for top in tops) / len(tops)
    assert above == pytest.approx(CONFIG.first_share, abs=1.5 / len(tops))


def test_a_deployed_row_trips_exactly_where_its_scalar_exceeds_the_threshold(made):
    """Harvested and generated agree: flagged looks are those of the finished response."""
    model, tokenizer, rows, bundle = made
    check = bundle.header_check
    tests = by_split(rows)["test"][:40]
    paths = smoothed_paths(score_responses(model, tokenizer, tests, bundle.probe), bundle.monitor)
    supplied = []
    for row in tests:
        encoded = encode_response(tokenizer, row)
        ids = encoded.ids[encoded.turn_start :]
        supplied.append(dataclasses.replace(row, response_ids=ids, prefill_tokens=len(ids)))
    scalars = response_scalars(model, tokenizer, supplied, paths, check.first_threshold, check)
    decoder = SafeDecoder(model, tokenizer, bundle, redirect="refuse", self_check="bundle")
    output = decoder.generate(
        [list(row.messages) for row in tests],
        prefill=[row.response for row in tests],
        max_new_tokens=1,
    )
    limit, outcomes = check.certificates[0].threshold, set()
    for trace, scalar, path in zip(output.traces, scalars, paths, strict=True):
        first = trace.steps[trace.end.prefill_tokens]
        assert trace.header.threshold == check.first_threshold
        if scalar == NO_LOOK:
            assert first.check is None and path.max() <= check.first_threshold
            continue
        assert first.check == pytest.approx(scalar, abs=1e-4)
        if abs(scalar - limit) > 1e-3:
            outcomes.add(scalar > limit)
            assert (trace.end.trip_step == trace.end.prefill_tokens) == (scalar > limit)
        assert replay(trace, bundle.monitor).differences == ()
    assert outcomes == {True, False}


def test_a_bundle_with_a_self_check_is_saved_and_read_back(made, tmp_path):
    _, _, _, bundle = made
    bundle.save(tmp_path / "b")
    again = ProbeBundle.load(tmp_path / "b")
    check, own = again.header_check, bundle.header_check
    assert again.digest == bundle.digest
    assert (check.probe.weight == own.probe.weight).all() and check.probe.sites == own.probe.sites
    assert check.certificates == own.certificates
    assert (check.first_threshold, check.every_tokens, check.max_looks) == (
        own.first_threshold, own.every_tokens, own.max_looks
    )  # fmt: skip
    plain = dataclasses.replace(bundle, header_check=None)
    assert plain.digest != bundle.digest
    plain.save(tmp_path / "p")
    card = json.loads((tmp_path / "p" / "card.json").read_text("utf-8"))
    assert card["schema"] == 3 and "header_check" not in card
    assert ProbeBundle.load(tmp_path / "p").header_check is None


def test_without_looks_the_plain_certificate_holds(made):
    """Beams and foreign loops take no looks, so the first stage's lower threshold is not theirs."""
    model, tokenizer, _, bundle = made
    decoder = SafeDecoder(model, tokenizer, bundle, redirect="refuse", self_check="bundle")
    beams = decoder.generate("abc", max_new_tokens=3, num_beams=2)
    step = decoder.generate("abc", max_new_tokens=3)
    assert beams.traces[0].header.threshold == bundle.certificate().threshold
    assert step.traces[0].header.threshold == bundle.header_check.first_threshold
    with pytest.raises(CertificateError, match=r"alpha=0\.2"):
        decoder.generate("abc", policy=RequestPolicy(alpha=0.2))


def test_what_cannot_be_a_self_check_is_refused(made, llama, tokenizer):
    model, own_tokenizer, rows, bundle = made
    with pytest.raises(ConfigurationError, match="has none"):
        decoder_for(llama, tokenizer, self_check="bundle")
    check = bundle.header_check
    with pytest.raises(ConfigurationError, match="first_threshold=inf"):
        dataclasses.replace(check, first_threshold=float("inf"))
    with pytest.raises(CertificateError, match="no certificate"):
        dataclasses.replace(check, certificates=())
    with pytest.raises(ConfigurationError, match="max_looks=0"):
        dataclasses.replace(check, max_looks=0)
    with pytest.raises(ConfigurationError, match="first_share=0"):
        HeaderConfig(first_share=0)
    one_kind = [row for row in rows if not row.response_harmful]
    with pytest.raises(DataError, match="all harmful or all harmless"):
        fit_header_check(model, own_tokenizer, one_kind, bundle, CONFIG)
    assert bundle_for(llama, tokenizer).header_check is None
