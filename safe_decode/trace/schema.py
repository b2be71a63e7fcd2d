"""What happened to one row, step by step, as versioned JSON lines.

Knows scores, actions and counts, and how they are written and read back. Does not know
texts: there is none in it, in memory or on disk, and token ids are written only when asked
for, since they are the text to anyone with the tokenizer.

A trace is a header line, one line a score and an end line; a file holds any number of
traces. Readers ignore fields they do not know and refuse versions, lines and words they do
not know, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from safe_decode.decision import Action, Outcome, Reason, Redirect
from safe_decode.errors import DataError
from safe_decode.trace import json_lines

__all__ = ["TRACE_VERSION", "SafetyTrace", "TraceEnd", "TraceHeader", "TraceStep", "read_traces"]

TRACE_VERSION = 5
_READ_VERSIONS = (1, 2, 3, 4, 5)
"""1: without `pruned_beams` and `check`; 2: without `reasoning` and its threshold; 3: without
`lookahead_tokens`, `withheld_tokens` and `source`; 4: without `warnings`. What a version lacks
has its default."""
_SINCE_VERSION_2 = frozenset(
    {
        *("pruned_beams", "check", "reasoning", "reasoning_threshold"),
        *("lookahead_tokens", "withheld_tokens", "source", "warnings"),
    }
)


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What the row was judged by.

    Attributes:
        bundle: Digest of the bundle, which holds the monitor needed for replay.
        heads: K names, the order of the logits.
        alpha: Level of the certificate in force.
        population: Population the certificate speaks of.
        threshold: What the statistic is compared with.
        certificate: "valid", "valid(off-policy)" where the model did not write the responses it
            was certified on, or "void(reason)" for a call outside the certified envelope.
        redirect: What a trip leads to.
        holdback_tokens: A token is released when it and this many after it are judged.
        reasoning_threshold: Inside marked spans; there the statistic counts values lowered by
            its difference to `threshold`. None: there is no other.
        source: Whose responses were certified on: "on-policy", "off-policy" or "unrecorded".
        warnings: What to beware of with this bundle and certificate, in a few words each: a low
            or hardly known recall, an off-policy certificate, units that were not located.
    """

    bundle: str
    heads: tuple[str, ...]
    alpha: float
    population: str
    threshold: float
    certificate: str
    redirect: Redirect
    holdback_tokens: int
    reasoning_threshold: float | None = None
    source: str = "unrecorded"
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One score.

    Attributes:
        position: Index of the score in the assistant turn; 0 is s_0, t + 1 judges y_t.
        token: Id of the token judged; None for s_0, and where ids were not written.
        logits: K values, in the order of the header's heads.
        statistic: Running maximum of the smoothed logits, compared with the threshold.
        action: What was done.
        why: Why.
        attempt: 0 in the row's own run, 1.. in the continuations after a rewind.
        check: Logit of the self-check taken at this score, or None.
        reasoning: Whether the score lies inside a marked span of reasoning.
    """

    position: int
    token: int | None
    logits: tuple[float, ...]
    statistic: float
    action: Action
    why: Reason
    attempt: int = 0
    check: float | None = None
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class TraceEnd:
    """How the row ended.

    Attributes:
        outcome: In one word.
        released_tokens: Model tokens that reached the reader; supplied prefill and the
            guard's own words do not count.
        dropped_tokens: Model tokens generated and not shown.
        prefill_tokens: Tokens of the answer that came with the prompt.
        trip_step: Position of the first trip, or None.
        clear_point: Last position that lay clearly below the threshold before the trip.
        tries: Continuations after a rewind.
        lookahead_tokens: Unseen tokens that were decoded and judged behind a response which the
            model did not end itself, so that its last words were judged like any others.
        withheld_tokens: Last tokens of such a response that are not shown, since too few tokens
            could be judged behind them.
        unscored_tail: Released tokens that no score judged; above 0 only where an engine
            cannot run a closing forward.
        refusal_truncated: The refusal or opener did not fit.
        pruned_beams: Beams of the same prompt that tripped and gave way to others.
        unprotected: A trip changed nothing (flag mode, or errors allowed).
        error: Name and message of what failed, or None.
    """

    outcome: Outcome
    released_tokens: int
    dropped_tokens: int = 0
    prefill_tokens: int = 0
    trip_step: int | None = None
    clear_point: int | None = None
    tries: int = 0
    lookahead_tokens: int = 0
    withheld_tokens: int = 0
    unscored_tail: int = 0
    refusal_truncated: bool = False
    pruned_beams: int = 0
    unprotected: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SafetyTrace:
    """One row from its first score to its end.

    Attributes:
        header: What it was judged by.
        steps: Its scores in the order in which they were read.
        end: How it ended.
    """

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    end: TraceEnd

    @property
    def tripped(self) -> bool:
        """Whether a trip was recorded, in flag mode too."""
        return self.end.trip_step is not None

    @property
    def summary(self) -> str:
        """The row in one line: how it ended, its largest statistic, and what it was judged by."""
        header, end = self.header, self.end
        trip = "" if end.trip_step is None else f", trips at score {end.trip_step}"
        own = [step.statistic for step in self.steps if step.attempt == 0]
        peak = f", statistic up to {max(own):.3g}" if own else ""
        return (
            f"{end.outcome}{trip}{peak}, threshold {header.threshold:.3g}, alpha {header.alpha:g} "
            f"{header.certificate}"
        )

    def __repr__(self) -> str:
        """Return one line; `steps` has the scores."""
        return f"SafetyTrace({len(self.steps)} scores: {self.summary})"

    def _repr_html_(self) -> str:
        """Draw the row for a notebook, tokens as their ids."""
        from safe_decode.trace.notebook import trace_as_html

        return trace_as_html(self)

    def logits_of(self, attempt: int = 0) -> list[list[float]]:
        """Return the logits of one attempt, n lists of K, to run a monitor over again."""
        return [list(step.logits) for step in self.steps if step.attempt == attempt]

    def lines(self, *, token_ids: bool = False) -> Iterator[str]:
        """Yield the JSON lines of this trace, without line ends.

        Args:
            token_ids: Whether token ids are written. They give the text away.
        """
        yield json_lines.line("header", {"version": TRACE_VERSION, **_record(self.header)})
        for step in self.steps:
            record = _record(step)
            if not token_ids:
                record["token"] = None
            yield json_lines.line("step", record)
        yield json_lines.line("end", _record(self.end))

    def write(self, path: str | Path, *, token_ids: bool = False) -> None:
        """Append this trace to a file, which is created if it is not there.

        Args:
            path: JSON lines, UTF-8.
            token_ids: As in `lines`.
        """
        text = "".join(line + "\n" for line in self.lines(token_ids=token_ids))
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


def read_traces(source: str | Path | Iterable[str]) -> list[SafetyTrace]:
    """Read traces back.

    Args:
        source: A path, or the lines themselves.

    Raises:
        DataError: A line that is no JSON object, a version or word this reader does not
            know, a missing or ill-typed field, or a trace without its end. The line's
            number is named.
    """
    if isinstance(source, str | Path):
        try:
            source = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"trace {source} cannot be read: {error}; pass JSON lines.") from error
    return list(_traces(source))


_T = TypeVar("_T", TraceHeader, TraceStep, TraceEnd)


def _traces(lines: Iterable[str]) -> Iterator[SafetyTrace]:
    header: TraceHeader | None = None
    steps: list[TraceStep] = []
    number = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        kind, record = json_lines.parsed(line, number)
        if (kind == "header") != (header is None):
            wanted = "a header" if header is None else "a step or an end"
            raise DataError(
                f"line {number} is a {kind}, wanted {wanted}; the file is cut or two writers mixed "
                "their lines."
            )
        if kind == "header":
            _require_version(record, number)
            header, steps = _read(TraceHeader, record, number), []
        elif kind == "step":
            steps.append(_read(TraceStep, record, number))
        elif kind == "end" and header is not None:
            yield SafetyTrace(header, tuple(steps), _read(TraceEnd, record, number))
            header = None
        else:
            raise DataError(
                f"line {number} is a {kind!r}, wanted header, step or end; upgrade safe-decode."
            )
    if header is not None:
        raise DataError(f"the trace that ends at line {number} has no end line; the file is cut.")


def _record(value: TraceHeader | TraceStep | TraceEnd) -> dict[str, Any]:
    return {field.name: json_lines.plain(getattr(value, field.name)) for field in fields(value)}


def _require_version(record: Mapping[str, Any], number: int) -> None:
    version = record.get("version")
    if version not in _READ_VERSIONS:
        known = ", ".join(map(str, _READ_VERSIONS[:-1])) + f" and {_READ_VERSIONS[-1]}"
        raise DataError(
            f"line {number} has trace version {version!r}, this reader knows {known}; "
            "use the safe-decode that wrote it, or a newer one."
        )


def _read(cls: type[_T], record: Mapping[str, Any], number: int) -> _T:
    values: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in _SINCE_VERSION_2 and field.name not in record:
            continue
        if field.name not in record:
            raise DataError(
                f"line {number} has no {field.name!r}, which every {record['kind']} line has; "
                "the file is foreign."
            )
        value, kind = record[field.name], str(field.type)
        values[field.name] = json_lines.checked(field.name, kind, value, number)
    return cls(**values)
