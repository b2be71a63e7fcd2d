"""`safe-decode generate`: answer prompts under the guard.

Knows the options and how answers are shown. Does not know how the guard works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, require_place, working, write_text
from safe_decode.cli.options import CertifiedOptions, JsonOptions
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.decision import Redirect
from safe_decode.errors import PromptError
from safe_decode.trace.risk import risk_of
from safe_decode.trace.shown import visible

if TYPE_CHECKING:
    from safe_decode.engines.transformers.decoder import GuardedOutput
    from safe_decode.trace.schema import SafetyTrace

__all__ = ["generate"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CertifiedOptions, JsonOptions):
    """Options of `safe-decode generate`."""

    prompt: Annotated[list[str], typer.Option(help="Prompt to answer. May be given several times.")]
    prefill: Annotated[
        str | None, typer.Option(help="First words of every answer, which the model continues.")
    ] = None
    redirect: Annotated[
        Redirect, typer.Option(help="What happens to an answer once the guard trips.")
    ] = "rewind"
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Temperature at which tokens are sampled. Without it, or at 0: greedy decoding, "
            "unless another sampling option is given.",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most probable tokens that together hold this probability. "
            "Without it: from all."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from this many most probable tokens. Without it: from all."),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling. Without it: each run differs.")
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(help="Write what the guard decides at each step to this JSON lines file."),
    ] = None
    token_ids: Annotated[
        bool,
        typer.Option(help="Write token ids into the trace. Whoever reads them can read the text."),
    ] = False


@command("Use a guarded model")
def generate(options: GenerateOptions) -> None:
    """Answer prompts under the guard."""
    if not all(text.strip() for text in options.prompt):
        raise PromptError("--prompt is empty; pass the text to be answered.")
    require_place(options.trace)
    sampling = _sampling(options.temperature, options.top_p, options.top_k)
    decoder = options.load_decoder(options.redirect)
    if options.seed is not None:
        import torch

        torch.manual_seed(options.seed)
    with working("Generating"):
        output = decoder.generate(
            [[{"role": "user", "content": text}] for text in options.prompt],
            prefill=options.prefill,
            max_new_tokens=options.max_new_tokens or decoder.certified_cap,
            **sampling,
        )
    if options.trace is not None:
        lines = (line for row in output.traces for line in row.lines(token_ids=options.token_ids))
        write_text(options.trace, "".join(f"{line}\n" for line in lines))
    if options.as_json:
        print_json(_as_json(options.prompt, output))
    else:
        _show(options.prompt, output)


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    if not given or temperature == 0:
        return {"do_sample": False}
    # What is not given is neutral, whatever the model's own configuration says.
    return {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **given}


def _as_json(prompts: Sequence[str], output: GuardedOutput) -> dict[str, object]:
    rows = [
        {"prompt": prompt, "text": text, **_facts(trace)}
        for prompt, text, trace in zip(prompts, output.texts, output.traces, strict=True)
    ]
    return {"rows": rows}


def _facts(trace: SafetyTrace) -> dict[str, object]:
    header, end = trace.header, trace.end
    peak = max((step.statistic for step in trace.steps if step.attempt == 0), default=None)
    return {
        "outcome": end.outcome,
        "trip_step": end.trip_step,
        "risk": None if peak is None or peak != peak else risk_of(peak, header.threshold),
        "released_tokens": end.released_tokens,
        "dropped_tokens": end.dropped_tokens,
        "tries": end.tries,
        "alpha": header.alpha,
        "certificate": header.certificate,
        "certified_on": header.source,
        "error": end.error,
    }


def _show(prompts: Sequence[str], output: GuardedOutput) -> None:
    out = console()
    columns = ("outcome", "trips at", "peak risk", "released", "dropped", "certificate")
    rows = []
    for prompt, text, trace in zip(prompts, output.texts, output.traces, strict=True):
        if len(prompts) > 1:
            out.print(f"> {visible(prompt)}", style="dim")
        out.print(visible(text) + "\n", soft_wrap=True)
        facts = _facts(trace)
        risk, trip = facts["risk"], facts["trip_step"]
        rows.append(
            [
                str(facts["outcome"]),
                "-" if trip is None else f"score {trip}",
                f"{risk:.2f}" if isinstance(risk, float) else "-",
                f"{facts['released_tokens']} tokens",
                f"{facts['dropped_tokens']} tokens",
                str(facts["certificate"]),
            ]
        )
    print_table(WordTable(columns, rows))
