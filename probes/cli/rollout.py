"""`safe-decode rollout`: what the protected model itself says, judged, ready to fit on.

Knows the options and the order of the work. Does not know how responses are generated,
wrapped or judged.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.options import (
    Columns,
    Data,
    Seed,
    Strict,
    loaded,
    read,
    show_facts,
    show_warnings,
)
from safe_decode.cli.console import print_json, require_place
from safe_decode.cli.generate import Device, DtypeName, ModelName
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probes.data.conversations import Conversation
    from probes.rollouts.framings import Wrapping
    from probes.rollouts.judges import RowJudge

__all__ = ["rollout"]


def rollout(
    data: Data,
    out: Annotated[Path, typer.Option(help="Write the conversations to this JSONL file.")],
    model: ModelName = None,
    columns: Columns = "auto",
    judge: Annotated[
        str,
        typer.Option(help="none, rule, module:function, or the base URL of an endpoint."),
    ] = "rule",
    harmful_pattern: Annotated[
        list[str] | None,
        typer.Option(help="rule: a regular expression that only harmful text matches."),
    ] = None,
    refusal_phrase: Annotated[
        list[str] | None, typer.Option(help="rule: a further phrase that opens refusals.")
    ] = None,
    answers_to_harm_are_harm: Annotated[
        bool, typer.Option(help="rule: take answers to harmful requests for harmful.")
    ] = False,
    judge_model: Annotated[str, typer.Option(help="Endpoint: the judge's name.")] = "",
    judge_key_variable: Annotated[
        str, typer.Option(help="Endpoint: environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    judge_at_once: Annotated[int, typer.Option(min=1, help="Endpoint: requests at once.")] = 8,
    framed: Annotated[
        float, typer.Option(help="Share of requests, harmful and benign alike, to frame.")
    ] = 0.25,
    prefilled: Annotated[
        float, typer.Option(help="Share of requests, harmful and benign alike, to prefill.")
    ] = 0.25,
    framings: Annotated[
        Path | None, typer.Option(help="Framings, one a line, each with {request}.")
    ] = None,
    prefills: Annotated[Path | None, typer.Option(help="Started answers, one a line.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Cap of a response.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses generated together.")] = 32,
    seed: Seed = 0,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let the model answer prompts, judge what it says, and go on after an interruption."""
    require_place(out)
    if samples > 1 and temperature == 0:
        raise ConfigurationError(
            f"--samples={samples} without --temperature would be {samples} times the same text; "
            "pass a temperature above 0."
        )
    from probes.rollouts.framings import wrapped
    from probes.rollouts.generate import RolloutConfig
    from probes.rollouts.resume import requests_of, rollout_to, with_room

    row_judge = _judge(
        judge,
        patterns=harmful_pattern or (),
        phrases=refusal_phrase or (),
        harm=answers_to_harm_are_harm,
        model=judge_model,
        key=judge_key_variable,
    )
    wrapping = _wrapping(framed, prefilled, framings, prefills, seed)
    config = RolloutConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_size=batch_size,
    )
    readings = read(data, columns, strict=strict)
    own = loaded(model, device, dtype)
    rows = [row for one in readings for row in (*one.prompts, *one.conversations)]
    asked = wrapped(requests_of(rows, samples=samples), wrapping)
    kept = with_room(own.model, own.tokenizer, asked, max_new_tokens)
    at_once = judge_at_once if judge.startswith("http") else 1
    report = rollout_to(
        out,
        own.model,
        own.tokenizer,
        kept,
        judge=row_judge,
        config=config,
        judged_at_once=at_once,
    )
    facts = {
        "responses": len(report.conversations),
        "resumed": report.resumed,
        "too_long_for_the_context": len(asked) - len(kept),
        **_facts(report.conversations),
    }
    if as_json:
        print_json({"out": str(out), "sources": [one.to_json() for one in readings], **facts})
        return
    show_warnings(readings)
    show_facts("Responses", facts, out)


def _judge(
    spec: str,
    *,
    patterns: Sequence[str],
    phrases: Sequence[str],
    harm: bool,
    model: str,
    key: str,
) -> RowJudge | None:
    from probes.rollouts.endpoint_judge import EndpointJudge
    from probes.rollouts.judges import RuleJudge, load_judge

    if spec == "none":
        return None
    if spec == "rule":
        return RuleJudge.of(patterns, refusal_phrases=phrases, answers_to_harm_are_harm=harm)
    if spec.startswith(("http://", "https://")):
        return EndpointJudge(url=spec, model=model, key=os.environ.get(key))
    return load_judge(spec)


def _wrapping(
    framed: float, prefilled: float, framings: Path | None, prefills: Path | None, seed: int
) -> Wrapping:
    from probes.rollouts.framings import FRAMINGS, PREFILLS, Wrapping, read_texts

    texts = FRAMINGS
    if framings is not None:
        texts = {f"framing-{number}": text for number, text in enumerate(read_texts(framings))}
    begun = PREFILLS if prefills is None else read_texts(prefills)
    return Wrapping(framed=framed, prefilled=prefilled, framings=texts, prefills=begun, seed=seed)


def _facts(rows: Sequence[Conversation]) -> dict[str, object]:
    from probes.data.balance import cell_shares

    labels = Counter(str(row.meta.get("label", "unjudged")) for row in rows)
    return {
        "labels": dict(sorted(labels.items())),
        "framed": sum("framing" in row.meta for row in rows),
        "prefilled": sum(row.prefill_tokens > 0 for row in rows),
        "cells": {str(cell): round(share, 4) for cell, share in cell_shares(rows).items()},
    }
