"""`safe-decode evaluate`: how well a bundle detects, beside what text alone gives away.

Knows the options, where responses come from and how figures are shown. Does not know how
anything is scored, counted or drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from probes.cli.judges import JudgeName, conversations_of, reading_of
from probes.cli.options import Fold
from probes.cli.tables.facts import show_warnings
from probes.cli.tables.figures import json_of, print_tables, tables_of
from probes.recipes.early_checks import require_both_kinds
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, require_place, write_text
from safe_decode.cli.options import CertifiedOptions, JsonOptions
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.evaluation.offline import Report
    from probes.evaluation.served import ServedAnswer
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["evaluate"]

Mode = Literal["teacher-forced", "generated", "both"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(CertifiedOptions, JsonOptions):
    """Options of `safe-decode evaluate`."""

    data: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations, a file or hf:NAME[:split]. Controls are fitted on rows of "
            "the split fit, calibrated on calibrate, and all figures come from test; without "
            "splits, the bundle says which prompts it was fitted and calibrated on. Rows that it "
            "was made from are left out of the test. Without it: drawn from the embedded world, "
            "with unseen parts of it for the test."
        ),
    ] = None
    train: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations that controls are fitted on, where --data has no splits."
        ),
    ] = None
    mode: Annotated[
        Mode,
        typer.Option(
            help="What is evaluated: finished responses (teacher-forced), answers that the model "
            "gives bare and guarded (generated), or both."
        ),
    ] = "teacher-forced"
    prefix: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Also evaluate on the first tokens of each response alone, at most this many. May "
            "be given several times.",
        ),
    ] = None
    count: Annotated[
        int,
        typer.Option(min=20, help="Responses to draw from the embedded world, without --data."),
    ] = 600
    draws: Annotated[int, typer.Option(min=10, help="Resamples of the cluster bootstrap.")] = 1000
    seed: Annotated[
        int, typer.Option(help="Seed of the drawn responses, the bootstrap and the controls.")
    ] = 0
    fold: Fold = 0
    judge: JudgeName = None
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a self-contained page to this file. It shows test responses in full."
        ),
    ] = None


@command("Evaluate")
def evaluate(options: EvaluateOptions) -> None:
    """Evaluate a bundle: detection beside controls, delay, leaks, over-refusal."""
    html, out, mode = options.html, options.out, options.mode
    require_place(html)
    require_place(out)
    _require_sense(options)
    given = _given(options)
    decoder = options.load_decoder("rewind")
    rows = given or _drawn(decoder, options)
    report = answered = None
    if mode != "generated":
        prefixes = options.prefix or []
        report = _report(decoder, rows, prefixes, draws=options.draws, seed=options.seed)
    if mode != "teacher-forced":
        answered = _answered(decoder, rows["test"], options.judge, options.max_new_tokens)
    facts = _facts(decoder, options, rows)
    tables = tables_of(report, answered)
    if html is not None:
        write_text(html, _page(report, decoder, tables, facts))
    found = {"facts": facts, **json_of(report, answered)}
    if out is not None:
        write_text(out, json.dumps(found, indent=1, allow_nan=False) + "\n")
    if options.as_json:
        print_json(found)
    else:
        print_tables(tables)
        console().print(_footer(facts, html), soft_wrap=True)


def _require_sense(options: EvaluateOptions) -> None:
    model, mode = options.model, options.mode
    if options.data is None and model is not None:
        raise ConfigurationError(
            f"--model={model!r} was given without --data; pass judged responses of that model, as "
            "only the embedded one has a world to draw from."
        )
    if mode != "teacher-forced" and model is not None and options.judge is None:
        raise ConfigurationError(
            "--mode=generated needs a judge of what another model says; pass --judge."
        )
    if mode != "teacher-forced":
        reading_of(options.judge)  # a judge that cannot be imported
    if options.html is not None:
        if mode == "generated":
            raise ConfigurationError(
                "--html shows finished responses; pass --mode teacher-forced or both."
            )
        from probes.reports.figures import require_plots

        require_plots()


def _drawn(decoder: SafeDecoder, options: EvaluateOptions) -> dict[str, list[Conversation]]:
    """Draw the rows of fit, calibrate and test from the embedded world."""
    from probes.organism.labelled_data import EmbeddedData

    count = options.count
    source = EmbeddedData(
        seed=options.seed,
        fold=options.fold,
        max_new_tokens=decoder.certificate.envelope.max_new_tokens,
    )
    model, tokenizer = decoder.model, decoder.tokenizer
    seen = source.apart(model, tokenizer, {"fit": count, "calibrate": max(count, 400)})
    test = source.test(model, tokenizer, count)
    return {"fit": seen["fit"], "calibrate": seen["calibrate"], "test": test}


def _given(options: EvaluateOptions) -> dict[str, list[Conversation]] | None:
    """Read the rows of fit, calibrate and test, before the model is loaded; None without --data."""
    data, train = options.data, options.train
    if data is None:
        return None
    from probes.evaluation.contamination import rows_for_evaluation

    rows = conversations_of(data)
    if train is not None and any(row.split is not None for row in rows):
        raise DataError(f"{data} has splits, so --train={train} is not used; drop one of them.")
    found = rows_for_evaluation(
        rows,
        options.load_bundle().seen,
        train=() if train is None else conversations_of(train),
        name=data,
    )
    if found.note is not None:
        show_warnings((), [found.note])
    parts = found.parts()
    if not parts["test"]:
        raise DataError(
            f"{data} has splits, and none of its rows is of the split 'test'; add some."
        )
    if options.mode != "generated":
        judged = [row for row in parts["test"] if row.response_harmful is not None]
        require_both_kinds(judged, ("test",))
    return parts


def _report(
    decoder: SafeDecoder,
    rows: Mapping[str, Sequence[Conversation]],
    prefixes: Sequence[int],
    *,
    draws: int,
    seed: int,
) -> Report:
    from probes.attacks.refit import fit_config_of
    from probes.evaluation.offline import EvaluationConfig, evaluate_bundle

    config = EvaluationConfig(
        prefixes=(None, *prefixes),
        draws=draws,
        seed=seed,
        alpha=decoder.certificate.alpha,
        population=decoder.certificate.population,
        fit=fit_config_of(decoder.bundle),
    )
    return evaluate_bundle(
        decoder.model,
        decoder.tokenizer,
        decoder.bundle,
        rows["test"],
        config,
        train=rows["fit"],
        calibrate=rows["calibrate"],
    )


def _answered(
    decoder: SafeDecoder,
    rows: Sequence[Conversation],
    judge: str | None,
    max_new_tokens: int | None,
) -> list[ServedAnswer]:
    from probes.evaluation.served import answer_both
    from probes.rollouts.types import Request

    requests = [
        Request(
            messages=row.messages,
            group=row.group,
            prefill=decoder.tokenizer.decode(
                list((row.response_ids or ())[: row.prefill_tokens]),
                clean_up_tokenization_spaces=False,
            )
            or None,
            prompt_harmful=row.prompt_harmful,
            category=row.category,
            meta=row.meta,
        )
        for row in rows
    ]
    return answer_both(decoder, requests, reading_of(judge), max_new_tokens=max_new_tokens)


def _page(
    report: Report | None,
    decoder: SafeDecoder,
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    facts: Mapping[str, str],
) -> str:
    from probes.reports.evaluation_page import evaluation_page

    assert report is not None
    return evaluation_page(report, decoder.tokenizer, tables, facts=facts)


def _facts(
    decoder: SafeDecoder, options: EvaluateOptions, rows: Mapping[str, Sequence[Conversation]]
) -> dict[str, str]:
    certificate, data = decoder.certificate, options.data
    source = f"embedded world, fold {options.fold}" if data is None else Path(data).name
    return {
        "bundle": decoder.bundle.digest[:12],
        "certificate": f"alpha {certificate.alpha:g}, delta {certificate.delta:g}, n "
        f"{certificate.n}, {certificate.population}, {certificate.evidence.source}",
        "hold-back": f"{decoder.bundle.holdback_tokens} tokens",
        "data": source,
        "responses": ", ".join(f"{name} {len(part)}" for name, part in rows.items()),
        "seed": str(options.seed),
    }


def _footer(facts: Mapping[str, str], html: Path | None) -> str:
    told = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return told + ("" if html is None else f"; page: {html}")
