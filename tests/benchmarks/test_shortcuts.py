"""A short way changes what a step costs, and nothing that the guard says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.cost.shortcuts import SHORTCUTS, main
from safe_decode import SafeDecoder
from safe_decode.bench.arms import Load
from safe_decode.demo.embedded_pair import embedded
from safe_decode.engines.transformers.loops.row_status import RowStatus
from safe_decode.monitor.monitor import RiskMonitor

CAP = 32
SCENES = ("prefilled", "benign")
SPARED = {
    "levels alone decide": (RiskMonitor, "step"),
    "rows that go on are not sorted": (RowStatus, "go_on"),
}
"""What each short way spares: with it the method runs less often."""


@pytest.fixture(scope="module")
def pair():
    return embedded()


@pytest.fixture(scope="module")
def asked(pair):
    """Two that trip, at different tokens, and two that do not, of which one ends early."""
    scenes = {scene: [p for p in pair.prompts if p.scene == scene] for scene in SCENES}
    return [scenes[scene][index] for scene, index in zip(SCENES * 2, (0, 0, 1, 1), strict=True)]


def said(pair, prompts, **options):
    decoder = SafeDecoder(pair.model, pair.tokenizer, pair.bundle, redirect="refuse")
    torch.manual_seed(0)
    return decoder.generate(
        [list(prompt.messages) for prompt in prompts],
        prefill=[prompt.prefill for prompt in prompts],
        max_new_tokens=CAP,
        **options,
    )


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2, 3]], ids=["trips", "passes", "batch"])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_without_a_short_way_the_guard_says_the_same(
    name, rows, do_sample, pair, asked, monkeypatch
):
    calls = Counter()
    owner, method = SPARED[name]
    whole = getattr(owner, method)

    def counted(*args, **kwargs):
        calls[is_off] += 1
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    is_off = False
    wanted = said(pair, [asked[row] for row in rows], do_sample=do_sample)
    with SHORTCUTS[name][1]():
        is_off = True
        found = said(pair, [asked[row] for row in rows], do_sample=do_sample)
    tripped = [trace.tripped for trace in wanted.traces]
    assert do_sample or tripped == [row % 2 == 0 for row in rows]
    # A row that trips has been stepped in full up to there, and then the call is over.
    assert calls[True] > calls[False] or all(tripped), "the switch takes no short way out"
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.texts == wanted.texts
    for one, other in zip(found.traces, wanted.traces, strict=True):
        assert [step.statistic for step in one.steps] == [step.statistic for step in other.steps]
        assert one == other


def test_the_measurement_runs_and_names_every_short_way(monkeypatch):
    written = {}
    monkeypatch.setattr(
        "benchmarks.cost.shortcuts.write_results",
        lambda name, rows, _: written.update({name: rows}),
    )
    monkeypatch.setattr("benchmarks.cost.shortcuts.LOADS", [("nano", Load(2, 8, 4), "guard", 2)])
    rows = main([])
    assert written == {"shortcuts-left": rows}
    assert [row["short way"] for row in rows] == list(SHORTCUTS)
    assert {row["pays"] for row in rows} <= {"yes", "not shown"}
