"""The script for accelerators on the CPU: what it keeps, when it stops, what it compares."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.cost import gpu
from benchmarks.cost.blocks import Calls, Settled, compared, ratio_of, run_rounds
from safe_decode.bench.arms import Arm, Lap
from safe_decode.bench.models import of_shape

ARMS = ("bare", "guard", "control")


def lap(step: int) -> Lap:
    return Lap(5, (step,) * 3, 2)


class _Timed(Arm):
    """An arm whose steps take as long as it is told."""

    def lap(self, options: dict[str, Any], _clock: Any = "wall") -> Lap:
        return lap(next(options[self.name]))


def timed(**steps: list[int]) -> tuple[dict[str, Arm], dict[str, Any]]:
    arms: dict[str, Arm] = {name: _Timed(name, lambda: None) for name in ARMS}
    return arms, {name: iter(steps.get(name, [100] * 99)) for name in ARMS}


def test_rounds_stop_when_the_ratio_is_settled(tmp_path):
    calls, kept = Calls(tmp_path / "c", "s"), {}
    arms, options = timed(guard=[101] * 99)
    how = {"settled": Settled(), "rounds": 50, "until": 1.0, "now": lambda: 0.0}
    assert run_rounds(arms, options, kept, calls, "x", **how) == "settled"
    assert len(kept["bare"]) == Settled().at_least
    assert ratio_of(kept, "guard").point == pytest.approx(1.01)


def test_rounds_stop_when_the_time_is_up_and_say_so(tmp_path):
    arms, options = timed(guard=[80, 130] * 50)
    how = {"settled": Settled(), "until": 0.0, "now": lambda: 1.0}
    found = run_rounds(arms, options, {}, Calls(tmp_path / "c", "s"), "x", rounds=50, **how)
    assert found == "time"
    how |= {"now": lambda: -1.0}
    arms, options = timed(guard=[80, 130] * 50)
    found = run_rounds(arms, options, {}, Calls(tmp_path / "d", "s"), "x", rounds=12, **how)
    assert found == "rounds"


def test_a_run_that_was_cut_off_goes_on_with_what_was_kept(tmp_path):
    calls, kept = Calls(tmp_path / "c", "s"), {}
    arms, options = timed(guard=[80, 130] * 50)
    how = {"settled": Settled(), "until": 0.0, "now": lambda: 1.0}
    run_rounds(arms, options, kept, calls, "x", rounds=50, **how)
    with (tmp_path / "c").open("a") as file:
        file.write('{"study": "s", "configu')
    again = Calls(tmp_path / "c", "s")
    assert again.of("x") == kept
    assert again.of("y") == {} and Calls(tmp_path / "c", "another").of("x") == {}
    more = again.of("x")
    how |= {"now": lambda: -1.0}
    run_rounds(arms, options, more, again, "x", rounds=4, **how)
    assert len(more["bare"]) == 4 and more["bare"][:2] == kept["bare"]
    assert again.of("x") == more, "the half line swallows nothing"


def test_the_device_s_clock_is_read_where_there_is_one():
    laps = {"bare": [lap(100)] * 9, "guard": [replace(lap(200), device_steps=(101,))] * 9}
    laps["bare"] = [replace(one, device_steps=(100,)) for one in laps["bare"]]
    assert ratio_of(laps, "guard").point == pytest.approx(1.01)


def said(ids: list[list[int]], scores: list[list[list[float]]]) -> Arm:
    output = SimpleNamespace(
        sequences=torch.tensor(ids), logits=tuple(torch.tensor(step) for step in scores)
    )
    return Arm("said", lambda **_: output)


def test_a_tie_is_told_apart_from_another_score():
    options = {"input_ids": torch.tensor([[9], [9]])}
    bare = said([[9, 1], [9, 0]], [[[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]]])
    other = said([[9, 2], [9, 0]], [[[0.0, 2.0, 2.0], [3.0, 1.5, 0.0]]])
    found = compared({"bare": bare, "guard": other, "control": bare}, options)
    assert found["guard"] == {
        "same_ids": False, "rows_that_part": 1, "largest_difference": 0.5, "rows_that_tie": 1,
    }  # fmt: skip
    assert found["control"]["same_ids"] and found["control"]["rows_that_tie"] == 1


def test_weights_that_are_decided_do_not_tie_in_half_precision():
    ids = torch.randint(3, 500, (64, 6), generator=torch.Generator().manual_seed(0))

    def gaps(is_decided: bool) -> torch.Tensor:
        subject = of_shape("nano", dtype="bfloat16", is_decided=is_decided)
        with torch.no_grad():
            top = subject.model(input_ids=ids).logits.reshape(-1, 512).topk(2).values.float()
        return (top[:, 0] - top[:, 1]) / top[:, 0].abs()

    assert (gaps(False) == 0).any(), "or there is nothing to mend"
    assert gaps(True).min() > 0.05


@pytest.mark.slow
def test_the_script_tries_out_every_mode_that_the_cpu_has(tmp_path):
    rows = gpu.main(["--tiny", "--out", str(tmp_path)])
    assert {(row["mode"], row["batch"], row["arm"]) for row in rows} == {
        (mode, batch, arm) for mode in ("eager", "compiled") for batch in (1, 2) for arm in ARMS
    }
    for row in rows:
        if row["arm"] != "bare":
            assert row["same_ids"] and row["largest_difference"] == 0.0, row
    lines = gpu.told(rows)
    assert len(lines) == 4 and lines[0].startswith("eager 1: ")
    # Again: all is there, and nothing is measured.
    n_lines = len((tmp_path / "calls.jsonl").read_text().splitlines())
    assert gpu.main(["--tiny", "--out", str(tmp_path)]) == rows
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == n_lines
