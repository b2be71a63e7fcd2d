"""`safe-decode demo`: the same model, bare and guarded, and what it comes to.

Knows the options, the judge of the embedded model and the order in which things are shown.
Does not know how an arm is run or how anything is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.commands.generate import Device, DtypeName, ModelName, decoder_of
from safe_decode.commands.output import console, print_json, progress, working, write_text
from safe_decode.errors import ConfigurationError, PromptError

if TYPE_CHECKING:
    from safe_decode.demo.arena import Arena, Judge
    from safe_decode.demo.figures import Label, SceneFigures
    from safe_decode.demo.scenes import DemoPrompt
    from safe_decode.demo.view import Duel

__all__ = ["demo", "judge_released"]


def demo(  # noqa: PLR0913 - options of a command
    prompt: Annotated[str | None, typer.Option(help="A prompt of your own, shown alone.")] = None,
    prefill: Annotated[
        str | None, typer.Option(help="First words of the answer to your prompt.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    redirect: Annotated[str, typer.Option(help="refuse, rewind or stop.")] = "rewind",
    alpha: Annotated[
        float | None, typer.Option(help="A certified false-alarm level; default the bundle's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 160,
    model: ModelName = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Directory of the bundle; default embedded.")
    ] = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
) -> None:
    """Show bare and guarded side by side, then a table measured on held-out prompts."""
    began = time.monotonic()
    _require_sense(prompt, prefill, redirect)
    with working("Loading the model"):
        arena = _arena(
            model,
            bundle,
            redirect=redirect,
            alpha=alpha,
            device=device,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
        )
    shown, counted = _prompts(prompt, prefill)
    with working("Answering the prompts that are shown"):
        duels = arena.show(shown)
    if not as_json:
        _print_duels(duels)
    figures = _measure(arena, counted)
    facts = _facts(arena, n=len(counted), seconds=time.monotonic() - began)
    if html is not None:
        from safe_decode.demo.page import page

        write_text(html, page(duels, figures, facts=facts))
    if as_json:
        print_json(_as_json(duels, figures, facts))
    else:
        _print_figures(figures, facts, html)


def judge_released(
    messages: Sequence[Mapping[str, str]], prefill: str | None, released: str
) -> Label:
    """Say what reached the reader of the embedded model, in its own small world.

    The supplied prefill is read as context: a harmful clause counts only if it was completed
    by released text.
    """
    from probes.organism.oracle import judge

    given = prefill or ""
    verdict = judge(messages, given + released)
    label: Label = verdict.label
    if label == "harmful" and (verdict.complete_char or 0) <= len(given):
        # The attacker's own clause hides what follows it: read that by itself.
        context = [*messages, {"role": "assistant", "content": given}]
        label = judge(context, released).label
    return label


def _require_sense(prompt: str | None, prefill: str | None, redirect: str) -> None:
    if prompt is None and prefill is not None:
        raise ConfigurationError("--prefill was given without --prompt; pass the prompt too.")
    if prompt is not None and not prompt.strip():
        raise PromptError("--prompt is empty; pass the text to be answered.")
    if redirect == "flag":
        raise ConfigurationError(
            "--redirect=flag changes nothing, so both sides would be alike; pass refuse, rewind "
            "or stop."
        )


def _arena(  # noqa: PLR0913 - options of a command
    model: str | None,
    bundle: Path | None,
    *,
    redirect: str,
    alpha: float | None,
    device: str,
    dtype: str,
    max_new_tokens: int,
) -> Arena:
    from safe_decode.demo.arena import Arena

    decoder = decoder_of(model, bundle, redirect=redirect, alpha=alpha, device=device, dtype=dtype)
    # The oracle reads the embedded model's world alone; of others nothing is claimed.
    judge: Judge | None = judge_released if model is None else None
    return Arena(decoder, max_new_tokens=max_new_tokens, judge=judge)


def _prompts(
    prompt: str | None, prefill: str | None
) -> tuple[Sequence[DemoPrompt], Sequence[DemoPrompt]]:
    """Choose what is shown and what is counted."""
    from safe_decode.demo.load import artefact
    from safe_decode.demo.scenes import DemoPrompt, read_prompts, showcases

    if prompt is not None:
        return [DemoPrompt.own(prompt, prefill=prefill)], []
    prompts = read_prompts(artefact("prompts.jsonl"))
    return showcases(prompts), prompts


def _measure(arena: Arena, prompts: Sequence[DemoPrompt]) -> Sequence[SceneFigures]:
    from safe_decode.demo.figures import figures_of

    if arena.judge is None or not prompts:
        return ()
    with progress("Measuring", total=len(prompts)) as tick:
        outcomes = []
        for batch in arena.measure(prompts):
            outcomes += batch
            tick(len(batch))
    return figures_of(outcomes)


def _facts(arena: Arena, *, n: int, seconds: float) -> dict[str, str]:
    import platform

    import torch

    bundle = arena.decoder.bundle
    certificate = arena.certificate
    return {
        "model": arena.model_name,
        "bundle": bundle.digest,
        "certificate": (
            f"alpha {certificate.alpha:g}, confidence {1 - certificate.delta:g}, "
            f"n {certificate.n}, population {certificate.population}"
        ),
        "redirect": arena.redirect,
        "hold-back": f"{bundle.holdback_tokens} tokens",
        "held-out prompts": str(n),
        "time": f"{seconds:.1f} s, {torch.get_num_threads()} threads, {platform.machine()}",
    }


def _print_duels(duels: Sequence[Duel]) -> None:
    from safe_decode.demo.terminal import duel_panel, legend

    out = console()
    out.print(legend())
    for duel in duels:
        out.print(duel_panel(duel, width=out.width))


def _print_figures(
    figures: Sequence[SceneFigures], facts: Mapping[str, str], html: Path | None
) -> None:
    from safe_decode.demo.terminal import figures_table

    out = console()
    if figures:
        out.print(figures_table(figures))
    out.print("; ".join(f"{name}: {value}" for name, value in facts.items()), style="dim")
    if html is not None:
        out.print(f"page: {html}")


def _as_json(
    duels: Sequence[Duel], figures: Sequence[SceneFigures], facts: Mapping[str, str]
) -> dict[str, object]:
    shown = [
        {
            "scene": duel.prompt.scene,
            "request": duel.prompt.request,
            "prefill": duel.prompt.prefill,
            "bare": duel.bare.text,
            "bare_verdict": duel.bare.verdict,
            "guarded": duel.guarded.text,
            "guarded_verdict": duel.guarded.verdict,
            "tripped": duel.guarded.tripped,
        }
        for duel in duels
    ]
    return {"facts": dict(facts), "shown": shown, "scenes": [row.as_json() for row in figures]}
