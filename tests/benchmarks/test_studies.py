"""The studies' own arithmetic: laws, intervals, pairs, and looks that are counted."""

import json

import numpy as np
import pytest

from benchmarks.detection import reference
from benchmarks.detection.certificate import coverage_row, simulated_shares, simulation_row
from benchmarks.detection.paired import (
    SourcedRows,
    bootstrap,
    pair_accuracy,
    pairs_of,
    source_auroc,
    two_class_sources,
    within_source,
)
from benchmarks.detection.reference_arms import pooled_features
from probes.activations.harvest import harvest
from probes.data.conversations import Conversation
from safe_decode.activations.site import Site
from safe_decode.certificate import certified_threshold
from safe_decode.loading import Loaded
from safe_decode.testing.models import D_MODEL


def labelled(labels, sources, prompts):
    rows = [
        Conversation(
            messages=({"role": "user", "content": prompt},),
            response=f"answer {number}",
            group=prompt,
            response_harmful=bool(label),
        )
        for number, (label, prompt) in enumerate(zip(labels, prompts, strict=True))
    ]
    names = np.asarray(prompts)
    return SourcedRows(rows, np.asarray(labels, bool), np.asarray(sources), names, names)


def test_twenty_thousand_draws_follow_the_law_of_the_certificate():
    row = simulation_row(1_000, 0.01, 0.05, draws=20_000)
    assert row["met"] == "yes"
    assert row["target"].endswith("Beta(5, 996)")
    assert abs(row["draws above alpha %"] - row["by the binomial %"]) < 0.5
    assert row["law: KS p"] > 0.001


def test_the_simulation_uses_the_threshold_that_is_certified():
    shares = simulated_shares(400, 0.01, 0.05, draws=3, seed=5)
    values = np.random.default_rng(5).random((3, 400))
    expected = [1 - certified_threshold(row.tolist(), 0.01, 0.05) for row in values]
    np.testing.assert_allclose(shares, expected)


def test_a_population_that_is_calibrated_on_keeps_its_promise_and_ties_are_safe():
    rng = np.random.default_rng(0)
    for peaks in (rng.normal(size=5_000), np.floor(rng.normal(size=5_000) * 4)):
        row = coverage_row(peaks, 1_000, 0.01, 0.05, draws=200)
        assert row["met"] == "yes"
        assert row["draws above alpha %"] <= 5


def test_figures_stay_within_sources_and_pairs_within_prompts():
    rows = labelled(
        [1, 0, 1, 0, 0, 0], ["a", "a", "a", "a", "b", "b"], ["p", "p", "q", "r", "s", "s"]
    )
    scores = np.array([2.0, 1.0, 0.0, 5.0, 9.0, 9.0])
    assert two_class_sources(rows) == ["a"]
    assert within_source(scores, rows, ["a"]) == source_auroc(scores, rows, rows.sources == "a")
    assert source_auroc(scores, rows, rows.sources == "a") == 0.25
    assert np.isnan(source_auroc(scores, rows, rows.sources == "b"))
    assert pairs_of(rows) == [(0, 1)]
    assert pair_accuracy(scores, [(0, 1), (2, 3), (4, 5)]) == 0.5
    for at in bootstrap(rows, ["a"], draws=20):
        # Prompts are drawn whole: both answers to p, or neither.
        assert np.sum(at == 0) == np.sum(at == 1)
        assert set(rows.sources[at]) == {"a"}
        assert len(set(rows.prompts[at])) <= 3


def test_the_probe_reads_the_first_tokens_and_no_others(llama, tokenizer):
    rows = [
        Conversation(
            messages=({"role": "user", "content": "Hi"},),
            response="x",
            group=str(n),
            response_ids=tuple(range(20, 20 + n)),
        )
        for n in (3, 50)
    ]
    pooled = pooled_features(Loaded(llama, tokenizer), rows, tokens_per_batch=500)
    sites = [Site(layer, "resid", tuple(range(D_MODEL))) for layer in range(3)]
    whole = harvest(llama, tokenizer, rows, sites)
    for row, values in enumerate(whole.responses):
        for prefix in (32, 64):
            expected = values[1 : prefix + 1].mean(axis=0)
            np.testing.assert_allclose(pooled["resid"][prefix][row], expected, rtol=1e-3, atol=1e-4)


def test_every_look_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "RESULTS", tmp_path)
    dev, other = tmp_path / "dev", tmp_path / "other"
    dev.write_text("a")
    other.write_text("b")
    assert [reference.count_look(str(f)) for f in (dev, dev, other, dev)] == [1, 2, 1, 3]
    assert sorted(json.loads((tmp_path / "reference_looks.json").read_text()).values()) == [1, 3]


@pytest.mark.slow
def test_the_study_finds_a_planted_kind_of_text(tmp_path, monkeypatch):
    """End to end on a tiny model: letters decide the label, and both arms see it."""
    from benchmarks import card
    from safe_decode.testing.models import byte_tokenizer, tiny_model

    monkeypatch.setattr(reference, "RESULTS", tmp_path)
    monkeypatch.setattr(card, "RESULTS", tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name, n in (("train", 160), ("dev", 80)):
        lines = []
        for number in range(n):
            label = number % 2
            letters = "klmno" if label else "abcde"
            words = ["".join(rng.choice(list(letters), 3)) for _ in range(12)]
            lines.append(
                {
                    "prompt": f"{name} {number // 2}",
                    "response": " ".join(words),
                    "response_harmful": label,
                    "prompt_harmful": None,
                    "refusal": None,
                    "source": "s",
                }
            )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    paths = [str(tmp_path / part) for part in ("model", "train.jsonl", "dev.jsonl")]
    reference.main([*paths, "--draws", "50", "--folds", "2"])
    found = [json.loads(line) for line in (tmp_path / "reference.jsonl").read_text().splitlines()]
    assert found[-1]["card"]["looks_at_dev"] == 1
    assert all(row["probe"] > 0.95 for row in found[:-1])
    assert {row["control"] for row in found[:-1]} == {"tfidf_response", "tfidf_prompt_response"}
