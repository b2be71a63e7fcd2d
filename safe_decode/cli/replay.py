"""`safe-decode replay` and `safe-decode show`: traces recomputed, and told in colours.

Knows options, tables and how traces meet models. Does not know the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, working
from safe_decode.cli.options import BundleOptions, JsonOptions, ModelName, ModelOptions
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import BundleError, ConfigurationError

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.loading import Loaded
    from safe_decode.trace.replay import Replay, Rescore
    from safe_decode.trace.schema import SafetyTrace
    from safe_decode.trace.shown import ShownToken

__all__ = ["replay", "show"]


@dataclass(frozen=True, kw_only=True)
class TraceFile(JsonOptions):
    """The traces that a command reads."""

    trace: Annotated[
        Path,
        typer.Argument(help="Traces as JSON lines, written by `safe-decode generate --trace`."),
    ]


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(TraceFile, ModelOptions, BundleOptions):
    """Options of `safe-decode replay`."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt of one trace, one option for each trace in order. With prompts, the model "
            "scores the traces again; without, the recorded scores are taken."
        ),
    ] = None
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0, help="Largest difference that a logit of the probe may have when scored again."
        ),
    ] = 1e-3


@dataclass(frozen=True, kw_only=True)
class ShowOptions(TraceFile):
    """Options of `safe-decode show`."""

    model: ModelName = None


@command("Tools")
def replay(options: ReplayOptions) -> None:
    """Recompute the decisions of traces; exit status 1 if any differs."""
    from safe_decode.trace.schema import read_traces

    traces = read_traces(options.trace)
    found = _replayed(traces, options)
    if options.as_json:
        rows = [
            {
                "scores": one.scores,
                "statistic_difference": one.statistic_difference,
                "logit_difference": one.logit_difference,
                "differences": list(one.differences),
            }
            for one in found
        ]
        print_json({"rows": rows, "agrees": not any(one.differences for one in found)})
    else:
        _print(traces, found)
    if any(one.differences for one in found):
        raise typer.Exit(1)


@command("Tools")
def show(options: ShowOptions) -> None:
    """Print the text of traces token by token, coloured by risk.

    Needs traces with token ids, and the tokenizer of the model that wrote them.
    """
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.trace.schema import read_traces
    from safe_decode.trace.shown import shown_tokens

    traces = read_traces(options.trace)
    with working("Loading the tokenizer"):
        decode = _decoder(options.model or artefact("aligned"))
    shown = [shown_tokens(one, decode) for one in traces]
    if options.as_json:
        print_json({"rows": [_as_json(one, ts) for one, ts in zip(traces, shown, strict=True)]})
        return
    from safe_decode.demo.terminal import legend, response_text

    out = console()
    out.print(legend())
    for number, (one, tokens) in enumerate(zip(traces, shown, strict=True)):
        end = one.end
        trip = "" if end.trip_step is None else f", trips at score {end.trip_step}"
        out.print(f"\n#{number} {end.outcome}{trip}", style="bold")
        out.print(response_text(tokens), soft_wrap=True)


def _replayed(traces: Sequence[SafetyTrace], options: ReplayOptions) -> list[Replay]:
    from safe_decode.trace.replay import replay as recompute

    probes = options.load_bundle()
    prompts: Sequence[str | None] = options.prompt or [None] * len(traces)
    if len(prompts) != len(traces):
        raise ConfigurationError(
            f"--prompt was given {len(prompts)} times for {len(traces)} traces; pass one each."
        )
    loaded: Any = options.load_model() if options.prompt else None
    found = []
    with working("Replaying"):
        for one, text in zip(traces, prompts, strict=True):
            _require_bundle(one, probes)
            rescore = None if text is None else _rescorer(loaded, probes, text)
            found.append(
                recompute(one, probes.monitor, rescore=rescore, logit_tolerance=options.tolerance)
            )
    return found


def _require_bundle(trace: SafetyTrace, bundle: ProbeBundle) -> None:
    if trace.header.bundle != bundle.digest:
        raise BundleError(
            f"the trace was judged by bundle {trace.header.bundle[:12]}, this one is "
            f"{bundle.digest[:12]}; pass --bundle with the one that wrote it."
        )


def _rescorer(loaded: Loaded, bundle: ProbeBundle, prompt: str) -> Rescore:
    import torch

    from safe_decode.activations.tap import ActivationTap
    from safe_decode.prompts.chat import encode_chat

    model = loaded.model
    probe = bundle.probe.to(model.device)
    tap = ActivationTap(model, bundle.probe.sites)
    head = encode_chat(loaded.tokenizer, prompt).ids

    def rescore(turn: Sequence[int], n: int) -> list[list[float]]:
        ids = torch.tensor([[*head, *turn]], device=model.device)
        with tap.listening() as beats, torch.no_grad():
            beats.keep_last(n)
            model(input_ids=ids, use_cache=False)
            scores: list[list[float]] = probe(beats.take())[0].tolist()
        return scores

    return rescore


def _decoder(name: str | Path) -> Callable[[Sequence[int]], str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model={str(name)!r} has no tokenizer that can be loaded; pass its directory or name."
        ) from error
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _as_json(trace: SafetyTrace, tokens: Sequence[ShownToken]) -> dict[str, object]:
    return {
        "outcome": trace.end.outcome,
        "trip_step": trace.end.trip_step,
        "tokens": [
            {"text": token.text, "risk": token.risk, "mark": token.mark} for token in tokens
        ],
    }


def _print(traces: Sequence[SafetyTrace], found: Sequence[Replay]) -> None:
    columns = ("trace", "outcome", "scores", "statistic off by", "logits off by")
    rows = [
        [
            str(number),
            trace.end.outcome,
            str(one.scores),
            f"{one.statistic_difference:.2g}",
            "-" if one.logit_difference is None else f"{one.logit_difference:.2g}",
        ]
        for number, (trace, one) in enumerate(zip(traces, found, strict=True))
    ]
    print_table(WordTable(columns, rows))
    out = console()
    for number, one in enumerate(found):
        for difference in one.differences:
            out.print(f"trace {number}: {difference}", style="bold red", soft_wrap=True)
    agrees = sum(not one.differences for one in found)
    out.print(f"{agrees} of {len(found)} traces replay to the same decisions.")
