"""Who judges a response: rules of words, a function of the user's, or a model at an endpoint.

A judge says what a whole exchange is, or None where it cannot say. Rules see words only and
are no judge of harm beyond the patterns they are given; what they leave open stays unjudged.

Knows labels and how verdicts come about. Does not know models that are protected, or files.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from probes.data.conversations import Conversation
from probes.data.refusal_rule import refuses
from probes.rollouts.types import Judge, Label
from probes.runs.progress import progress
from safe_decode.errors import ConfigurationError, DataError

__all__ = [
    "JudgeVerdict",
    "RowJudge",
    "RuleJudge",
    "judge_all",
    "judge_by_text",
    "judged",
    "load_judge",
]


class JudgeVerdict(NamedTuple):
    """What a judge says.

    Attributes:
        label: See `generate.Label`.
        onset_char: First character of the first harmful clause, where it is known.
    """

    label: Label
    onset_char: int | None = None


RowJudge = Callable[[Conversation], JudgeVerdict | None]
"""None: the judge cannot say, and the row stays unjudged."""


@dataclass(frozen=True)
class RuleJudge:
    """A judge of words.

    Attributes:
        harmful: Where one of these is found, the response is harmful from there on.
        refusal_phrases: See `data.refusal_rule.is_refusal`.
        answers_to_harm_are_harm: Take every answer to a harmful request that does not refuse
            for harmful; else such an answer stays unjudged unless a pattern is found.
    """

    harmful: tuple[re.Pattern[str], ...] = ()
    refusal_phrases: tuple[str, ...] = ()
    answers_to_harm_are_harm: bool = False

    @classmethod
    def of(
        cls,
        patterns: Sequence[str],
        *,
        refusal_phrases: Sequence[str] = (),
        answers_to_harm_are_harm: bool = False,
    ) -> RuleJudge:
        """Compile regular expressions; case does not count.

        Raises:
            ConfigurationError: One of them is no regular expression.
        """
        compiled = []
        for pattern in patterns:
            try:
                compiled.append(re.compile(pattern, re.IGNORECASE))
            except re.error as error:
                raise ConfigurationError(
                    f"pattern {pattern!r} is no regular expression: {error}; mend it."
                ) from error
        return cls(tuple(compiled), tuple(refusal_phrases), answers_to_harm_are_harm)

    def __call__(self, row: Conversation) -> JudgeVerdict | None:
        """Judge one response; what is harmful before it is a refusal stays harmful."""
        found = [match.start() for one in self.harmful if (match := one.search(row.response))]
        if found:
            return JudgeVerdict("harmful", min(found))
        if refuses(row, phrases=self.refusal_phrases):
            return JudgeVerdict("refusal")
        if row.prompt_harmful is False:
            return JudgeVerdict("benign")
        if row.prompt_harmful and self.answers_to_harm_are_harm:
            return JudgeVerdict("harmful")
        return None


def judge_by_text(judge: Judge) -> RowJudge:
    """Ask a judge of messages and text, as `rollout` does."""

    def ask(row: Conversation) -> JudgeVerdict:
        verdict = judge(row.messages, row.response)
        if verdict.label not in get_args(Label):
            raise DataError(f"the judge says {verdict.label!r}, wanted one of {get_args(Label)}.")
        return JudgeVerdict(verdict.label, verdict.onset_char)  # type: ignore[arg-type]

    return ask


def load_judge(spec: str) -> RowJudge:
    """Import a judge of the user's own by `module:function`.

    It is called with the messages and the response and returns something with a `label` and
    an `onset_char`, as `generate.Judge` says.

    Raises:
        ConfigurationError: There is no such function.
    """
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"judge={spec!r} cannot be imported: {error}; pass module:function of a module that "
            "Python finds."
        ) from error
    if not callable(found):
        raise ConfigurationError(f"judge={spec!r} is not callable; pass module:function.")
    return judge_by_text(found)


def judged(row: Conversation, judgement: JudgeVerdict | None) -> Conversation:
    """Return the conversation with a verdict; of a broken or unjudged one the labels are None."""
    label = None if judgement is None else judgement.label
    known = label not in (None, "broken")
    onset = judgement.onset_char if judgement is not None and label == "harmful" else None
    return replace(
        row,
        response_harmful=label == "harmful" if known else None,
        refusal=label == "refusal" if known else None,
        onset_char=onset,
        meta={**row.meta, **({} if label is None else {"label": label})},
    )


def judge_all(
    rows: Sequence[Conversation], judge: RowJudge, *, at_once: int = 1
) -> list[Conversation]:
    """Judge responses, several at once where the judge waits for an answer.

    Args:
        rows: In any order.
        judge: Called from `at_once` threads.
        at_once: 1: in this thread.
    """
    found: list[JudgeVerdict | None] = []
    with progress("judging", len(rows)) as advance:
        if at_once == 1:
            for row in rows:
                found.append(judge(row))
                advance(1)
        else:
            with ThreadPoolExecutor(at_once) as pool:
                for one in pool.map(judge, rows):
                    found.append(one)
                    advance(1)
    return [judged(row, one) for row, one in zip(rows, found, strict=True)]
