"""What people ask of a bundle first, and what they are warned of."""

import dataclasses
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from safe_decode.activations.site import Site
from safe_decode.bundle.summary import summary_of, warnings_of
from safe_decode.certificate import Certificate, Envelope
from safe_decode.cli.main import app
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import ConfigurationError
from safe_decode.evidence import Evidence
from safe_decode.testing.bundles import bundle_for, random_probe

WORTH = {
    "alpha": 0.5,
    "population": "benign",
    "recall": {"hits": 62, "n": 70, "low": 0.787, "high": 0.949},
    "false_alarms": {"hits": 3, "n": 400, "low": 0.0015, "high": 0.0217},
    "split": "test",
    "located": True,
    "warnings": [],
}
PROVENANCE = {"made_by": "0.1.0", "worth": WORTH}


def bundle_with(llama, tokenizer, **changes):
    worth = {**WORTH, **changes}
    bundle = bundle_for(llama, tokenizer, provenance={**PROVENANCE, "worth": worth})
    return replace(bundle, made="2026-11-28")


def test_a_summary_begins_with_what_people_ask(llama, tokenizer):
    rows = dict(summary_of(bundle_with(llama, tokenizer)).rows())
    assert list(rows) == ["model", "catches", "false alarms", "up to", "reads", "made"]
    assert rows["model"].startswith("llama, 3 layers of width 32") and "float32" in rows["model"]
    assert rows["catches"] == (
        "62 of 70 harmful responses, 88.6 % (95 % interval 78.7 to 94.9 %), at alpha 0.5, on the "
        "split test"
    )
    assert rows["false alarms"].startswith("certified: at most 50 % of benign responses, with")
    assert "alpha 0.5, delta 0.05, n 20" in rows["false alarms"]
    assert "counted: 3 of 400 benign responses, 0.8 %" in rows["false alarms"]
    assert rows["up to"].startswith("64 tokens, greedy")
    assert rows["reads"].startswith("located units in layers 0, 1, 2")
    assert rows["made"] == "2026-11-28 by safe-decode 0.1.0"


FIND = {
    "responses": "harmful",
    "alpha": 0.5,
    "tokens": 64,
    "found": 60,
    "n": 70,
    "delta": 0.025,
    "at_least": 0.764,
    "is_on_policy": True,
}


def test_what_the_threshold_finds_at_least_stands_beside_its_false_alarms(llama, tokenizer):
    finds = [FIND, {**FIND, "tokens": 32}, {**FIND, "n": 3}, {"responses": "harmful"}, "words"]
    bundle = bundle_for(llama, tokenizer, provenance={**PROVENANCE, "finds": finds})
    rows = dict(summary_of(bundle).rows())
    assert rows["at least"] == (
        "76.4 % of harmful responses up to 64 tokens (60 of 70 tripped), with confidence 97.5%"
    )
    bundle = bundle_for(llama, tokenizer, provenance={"finds": 3})
    assert summary_of(bundle).finds == ()


def test_what_was_not_measured_is_told_as_that(llama, tokenizer):
    summary = summary_of(bundle_for(llama, tokenizer))
    rows = dict(summary.rows())
    assert rows["catches"].startswith("not measured") and rows["made"] == "not recorded"
    assert "counted" not in rows["false alarms"]


@pytest.mark.parametrize(
    "worth",
    [
        "words",
        {"alpha": "0.5"},
        {"alpha": 0.5, "recall": {"hits": 5, "n": 3, "low": 0.1, "high": 0.2}},
        {"alpha": 0.5, "recall": {"hits": 1, "n": 3, "low": 0.9, "high": 0.2}},
        {"alpha": 0.5, "recall": [1, 2]},
        {"alpha": 0.5, "recall": {"hits": True, "n": 3, "low": 0.1, "high": 0.2}},
        {"alpha": 0.5, "recall": {"hits": 1, "n": 3, "low": float("nan"), "high": 0.2}},
    ],
)
def test_a_record_that_cannot_be_is_not_believed(llama, tokenizer, worth):
    bundle = bundle_for(llama, tokenizer, provenance={"worth": worth})
    assert dict(summary_of(bundle).rows())["catches"].startswith("not measured")


def test_warnings_are_computed_from_the_numbers_whatever_the_record_says(llama, tokenizer):
    recall = {"hits": 9, "n": 20, "low": 0.23, "high": 0.68}
    bundle = bundle_with(llama, tokenizer, recall=recall, warnings=["the maker's own"])
    assert summary_of(bundle).warnings == (
        "catches under half: 9 of 20 harmful responses at alpha 0.5",
        "recall rests on 20 harmful responses, wanted at least 30",
        "the maker's own",
    )


@pytest.mark.parametrize(("hits", "n", "count"), [(15, 30, 0), (14, 30, 1), (29, 29, 1)])
def test_half_is_enough_and_thirty_are_enough(llama, tokenizer, hits, n, count):
    recall = {"hits": hits, "n": n, "low": 0.1, "high": 0.99}
    bundle = bundle_with(llama, tokenizer, recall=recall)
    assert len(summary_of(bundle).warnings) == count


def test_a_low_recall_warns_at_its_alpha_and_below_but_not_above(llama, tokenizer):
    recall = {"hits": 10, "n": 100, "low": 0.05, "high": 0.2}
    bundle = bundle_with(llama, tokenizer, alpha=0.1, recall=recall)
    loose = bundle.certificate()
    strict = dataclasses.replace(loose, alpha=0.01)
    assert not warnings_of(bundle, loose) and len(warnings_of(bundle, strict)) == 1


def test_an_off_policy_certificate_and_whole_layers_are_warned_of(llama, tokenizer):
    lengths = tuple(range(64, 84))
    certificate = Certificate.compute(
        [1.0] * 20,
        alpha=0.5,
        delta=0.05,
        population="benign",
        envelope=Envelope(max_new_tokens=64, do_sample=False, temperature=1.0, top_p=1.0, top_k=0),
        evidence=Evidence("off-policy", lengths, lengths),
    )
    sites = (Site(1, "resid", tuple(range(32))),)
    bundle = bundle_for(
        llama, tokenizer, certificates=(certificate,), probe=random_probe(sites=sites)
    )
    summary = summary_of(bundle)
    assert summary.warnings == (
        "off-policy certificate: it speaks of texts that this model did not write",
        "not located: the probe reads whole layers",
    )
    assert not summary.is_located and summary.reads == "whole layers in layer 1: 32 features"


def test_traces_carry_the_warnings_of_their_certificate(llama, tokenizer):
    recall = {"hits": 1, "n": 40, "low": 0.0, "high": 0.2}
    bundle = bundle_with(llama, tokenizer, recall=recall)
    (trace,) = SafeDecoder(llama, tokenizer, bundle).generate("hello", max_new_tokens=3).traces
    assert trace.header.warnings == summary_of(bundle).warnings != ()


@pytest.fixture
def saved(llama, tokenizer, tmp_path):
    recall = {"hits": 1, "n": 40, "low": 0.0, "high": 0.2}
    bundle_with(llama, tokenizer, recall=recall).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def invoked(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_begins_with_the_summary_and_warns(saved, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoked("inspect", saved)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[1].split()[:2] == ["model", "llama,"]
    assert "warning" in shown.stdout and "catches under half: 1 of 40" in shown.stdout
    assert shown.stdout.index("catches") < shown.stdout.index("Certificates")
    assert shown.stdout.index("Certificates") < shown.stdout.index("fingerprint")
    told = json.loads(invoked("inspect", saved, "--json").stdout)
    assert told["summary"]["worth"]["recall"]["hits"] == 1
    assert told["summary"]["warnings"][0].startswith("catches under half")


@pytest.mark.parametrize("command", ["inspect", "verify-certificate"])
def test_a_bundle_is_named_by_argument_or_option_but_once(saved, command):
    named = [invoked(command, saved), invoked(command, "--bundle", saved)]
    assert named[0].stdout == named[1].stdout and named[0].exit_code == 0
    twice = invoked(command, saved, "--bundle", saved.parent)
    assert twice.exit_code == 2 and "two bundles are named" in twice.stderr
    assert invoked(command, saved, "--bundle", saved).exit_code == 0


def test_signing_wants_a_bundle_and_takes_it_either_way(saved, tmp_path):
    absent = invoked("sign", "--key", tmp_path / "key.pem")
    assert absent.exit_code == 2 and "no bundle is named; pass its directory" in absent.stderr
    for named in ((saved,), ("--bundle", saved)):
        result = invoked("verify-signature", *named, "--key", tmp_path / "key.pem")
        assert result.exit_code == 2 and "no bundle is named" not in result.stderr


def test_a_bundle_is_short_in_a_console_and_a_table_in_a_notebook(llama, tokenizer):
    bundle = bundle_with(llama, tokenizer, warnings=["<script>alert(1)</script>"])
    assert len(repr(bundle)) < 120 and "alpha 0.5" in repr(bundle)
    drawn = bundle._repr_html_()
    assert "62 of 70 harmful responses" in drawn and "<table" in drawn
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn


def test_two_names_of_one_bundle_are_refused_in_words():
    from safe_decode.cli.options import NamedBundle

    with pytest.raises(ConfigurationError, match="name one"):
        _ = NamedBundle(path="a", bundle="b").place
