"""A trace comes back as it was written, says no text, and foreign lines are named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_decode.errors import DataError
from safe_decode.trace.schema import SafetyTrace, TraceEnd, TraceHeader, TraceStep, read_traces

HEADER = TraceHeader(
    bundle="ab12",
    heads=("request", "response"),
    alpha=0.01,
    population="benign",
    threshold=2.5,
    certificate="valid",
    redirect="rewind",
    holdback_tokens=4,
)
STEPS = (
    TraceStep(0, None, (0.1, -0.2), 0.1, "scan", "below_threshold"),
    TraceStep(1, 4242, (0.3, 0.1), 0.2, "pass", "below_threshold"),
    TraceStep(2, 77, (9.0, 8.0), 3.0, "trip", "above_threshold"),
    TraceStep(1, 5, (0.0, 0.0), 0.2, "force", "opener", attempt=1),
)
END = TraceEnd("rewound", released_tokens=1, dropped_tokens=1, trip_step=2, clear_point=1, tries=1)
TRACE = SafetyTrace(HEADER, STEPS, END)


def test_a_trace_with_ids_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    TRACE.write(path, token_ids=True)
    TRACE.write(path, token_ids=True)
    assert read_traces(path) == [TRACE, TRACE]


def test_token_ids_are_not_written_unless_asked_for() -> None:
    written = "\n".join(TRACE.lines())
    assert "4242" not in written
    (read,) = read_traces(TRACE.lines())
    assert [step.token for step in read.steps] == [None] * 4
    assert replace(read, steps=()) == replace(TRACE, steps=())


def test_every_line_is_standard_json_even_when_a_score_is_nan() -> None:
    broken = TraceStep(1, 5, (math.nan, math.inf), -math.inf, "close", "non_finite")
    lines = list(SafetyTrace(HEADER, (broken,), END).lines())
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (step,) = read_traces(lines)[0].steps
    assert math.isnan(step.logits[0])
    assert (step.logits[1], step.statistic) == (math.inf, -math.inf)


def test_logits_of_an_attempt_are_ready_for_replay() -> None:
    assert TRACE.logits_of() == [[0.1, -0.2], [0.3, 0.1], [9.0, 8.0]]
    assert TRACE.logits_of(1) == [[0.0, 0.0]]
    assert TRACE.tripped


@given(
    st.lists(st.tuples(st.floats(), st.floats()), max_size=5),
    st.sampled_from(["released", "refused", "closed"]),
    st.text(max_size=20),
)
def test_any_numbers_and_error_texts_come_back(
    logits: list[tuple[float, float]], outcome: str, error: str
) -> None:
    steps = tuple(
        TraceStep(i, i, values, values[0], "pass", "below_threshold")
        for i, values in enumerate(logits)
    )
    trace = SafetyTrace(HEADER, steps, replace(END, outcome=outcome, error=error))
    (read,) = read_traces(trace.lines(token_ids=True))
    assert repr(read) == repr(trace)  # repr, since NaN is not equal to itself


def changed(line: int, **changes: object) -> list[str]:
    lines = list(TRACE.lines())
    record = {**json.loads(lines[line]), **changes}
    lines[line] = json.dumps({k: v for k, v in record.items() if v != "drop"})
    return lines


def test_a_trace_of_version_1_is_read() -> None:
    lines = changed(5, pruned_beams="drop")
    lines[0] = changed(0, version=1)[0]
    assert read_traces(lines)[0].end == END


def test_unknown_fields_are_ignored() -> None:
    assert read_traces(changed(1, added_later=3))[0].end == END


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(0, version=9), "line 1 has trace version 9, this reader knows 1, 2, 3, 4 and 5"),
        (changed(2, action="vanish"), "line 3 has action='vanish', wanted one of scan, pass"),
        (changed(2, why="mood"), "line 3 has why='mood'"),
        (changed(2, kind="comment"), "line 3 is a 'comment', wanted header, step or end"),
        (changed(2, statistic="drop"), "line 3 has no 'statistic'"),
        (changed(2, statistic="high"), "line 3 has statistic='high', wanted float"),
        (changed(2, position=1.5), "line 3 has position=1.5, wanted int"),
        (changed(2, position=True), "line 3 has position=True, wanted int"),
        (changed(5, outcome=None), "line 6 has outcome=None"),
        (list(TRACE.lines())[:-1], "ends at line 5 has no end line"),
        (list(TRACE.lines())[1:], "line 1 is a step, wanted a header"),
        ([*list(TRACE.lines())[:2], *TRACE.lines()], "line 3 is a header, wanted a step or an end"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is no trace line"),
    ],
)
def test_foreign_lines_are_refused_by_name(lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_traces(lines)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_traces(tmp_path / "none.jsonl")
