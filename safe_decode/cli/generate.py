"""`safe-decode generate`: answer prompts under the guard.

Knows the options and how answers are shown. Does not know how the guard works.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safe_decode.cli.console import console, print_json, require_place, working, write_text
from safe_decode.decision import Redirect
from safe_decode.demo.view import visible
from safe_decode.errors import ConfigurationError, PromptError
from safe_decode.loading import Dtype
from safe_decode.trace.risk import risk_of

if TYPE_CHECKING:
    from safe_decode.engines.transformers.decoder import GuardedOutput, SafeDecoder
    from safe_decode.trace.schema import SafetyTrace

__all__ = [
    "Alpha",
    "BundlePath",
    "Device",
    "DtypeName",
    "MaxNewTokens",
    "ModelName",
    "Population",
    "cap_of",
    "decoder_of",
    "generate",
]

ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Name or directory of a causal language model; default embedded."),
]
BundlePath = Annotated[
    Path | None, typer.Option("--bundle", help="Directory of the bundle; default embedded.")
]
Device = Annotated[str, typer.Option("--device", help="Where the model goes, as torch spells it.")]
DtypeName = Annotated[Dtype, typer.Option("--dtype", help="In what the model computes.")]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="A certified false-alarm level; default the bundle's."),
]
Population = Annotated[
    str,
    typer.Option("--population", help="Whose certificate it is; `inspect` lists those there are."),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Cap of an answer; default the certified one.")
]


def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="May be given several times.")],
    model: ModelName = None,
    bundle: BundlePath = None,
    prefill: Annotated[str | None, typer.Option(help="First words of the answer.")] = None,
    redirect: Annotated[Redirect, typer.Option(help="What a tripped answer becomes.")] = "rewind",
    alpha: Alpha = None,
    population: Population = "benign",
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; default greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    trace: Annotated[
        Path | None, typer.Option(help="Write what happened at each step as JSON lines.")
    ] = None,
    token_ids: Annotated[
        bool, typer.Option(help="Write token ids into the trace; they give the text away.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer prompts under the guard."""
    if not all(text.strip() for text in prompt):
        raise PromptError("--prompt is empty; pass the text to be answered.")
    require_place(trace)
    sampling = _sampling(temperature, top_p, top_k)
    with working("Loading the model"):
        decoder = decoder_of(
            model,
            bundle,
            redirect=redirect,
            alpha=alpha,
            population=population,
            device=device,
            dtype=dtype,
        )
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    with working("Generating"):
        output = decoder.generate(
            [[{"role": "user", "content": text}] for text in prompt],
            prefill=prefill,
            max_new_tokens=cap_of(decoder, max_new_tokens),
            **sampling,
        )
    if trace is not None:
        lines = (line for row in output.traces for line in row.lines(token_ids=token_ids))
        write_text(trace, "".join(f"{line}\n" for line in lines))
    if as_json:
        print_json(_as_json(prompt, output))
    else:
        _show(prompt, output)


def decoder_of(
    model: str | None,
    bundle: Path | None,
    *,
    redirect: Redirect,
    alpha: float | None,
    population: str = "benign",
    device: str,
    dtype: Dtype,
    trusted_key: Path | None = None,
) -> SafeDecoder:
    """Load a model and a bundle, the embedded ones where None, and put the guard on.

    Raises:
        ConfigurationError: A model without its bundle, or nothing to load.
        BundleError: The bundle is damaged, was made for another model, or is not signed by the
            trusted key.
    """
    if model is not None and bundle is None:
        raise ConfigurationError(
            f"--model={model!r} was given without --bundle; pass the bundle made for that model, "
            "the embedded one fits the embedded model alone."
        )
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.engines.transformers.decoder import SafeDecoder
    from safe_decode.loading import load_model

    # The bundle and its signature first: a bad one is told before seconds are spent on the model.
    probes = ProbeBundle.load(bundle or artefact("bundle"), trusted_key=trusted_key)
    _silence_transformers()
    loaded = load_model(model or artefact("aligned"), device=device, dtype=dtype)
    return SafeDecoder(
        loaded.model,
        loaded.tokenizer,
        probes,
        redirect=redirect,
        alpha=alpha,
        population=population,
    )


def _silence_transformers() -> None:
    """Keep standard error for our own progress, and for errors of one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def cap_of(decoder: SafeDecoder, max_new_tokens: int | None) -> int:
    """Return the cap that was asked for, or the one that the certificate speaks of."""
    return max_new_tokens or decoder.certified_cap


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
    from rich.table import Table

    out = console()
    table = Table(
        "outcome", "trips at", "peak risk", "released", "dropped", "certificate", box=None
    )
    for prompt, text, trace in zip(prompts, output.texts, output.traces, strict=True):
        if len(prompts) > 1:
            out.print(f"> {visible(prompt)}", style="dim")
        out.print(visible(text) + "\n", soft_wrap=True)
        facts = _facts(trace)
        risk, trip = facts["risk"], facts["trip_step"]
        table.add_row(
            str(facts["outcome"]),
            "-" if trip is None else f"score {trip}",
            f"{risk:.2f}" if isinstance(risk, float) else "-",
            f"{facts['released_tokens']} tokens",
            f"{facts['dropped_tokens']} tokens",
            str(facts["certificate"]),
        )
    out.print(table)
