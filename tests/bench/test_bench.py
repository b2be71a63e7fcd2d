"""What is measured is what is said: figures, shapes, arms, the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from safe_decode.bench.arms import ARMS, Lap, Load, arms_of, options_of
from safe_decode.bench.compare import compare
from safe_decode.bench.compile_modes import mode_options, modes_of
from safe_decode.bench.machine import card, read_lines, write_lines
from safe_decode.bench.models import ProbeShape, of_shape
from safe_decode.bench.runner import interleaved, ladder_rows, live_bytes
from safe_decode.bench.scaling import values_of
from safe_decode.bench.statistics import figures_of, interval_of, slope_of
from safe_decode.cli.main import app
from safe_decode.errors import ConfigurationError, UnsupportedError
from tests.activations.test_compiled import counting
from tests.activations.test_tap import count_hooks


@pytest.fixture(scope="module")
def nano():
    return of_shape("nano", probe=ProbeShape(features=24, heads=2))


def laps(*rounds: tuple[int, ...]) -> list[Lap]:
    return [Lap(5_000_000, steps, 2_000_000) for steps in rounds]


def test_ratios_are_taken_inside_a_round():
    # The second round ran on a machine twice as slow: the ratio does not move.
    bare = laps((100_000,) * 3, (200_000,) * 3)
    guard = laps((110_000,) * 3, (220_000,) * 3)
    rows = {row["arm"]: row for row in figures_of({"bare": bare, "guard": guard}, batch=4)}
    assert rows["guard"]["ratio"] == 1.1
    assert rows["guard"]["ratio_95"] == [1.1, 1.1]
    assert rows["bare"]["added_us"] == 0.0
    assert rows["guard"]["ttft_ms"] == 5.0 and rows["guard"]["rest_ms"] == 2.0
    assert rows["guard"]["tokens_per_s"] == pytest.approx(1e6 * 4 / 165, abs=0.1)


def test_the_interval_holds_the_median_and_narrows_with_rounds():
    rng = np.random.default_rng(1)
    few, many = rng.normal(1.0, 0.1, 8), rng.normal(1.0, 0.1, 800)
    narrow = interval_of(many)
    assert narrow.low <= narrow.point <= narrow.high
    assert narrow.high - narrow.low < (lambda i: i.high - i.low)(interval_of(few))


def test_a_planted_slope_is_found():
    rng = np.random.default_rng(0)
    x = (1, 8, 64, 256)
    slope = slope_of(x, [list(30 + 0.25 * at + rng.normal(0, 0.5, 40)) for at in x])
    assert slope.per_unit.low < 0.25 < slope.per_unit.high
    assert slope.at_zero == pytest.approx(30, abs=0.5)


def row(ratio: float, spread: float, **changes: object) -> dict[str, object]:
    return {
        "subject": "s", "arm": "guard", "batch": 1, "context": 8, "ratio": ratio,
        "ratio_95": [ratio - spread, ratio + spread], **changes,
    }  # fmt: skip


def test_only_what_leaves_the_noise_counts_as_a_change():
    old = [row(1.02, 0.01), row(1.02, 0.01, batch=2), row(1.02, 0.01, batch=4)]
    new = [row(1.05, 0.01), row(1.03, 0.01, batch=2), row(1.0, 0.005, batch=4)]
    assert [c.verdict for c in compare(old, new)] == ["slower", "same", "faster"]
    with pytest.raises(ConfigurationError, match="measured nothing that this one does"):
        compare(old, [row(1.0, 0.1, subject="another")])


def test_a_shape_has_the_probe_that_was_asked_for():
    subject = of_shape("nano", probe=ProbeShape(features=37, heads=3, sites=2), vocab=300)
    facts = subject.facts()
    assert (facts["features"], facts["heads"], facts["sites"]) == (37, 3, 2)
    assert subject.model.config.vocab_size == 300
    with pytest.raises(ConfigurationError, match="shape='micro' is not one of nano"):
        of_shape("micro")
    with pytest.raises(ConfigurationError, match="features=9999 in sites=2 do not fit 2 layers"):
        of_shape("nano", probe=ProbeShape(features=9999))
    with pytest.raises(ConfigurationError, match="vocab=100 has no room"):
        of_shape("nano", vocab=100)


def test_every_arm_says_what_the_bare_model_says_and_leaves_nothing(nano):
    load = Load(batch=10, context=6, new_tokens=5)
    arms, options = arms_of(nano, load), options_of(nano, load)
    assert tuple(arms) == ARMS
    bare = nano.model.generate(**options)
    for name, arm in arms.items():
        lap = arm.lap(options)
        assert len(lap.steps) == 4, name
        assert min(lap.first, *lap.steps, lap.rest) > 0
        assert count_hooks(nano.model) == 0
        assert "_get_logits_processor" not in vars(nano.model)
    assert torch.equal(arms["guard"].run(**options).sequences, bare)
    traces = arms["tripping"].run(**options).traces
    assert sum(trace.tripped for trace in traces) == 1


def test_a_ladder_has_a_row_an_arm_with_its_facts(nano):
    rows = ladder_rows(nano, Load(1, 6, 4), rounds=2, only=("monitor", "guard"))
    assert [row["arm"] for row in rows] == ["bare", "monitor", "guard"]
    assert rows[0]["ratio"] == 1.0
    assert rows[2]["features"] == 24
    assert 0 <= rows[2]["added_kib"] < 64
    assert rows[2]["added_waits_per_step"] is None  # there is no accelerator to wait for
    with pytest.raises(ConfigurationError, match="rounds=1 give no interval"):
        ladder_rows(nano, Load(1, 6, 4), rounds=1)


def test_a_compiled_ladder_traces_before_the_clock_and_not_while_it_runs(nano):
    backend = counting()
    load = Load(1, 6, 4, mode="compiled", backend=backend)
    arms, options = arms_of(nano, load), options_of(nano, load)
    wanted = {name: arms[name] for name in ("bare", "hooks", "monitor", "guard")}
    bare = arms["bare"].call(**options)
    assert torch.equal(arms["guard"].call(**options).sequences, bare)
    for arm in wanted.values():
        arm.call(**options)
    graphs = backend.graphs
    assert graphs >= 2, "bare and tapped models have graphs of their own"
    laps = interleaved(wanted, options, rounds=2)
    assert backend.graphs == graphs
    assert all(len(lap.steps) == 3 for taken in laps.values() for lap in taken)
    assert not any("forward" in vars(module) for module in nano.model.modules())


def test_device_time_is_told_apart_from_host_time():
    host = laps((100_000,) * 3, (100_000,) * 3)
    device = [replace(lap, device_steps=(50_000,) * 3) for lap in host]
    slower = [replace(lap, device_steps=(60_000,) * 3) for lap in host]
    rows = {row["arm"]: row for row in figures_of({"bare": device, "guard": slower}, batch=1)}
    assert rows["guard"]["device_ratio"] == 1.2 and rows["guard"]["ratio"] == 1.0
    assert rows["guard"]["device_tpot_us"] == 60.0
    assert rows["guard"]["device_ratio_95"] == [1.2, 1.2]
    rows = figures_of({"bare": host, "guard": host}, batch=1)
    assert rows[1]["device_tpot_us"] is None and rows[1]["device_ratio_95"] is None


def test_modes_are_read_and_refused_by_name():
    assert modes_of("eager, compiled,eager", "cpu") == ["eager", "compiled"]
    assert modes_of("cuda-graph", "cuda:1") == ["cuda-graph"]
    with pytest.raises(UnsupportedError, match="'cuda-graph' is refused on device='cpu'"):
        modes_of("eager,cuda-graph", "cpu")
    with pytest.raises(ConfigurationError, match="--mode 'jit' is not one of eager, compiled"):
        modes_of("jit", "cpu")
    assert mode_options("eager", "inductor") == {}
    graphs = mode_options("cuda-graph", "inductor")
    assert graphs["cache_implementation"] == "static"
    assert graphs["compile_config"].mode == "reduce-overhead"
    assert mode_options("compiled", "inductor")["compile_config"].mode == "default"


def test_live_bytes_see_a_tensor_come_and_go():
    before = live_bytes()
    held = torch.zeros(1000)
    view = held[:10]
    assert live_bytes() - before == 4000
    del held, view
    assert live_bytes() == before


@pytest.mark.parametrize("text", ["speed", "batch=1", "batch=4,2", "batch=1,x", "batch=0,1"])
def test_what_cannot_be_varied_is_refused_by_name(text):
    with pytest.raises(ConfigurationError, match=text):
        values_of(text)


def test_lines_are_read_as_they_were_written(tmp_path):
    target = tmp_path / "o.jsonl"
    write_lines(target, [{"a": 1}], card(rounds=2))
    rows, facts = read_lines(target)
    assert rows == [{"a": 1}]
    assert facts["rounds"] == 2 and "machine" in facts
    target.write_text("[1]\n")
    with pytest.raises(ConfigurationError, match="line 1, is no JSON object"):
        read_lines(target)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_lines(tmp_path / "nowhere" / "o.jsonl", [], {})


def test_the_command_measures_writes_draws_and_compares(tmp_path):
    out, image = tmp_path / "o.jsonl", tmp_path / "o.png"
    base = ["bench", "--shape", "nano", "--features", "8", "--new-tokens", "3", "--rounds", "2"]
    small = [*base, "--batch", "1", "--context", "4", "--arms", "guard", "--clock", "cpu"]
    run = CliRunner()
    done = run.invoke(app, [*small, "--out", str(out), "--plot", str(image)])
    assert done.exit_code == 0, done.output
    assert "nano, eager, batch 1, context 4" in done.output
    assert image.read_bytes().startswith(b"\x89PNG")
    done = run.invoke(app, [*small, "--compare", str(out), "--json"])
    answer = json.loads(done.stdout)
    assert [row["arm"] for row in answer["rows"]] == ["bare", "guard"]
    assert answer["changes"][0]["verdict"] in ("slower", "faster", "same")
    grown = run.invoke(app, [*base, "--context", "4", "--grow", "batch=1,2", "--json"])
    rows = json.loads(grown.stdout)["rows"]
    assert [row["value"] for row in rows] == [1, 2]
    assert rows[0]["slope_us_95"][0] <= rows[0]["slope_us_per_unit"] <= rows[0]["slope_us_95"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "x"], "--batch 'x' wants positive numbers"),
        (["--arms", "gard", "--shape", "nano"], "--arms 'gard' is not one of bare"),
        (["--mode", "cuda-graph", "--shape", "nano"], "'cuda-graph' is refused"),
        (["--grow", "batch"], "pass --shape as well"),
        (["--model", "m"], "--model and --bundle go together"),
        (["--shape", "nano", "--model", "m"], "either --shape or --model"),
    ],
)
def test_the_command_refuses_by_name(arguments, message):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.output
