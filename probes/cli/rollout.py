"""`safe-decode rollout`: what the protected model itself says, judged, ready to fit on.

Knows the options and the order of the work. Does not know how responses are generated,
wrapped or judged.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.options import BatchSize, DataOptions, require_different_samples
from probes.cli.tables.facts import show_facts, show_warnings
from safe_decode.cli.command import command
from safe_decode.cli.console import print_json, require_place
from safe_decode.cli.options import JsonOptions, ModelOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probes.data.conversations import Conversation
    from probes.rollouts.framings import Wrapping
    from probes.rollouts.generate import RolloutConfig
    from probes.rollouts.judges import RowJudge

__all__ = ["rollout"]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who judges the responses, and by what."""

    judge: Annotated[
        str,
        typer.Option(
            help="Judge of the responses: none, rule (refusal phrases and patterns), "
            "module:function, or the base URL of an endpoint."
        ),
    ] = "rule"
    harmful_pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="With the judge rule: regular expression that matches harmful text alone. May be "
            "given several times."
        ),
    ] = None
    refusal_phrase: Annotated[
        list[str] | None,
        typer.Option(
            help="With the judge rule: phrase that opens a refusal, besides the built-in ones. May "
            "be given several times."
        ),
    ] = None
    answers_to_harm_are_harm: Annotated[
        bool,
        typer.Option(
            help="With the judge rule: take every answer to a harmful request as harmful."
        ),
    ] = False
    judge_model: Annotated[
        str, typer.Option(help="With an endpoint: name of the model that judges.")
    ] = ""
    judge_key_variable: Annotated[
        str, typer.Option(help="With an endpoint: environment variable that holds its key.")
    ] = "OPENAI_API_KEY"
    judge_at_once: Annotated[
        int, typer.Option(min=1, help="With an endpoint: requests that are sent at the same time.")
    ] = 8


@dataclass(frozen=True, kw_only=True)
class WrappingOptions:
    """How many requests are framed or prefilled, and with which texts."""

    framed: Annotated[
        float,
        typer.Option(help="Share of requests, harmful and benign alike, that get a framing."),
    ] = 0.25
    prefilled: Annotated[
        float,
        typer.Option(
            help="Share of requests, harmful and benign alike, whose answer is started for the "
            "model."
        ),
    ] = 0.25
    framings: Annotated[
        Path | None,
        typer.Option(
            help="File of framings, one a line, each with {request}. Without it: the built-in ones."
        ),
    ] = None
    prefills: Annotated[
        Path | None,
        typer.Option(help="File of started answers, one a line. Without it: the built-in ones."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are generated."""

    samples: Annotated[
        int, typer.Option(min=1, help="Responses that are generated to each prompt.")
    ] = 1
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, help="Temperature at which responses are sampled. 0: greedy decoding."
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most probable tokens that together hold this probability."
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        typer.Option(min=0, help="Sample from this many most probable tokens. 0: from all."),
    ] = 0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 256
    batch_size: BatchSize = 32
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the framings.")] = 0

    def config(self) -> RolloutConfig:
        """Return the options as the generator takes them."""
        from probes.rollouts.generate import RolloutConfig

        return RolloutConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            temperature=self.temperature or 1.0,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(
    DataOptions, JudgeOptions, WrappingOptions, SamplingOptions, ModelOptions, JsonOptions
):
    """Options of `safe-decode rollout`."""

    out: Annotated[
        Path,
        typer.Option(
            help="Write the conversations to this JSONL file. A run that was interrupted goes on "
            "from it."
        ),
    ]


@command("Make a probe")
def rollout(options: RolloutOptions) -> None:
    """Let the model answer prompts, judge what it says, and go on after an interruption."""
    require_place(options.out)
    require_different_samples(options.samples, options.temperature)
    from probes.rollouts.framings import wrapped
    from probes.rollouts.resume import rollout_to, with_room
    from probes.rollouts.types import requests_of

    row_judge, wrapping = _judge(options), _wrapping(options)
    config = options.config()
    readings = options.read()
    rows = [row for one in readings for row in (*one.prompts, *one.conversations)]
    asked = wrapped(requests_of(rows, samples=options.samples), wrapping)
    own = options.load_model()
    kept = with_room(own.model, own.tokenizer, asked, options.max_new_tokens)
    report = rollout_to(
        options.out,
        own.model,
        own.tokenizer,
        kept,
        judge=row_judge,
        config=config,
        judged_at_once=options.judge_at_once if options.judge.startswith("http") else 1,
    )
    facts = {
        "responses": len(report.conversations),
        "resumed": report.resumed,
        "too_long_for_the_context": len(asked) - len(kept),
        **_facts(report.conversations),
    }
    if options.as_json:
        sources = [one.to_json() for one in readings]
        print_json({"out": str(options.out), "sources": sources, **facts})
        return
    show_warnings(readings)
    show_facts("Responses", facts, options.out)


def _judge(options: JudgeOptions) -> RowJudge | None:
    from probes.building.labels import judge_for
    from probes.building.recipe import Labels

    if options.judge == "none":
        return None
    return judge_for(
        Labels(
            judge=options.judge,
            judge_model=options.judge_model,
            key_variable=options.judge_key_variable,
            harmful_patterns=tuple(options.harmful_pattern or ()),
            refusal_phrases=tuple(options.refusal_phrase or ()),
            answers_to_harm_are_harm=options.answers_to_harm_are_harm,
        )
    )


def _wrapping(options: RolloutOptions) -> Wrapping:
    from probes.rollouts.framings import FRAMINGS, PREFILLS, Wrapping, read_texts

    texts, prefills = FRAMINGS, options.prefills
    if options.framings is not None:
        own = read_texts(options.framings)
        texts = {f"framing-{number}": text for number, text in enumerate(own)}
    return Wrapping(
        framed=options.framed,
        prefilled=options.prefilled,
        framings=texts,
        prefills=PREFILLS if prefills is None else read_texts(prefills),
        seed=options.seed,
    )


def _facts(rows: Sequence[Conversation]) -> dict[str, object]:
    from probes.data.balance import cell_shares

    labels = Counter(str(row.meta.get("label", "unjudged")) for row in rows)
    return {
        "labels": dict(sorted(labels.items())),
        "framed": sum("framing" in row.meta for row in rows),
        "prefilled": sum(row.prefill_tokens > 0 for row in rows),
        "cells": {str(cell): round(share, 4) for cell, share in cell_shares(rows).items()},
    }
