"""The measurements of modes: each runs in seconds, and each can say no."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.modes import isolation, laws, readers, rewind_tries
from benchmarks.modes.__main__ import PARTS, main
from benchmarks.modes.self_check import stage_figures
from benchmarks.modes.subjects import tiny
from safe_decode.policy.policy import MAX_TRIES


@pytest.fixture(scope="module")
def measured():
    return tiny("llama", rows=6, new_tokens=12)


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt lookup"])
def test_untripped_rows_are_counted_beside_tripping_ones(measured, mode):
    row = laws.untripped(measured, mode)
    assert row["met"] == "yes" and row["tripped"] and row["identical"] == row["n"] > 0


def test_a_row_that_differs_from_bare_is_seen(measured, monkeypatch):
    real = laws._guarded

    def other(*args, **how):
        output = real(*args, **how)
        output.sequences[:, -12:] = 99
        return output

    monkeypatch.setattr(laws, "_guarded", other)
    row = laws.untripped(measured, "greedy")
    assert row["met"] == "no" and row["identical"] < row["n"]
    (summed,) = laws.by_mode([row, {**row, "identical": None, "model": "other"}])
    assert summed["met"] == "no" and summed["refused by transformers itself"] == "other"


def test_a_mode_that_transformers_refuses_is_named():
    row = laws.untripped(tiny("gemma3", rows=3, new_tokens=4), "quantised cache")
    assert row["n"] == 0 and "ValueError" in row["met"]


def test_statistics_of_random_batches_are_compared_with_those_alone(measured, monkeypatch):
    row = laws.row_law(measured, compositions=3)
    assert row["met"] == "yes" and row["scores"] > 0 and row["largest difference"] < 2e-4
    monkeypatch.setattr(laws, "TOLERANCE", -1.0)
    assert laws.row_law(measured, compositions=2)["met"] == "no"


def test_threads_sessions_and_strangers_are_compared_with_solo_runs(measured):
    row = isolation.isolated(measured, rounds=1)
    assert row["met"] == "yes" and row["measured"] == row["n"] == 12


def test_many_calls_leave_nothing_and_what_is_left_is_counted(measured, monkeypatch):
    row = isolation.churn(measured, calls=20, cancelled=2, failed=2)
    assert row["measured"].startswith("16 finished, 2 cancelled, 2 failed, 0 hooks, ")
    assert row["met"] == "yes"
    monkeypatch.setattr(isolation, "FLAT_KIB", -(10**9))
    assert isolation.churn(measured, calls=10, cancelled=1, failed=1)["met"] == "no"
    monkeypatch.setattr(isolation, "FLAT_KIB", 10**9)
    hooks = []
    real = isolation._Fails.__call__

    def leaves_a_hook(self, ids, scores):
        hooks.append(measured.subject.model.register_forward_hook(lambda *_: None))
        return real(self, ids, scores)

    monkeypatch.setattr(isolation._Fails, "__call__", leaves_a_hook)
    row = isolation.churn(measured, calls=10, cancelled=1, failed=1)
    for hook in hooks:
        hook.remove()
    assert row["met"] == "no" and f" {len(hooks)} hooks," in row["measured"]


def test_first_tokens_are_timed_beside_bare_ones(measured):
    rows = readers.first_token(measured, (0, 3), rounds=2)
    assert [row["what"][-1] for row in rows] == ["0", "3"]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)


def test_redirects_are_counted_in_tokens_and_time():
    rows = readers.redirect_costs(tiny("llama", rows=6, new_tokens=150), rounds=2)
    flag, refuse, rewind = rows
    assert flag["tripped"] == refuse["tripped"] == rewind["tripped"] == readers.TRIPS
    assert flag["tries"] == refuse["tries"] == 0 < rewind["tries"]
    assert rewind["tokens"] > refuse["tokens"] and refuse["times refuse"] == 1.0


def test_harm_is_counted_for_each_number_of_tries(tmp_path):
    pytest.importorskip("matplotlib")
    from safe_decode import SafeDecoder
    from safe_decode.demo.embedded_pair import embedded

    loaded = embedded()
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, loaded.bundle)
    own = decoder.policy
    requests = rewind_tries.attacks(loaded.tokenizer, 4)
    rows = rewind_tries.harm_by_tries(decoder, requests, new_tokens=48)
    assert [row["tries"] for row in rows] == list(range(rewind_tries.MOST_TRIES + 1))
    assert rows[0]["continuations"] == 0 == rows[0]["rewound"] and decoder.policy == own
    assert [row["allowed"] == "yes" for row in rows] == [t <= MAX_TRIES for t in range(5)]
    rewind_tries.plot(rows, tmp_path / "tries.png")
    assert (tmp_path / "tries.png").stat().st_size > 1_000
    assert [path.name for path in tmp_path.iterdir()] == ["tries.png"]


def test_what_looks_did_is_counted_response_by_response():
    tops = np.asarray([0.0, 2.0, 3.0, 2.0, 4.0, 5.0])
    scalars = np.asarray([-9.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    harmful = np.asarray([False, False, False, True, True, True])
    found = {row["what"].split(",")[0]: row for row in stage_figures(tops, scalars, harmful, 1, 0)}
    assert (found["harmless alarms"]["n"], found["harmless alarms"]["%"]) == (2, 50.0)
    assert (found["harmful alarms"]["n"], found["harmful alarms"]["%"]) == (3, 33.33)
    assert found["harmful responses that trip"]["%"] == 66.67
    rows = stage_figures(tops, scalars, harmful, 1, 0)
    # Two harmful ones are caught by the plain probe above 4, where nothing harmless lies.
    assert rows[-1]["%"] == 0.0 and rows[-1]["verdict"].endswith("off")
    rows = stage_figures(tops, np.where(harmful, 1.0, -1.0), harmful, 1, 0)
    assert rows[-1]["%"] == 66.67 and rows[-1]["verdict"].endswith("on")


def test_the_command_prints_rows_and_writes_nothing_when_dry(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.modes.__main__.write_results", None)
    torch.manual_seed(0)
    found = main(["--tiny", "--dry", "--only", "compositions"])
    assert list(found) == ["compositions"] and len(found["compositions"]) == 2
    json.dumps(found)
    assert set(PARTS) >= {"laws", "isolation", "readers", "redirects", "tries", "looks"}
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.slow
def test_looks_are_fitted_tested_and_timed():
    found = main(["--tiny", "--dry", "--only", "looks"])["looks"]
    assert len(found) == 6 and found[-1]["%"] > 0
