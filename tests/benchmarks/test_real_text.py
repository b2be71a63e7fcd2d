"""The study of a real model: parts that share no prompt, and means that are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.real_text.candidates import channels_of, examples_of, fit, sites_at
from benchmarks.real_text.parts import study_rows
from benchmarks.real_text.study import TRIED, Scored, best_of_kinds, select_by, statistic_rows
from benchmarks.real_text.windows import WINDOW, cut, every_site, read_shards, take_shards
from benchmarks.real_text.workplace import claim
from probes.activations.features import columns_of
from probes.activations.harvest import harvest
from safe_decode.testing.models import byte_tokenizer, tiny_model


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    def judged(number, source, harmful, prompt=None):
        return {
            "prompt": prompt or f"Prompt number {number} of {source}",
            "response": f"Words {number} " * 3,
            "response_harmful": int(harmful),
            "source": source,
        }

    both = [judged(n, "gptfuzz-labelled", n % 2) for n in range(200)]
    calm = [judged(n, "alpaca-52k", False) for n in range(200)]
    dev = [judged(n, "gptfuzz-labelled", n % 2, f"Held out {n}") for n in range(50)]
    write(
        tmp_path / "probe_train.jsonl", [*both, *calm, judged(0, "alpaca-52k", False, "Held out 3")]
    )
    write(tmp_path / "probe_dev.jsonl", dev)
    long = [
        {"prompt": f"Long {n % 100}", "response": "So. " * 200, "source": "a"} for n in range(150)
    ]
    write(tmp_path / "long_benign.jsonl", long)
    own = [
        {"kind": "benign-long", "prompt": row["prompt"], "prefill": "", "response": "Well. " * 50}
        for row in calm[:120]
    ]
    own += [
        {"kind": kind, "prompt": row["prompt"], "prefill": prefill, "response": said}
        for row in (*both[:60], *dev[:20])
        for kind, prefill, said in (
            ("harmful-plain", "", "I'm sorry, but I can't assist with that."),
            ("harmful-prefill-1", "Sure", ", here it is"),
        )
    ]
    write(tmp_path / "qwen_onpolicy.jsonl", own)
    return tmp_path


def test_no_prompt_that_certifies_or_judges_is_fitted_on(data):
    rows = study_rows(data)
    groups = {
        part: {row.group for row in rows if row.part == part}
        for part in ("fit", "select", "certify", "dev")
    }
    assert all(groups.values())
    assert not groups["dev"] & (groups["fit"] | groups["select"])
    benign = {row.group for row in rows if row.part == "certify" and row.harmful is False}
    assert not benign & (groups["fit"] | groups["select"])
    assert not any(
        row.is_known_prompt for row in rows if row.part == "certify" and row.group in benign
    )
    held_out = [
        row for row in rows if row.group.startswith("held out") and row.name.startswith("q")
    ]
    assert held_out and {row.part for row in held_out} == {"certify"}
    begun = next(row for row in rows if row.source == "own harmful-prefill-1")
    assert begun.conversation.response == "Sure, here it is" and not begun.refusal
    assert all(row.refusal for row in rows if row.source == "own harmful-plain")
    first = [row for row in rows if row.name.startswith("long") and row.part != "other"]
    assert len({row.group for row in first}) == len(first)


def test_windows_are_means_of_every_channel_and_shards_are_taken_once(data, tmp_path):
    loaded = SimpleNamespace(model=tiny_model(), tokenizer=byte_tokenizer())
    rows = [row.conversation for row in study_rows(data)[:7]]
    encoded = cut(loaded, rows, 100)
    for _ in range(2):  # the second finds everything taken
        take_shards(tmp_path / "w", loaded, encoded, rows_a_shard=3, tokens_per_batch=300)
    shards = read_shards(tmp_path / "w")
    assert [len(set(one.row.tolist())) for one in shards] == [3, 3, 1]
    sites = every_site(loaded)
    whole = harvest(loaded.model, loaded.tokenizer, rows, sites)
    for shard in shards:
        for row, begin, n, values in zip(*shard, strict=True):
            expected = whole.responses[row][1 + begin : 1 + begin + n].mean(axis=0)
            assert n <= WINDOW
            np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)


def test_channels_are_named_as_sites_and_back():
    loaded = SimpleNamespace(model=tiny_model())
    sites = every_site(loaded)
    channels = channels_of(sites, {"resid": [1], "mlp": None})
    named = sites_at(sites, channels)
    assert {site.kind for site in named} == {"resid", "mlp"}
    assert columns_of(sites, named).tolist() == channels.tolist()


def scored_rows(n=320):
    rng = np.random.default_rng(0)
    rows, logits = [], []
    names = (
        "gptfuzz-labelled",
        "jailbreakeval-saferlhfmini",
        "obfuscated-activations",
        "pku-saferlhf-5k",
    )
    for number in range(n):
        part = ("select", "dev", "certify", "select", "dev")[number % 5]
        source = names[number % 4] if number % 10 < 7 else "alpaca-52k"
        harmful = source != "alpaca-52k" and number % 3 == 0
        is_long = source == "alpaca-52k" and part == "select"
        rows.append(
            SimpleNamespace(
                name="long:1" if is_long else f"a:{number}",
                part=part,
                source=source,
                harmful=harmful,
                refusal=False,
            )
        )
        length = int(rng.integers(20, 200))
        logits.append(torch.from_numpy(rng.normal(2.0 * harmful, 1.0, (length, 1))).float())
    return Scored(rows, logits)


def test_the_choice_is_made_on_select_and_every_statistic_is_measured():
    rows = [row for row, _ in statistic_rows("some", 8, scored_rows())]
    assert len(rows) == len(TRIED) + 1
    assert all(row["dev AUROC whole"] > 0.9 for row in rows)
    kept = best_of_kinds(rows)
    assert {row["statistic"].split("-")[0] for row in kept} >= {"cusum", "shrunk", "top", "ema"}
    chosen = select_by(rows)
    assert "offline" not in chosen["statistic"] and any(row is chosen for row in kept)


def test_a_fit_is_on_raw_channels_and_weighs_both_labels_of_a_source_alike(data, tmp_path):
    loaded = SimpleNamespace(model=tiny_model(), tokenizer=byte_tokenizer())
    rows = [row for row in study_rows(data) if row.part == "fit"][:80]
    encoded = cut(loaded, [row.conversation for row in rows], 64)
    take_shards(tmp_path / "w", loaded, encoded)
    examples = examples_of(read_shards(tmp_path / "w"), rows)
    at = np.ones(len(examples.row), dtype=bool)
    weights = examples.weights(at)
    own = examples.source == "gptfuzz-labelled"
    assert weights[own & examples.harmful].sum() == pytest.approx(
        weights[own & ~examples.harmful].sum()
    )
    channels = channels_of(every_site(loaded), {"resid": [2]})
    values = examples.values(channels)
    solved = fit(examples, values, at, c=1.0)
    scores = values @ solved.weight + solved.bias
    assert (
        abs(float(np.average(scores[~examples.harmful], weights=examples.share[~examples.harmful])))
        < 1e-5
    )


def test_a_shard_is_free_again_when_its_process_ended_without_finishing_it(tmp_path):
    finished = tmp_path / "00000.npy"
    assert claim(finished)
    assert not claim(finished)  # this process is at it
    told = [sys.executable, "-c", "import os; print(os.getpid())"]
    ended = subprocess.run(told, capture_output=True, check=True, text=True)
    (tmp_path / "00000.taken").write_text(ended.stdout.strip())
    assert claim(finished)
    finished.touch()
    assert not claim(finished)
