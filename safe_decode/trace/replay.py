"""A trace once more: its decisions from its logits, its logits from the model.

Knows traces, the monitor's arithmetic and how continuations follow each other. Does not know
files, tables or how a model is loaded.

A continuation resumes the monitor at the cut, so its scores follow those that stood there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safe_decode.errors import DataError
from safe_decode.monitor.monitor import MonitorConfig, reference
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.trace.schema import SafetyTrace, TraceStep

__all__ = ["STATISTIC_TOLERANCE", "Replay", "replay", "standing_steps"]

STATISTIC_TOLERANCE = 1e-4
"""Times 1 + |statistic|: traces hold float32 sums, the reference is float64."""

_RESUMED = frozenset(rule.outcome for rule in REDIRECTS.values() if rule.resumes)
"""Outcomes of rows that the model went on with in its own words."""

Rescore = Callable[[Sequence[int], int], Sequence[Sequence[float]]]
"""From turn ids, the supplied prefill first, and a count n, to the last n scores' logits."""


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        scores: Scores compared.
        statistic_difference: Largest absolute difference of a statistic.
        logit_difference: Largest absolute difference of a logit; None without a model.
        differences: Each difference in decision, or beyond the tolerance, in words.
    """

    scores: int
    statistic_difference: float
    logit_difference: float | None
    differences: tuple[str, ...]


def replay(
    trace: SafetyTrace,
    monitor: MonitorConfig,
    *,
    rescore: Rescore | None = None,
    logit_tolerance: float = 1e-3,
) -> Replay:
    """Compute a trace's decisions again.

    Args:
        trace: As read back.
        monitor: Of the bundle the trace names.
        rescore: Scores ids with the model; needs a trace with token ids. None: logits are
            taken as they are.
        logit_tolerance: Largest difference of a logit that kernels may make.

    Raises:
        DataError: `rescore` was given and the trace has no token ids.
    """
    differences: list[str] = []
    worst_statistic, worst_logit = 0.0, None if rescore is None else 0.0
    for steps, before in _attempts(trace):
        line = [*before, *steps]
        inside = trace.header.reasoning_threshold
        shift = 0.0 if inside is None else inside - trace.header.threshold
        computed = reference(
            monitor,
            trace.header.threshold,
            [list(s.logits) for s in line],
            [shift if s.reasoning else 0.0 for s in line],
        )
        fresh = computed[len(before) :]
        for step, wanted in zip(steps, fresh, strict=True):
            gap = _gap(step.statistic, wanted.statistic)
            worst_statistic = max(worst_statistic, gap)
            if gap > STATISTIC_TOLERANCE * (1 + abs(wanted.statistic)):
                differences.append(
                    f"{_place(step)}: statistic {step.statistic:g}, recomputed {wanted.statistic:g}"
                )
        differences += _decisions(steps, [s.alarm for s in fresh])
        if rescore is not None:
            gaps = _logit_gaps(line, len(steps), rescore)
            worst_logit = max(worst_logit or 0.0, *gaps)
            differences += [
                f"{_place(step)}: logits differ by {gap:g} from the model's"
                for step, gap in zip(steps, gaps, strict=True)
                if gap > logit_tolerance
            ]
    return Replay(len(trace.steps), worst_statistic, worst_logit, tuple(differences))


def standing_steps(trace: SafetyTrace) -> list[tuple[TraceStep, bool]]:
    """Say of each step whether the token it judged stands in the end.

    Returns:
        Every step of the trace in order; s_0, which judges none, stands.
    """
    groups = [steps for steps, _ in _attempts(trace)]
    left = trace.end.released_tokens
    told: list[tuple[TraceStep, bool]] = []
    for index, steps in enumerate(groups):
        following = groups[index + 1][0].position if index + 1 < len(groups) else None
        if following is not None:
            stands = [step.position < following for step in steps]
        else:
            given = [_is_given(trace, step) for step in steps]
            own = [n - sum(given[: n + 1]) for n in range(len(steps))]
            keeps_given = not index or left > 0 or trace.end.outcome in _RESUMED
            stands = [
                keeps_given if is_given else n < left
                for is_given, n in zip(given, own, strict=True)
            ]
        left -= sum(
            stand and not _is_given(trace, step) for step, stand in zip(steps, stands, strict=True)
        )
        told += zip(steps, stands, strict=True)
    return told


def _is_given(trace: SafetyTrace, step: TraceStep) -> bool:
    """Say whether the token judged is none of the model's: s_0, prefill, opener, refusal."""
    if step.attempt:
        return step.why == "opener"
    return step.position <= trace.end.prefill_tokens or step.action == "force"


def _attempts(trace: SafetyTrace) -> list[tuple[list[TraceStep], list[TraceStep]]]:
    """Each attempt's steps, and those that stood before them."""
    found: list[tuple[list[TraceStep], list[TraceStep]]] = []
    for number in sorted({step.attempt for step in trace.steps}):
        steps = [step for step in trace.steps if step.attempt == number]
        before: list[TraceStep] = []
        # A continuation at position 1 starts anew: nothing of the turn is kept.
        if number and steps[0].position > 1:
            previous, standing = found[-1]
            before = [*standing, *previous][: steps[0].position]
        found.append((steps, before))
    return found


def _decisions(steps: Sequence[TraceStep], alarms: Sequence[bool]) -> list[str]:
    first = next((i for i, alarm in enumerate(alarms) if alarm), None)
    recorded = next(
        (i for i, s in enumerate(steps) if s.action in ("trip", "alarm") or s.action == "close"),
        None,
    )
    if recorded is not None and steps[recorded].action == "close":
        return []  # the guard failed there; there is no alarm to compare
    if first == recorded:
        return []
    at = "nowhere" if first is None else _place(steps[first])
    said = "nowhere" if recorded is None else _place(steps[recorded])
    return [f"attempt {steps[0].attempt}: the trace alarms at {said}, recomputed at {at}"]


def _logit_gaps(line: Sequence[TraceStep], n: int, rescore: Rescore) -> list[float]:
    tokens = [step.token for step in line if step.position > 0]
    if any(token is None for token in tokens):
        raise DataError(
            "the trace has no token ids, which the model needs; write it with --token-ids."
        )
    logits = rescore([token for token in tokens if token is not None], n)
    return [
        max(_gap(a, b) for a, b in zip(step.logits, heads, strict=True))
        for step, heads in zip(line[-n:], logits, strict=True)
    ]


def _gap(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    gap = abs(a - b)
    return math.inf if math.isnan(gap) else gap


def _place(step: TraceStep) -> str:
    return f"score {step.position}" + (f" of attempt {step.attempt}" if step.attempt else "")
