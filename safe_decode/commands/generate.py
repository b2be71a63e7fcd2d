"""`safe-decode generate`: answer prompts under the guard.

Knows the options and how answers are shown. Does not know how the guard works.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safe_decode.commands.output import console, print_json, working, write_text
from safe_decode.errors import ConfigurationError, PromptError

if TYPE_CHECKING:
    from safe_decode.guard import GuardedOutput, SafeDecoder

__all__ = ["Device", "DtypeName", "ModelName", "decoder_of", "generate"]

ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Name or directory of a causal language model; default embedded."),
]
BundlePath = Annotated[
    Path | None, typer.Option("--bundle", help="Directory of the bundle; default embedded.")
]
Device = Annotated[str, typer.Option("--device", help="Where the model goes, as torch spells it.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]


def generate(  # noqa: PLR0913 - options of a command
    prompt: Annotated[list[str], typer.Option("--prompt", help="May be given several times.")],
    model: ModelName = None,
    bundle: BundlePath = None,
    prefill: Annotated[str | None, typer.Option(help="First words of the answer.")] = None,
    redirect: Annotated[str, typer.Option(help="refuse, rewind, stop or flag.")] = "rewind",
    alpha: Annotated[
        float | None, typer.Option(help="A certified false-alarm level; default the bundle's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer prompts under the guard."""
    if not all(text.strip() for text in prompt):
        raise PromptError("--prompt is empty; pass the text to be answered.")
    sampling = _sampling(temperature, top_p, top_k)
    with working("Loading the model"):
        decoder = decoder_of(
            model, bundle, redirect=redirect, alpha=alpha, device=device, dtype=dtype
        )
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    with working("Generating"):
        output = decoder.generate(
            [[{"role": "user", "content": text}] for text in prompt],
            prefill=prefill,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
    if trace is not None:
        write_text(trace, "".join(t.to_json() + "\n" for t in output.traces))
    if as_json:
        print_json(_as_json(prompt, output))
    else:
        _show(prompt, output)


def decoder_of(
    model: str | None,
    bundle: Path | None,
    *,
    redirect: str,
    alpha: float | None,
    device: str,
    dtype: str,
) -> SafeDecoder:
    """Load a model and a bundle, the embedded ones where None, and put the guard on.

    Raises:
        ConfigurationError: A model without its bundle, or nothing to load.
        BundleError: The bundle is damaged or was made for another model.
    """
    if model is not None and bundle is None:
        raise ConfigurationError(
            f"--model={model!r} was given without --bundle; pass the bundle made for that model, "
            "the embedded one fits the embedded model alone."
        )
    from safe_decode.bundle import ProbeBundle
    from safe_decode.demo.load import artefact, load_model
    from safe_decode.guard import SafeDecoder

    # The bundle first: a bad one is told before seconds are spent on the model.
    probes = ProbeBundle.load(bundle or artefact("bundle"))
    loaded = load_model(model or artefact("aligned"), device=device, dtype=dtype)
    return SafeDecoder(loaded.model, loaded.tokenizer, probes, redirect=redirect, alpha=alpha)


def _sampling(
    temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    if not given or temperature == 0:
        return {"do_sample": False}
    # What is not given is neutral, whatever the model's own configuration says.
    return {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **given}


def _as_json(prompts: Sequence[str], output: GuardedOutput) -> dict[str, object]:
    rows = [
        {"prompt": prompt, "text": text, "tripped": trace.tripped}
        for prompt, text, trace in zip(prompts, output.texts, output.traces, strict=True)
    ]
    return {"rows": rows}


def _show(prompts: Sequence[str], output: GuardedOutput) -> None:
    out = console()
    for prompt, text in zip(prompts, output.texts, strict=True):
        _ = prompt
        out.print(text)
