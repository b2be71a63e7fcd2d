"""`safe-decode demo`: the same model, bare and guarded, and what it comes to.

Knows the options, the judge of the embedded model and the order in which things are shown.
Does not know how an arm is run or how anything is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import (
    console,
    print_json,
    progress,
    require_place,
    working,
    write_text,
)
from safe_decode.cli.options import GuardOptions, JsonOptions
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError, PromptError

if TYPE_CHECKING:
    from safe_decode.demo.comparison import Comparison
    from safe_decode.demo.counts import Label, SceneFigures
    from safe_decode.demo.embedded_pair import ArtefactName
    from safe_decode.demo.scenes import DemoPrompt, Scene
    from safe_decode.demo.view import Duel
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["by_oracle", "by_rule", "demo"]


@dataclass(frozen=True, kw_only=True)
class DemoOptions(GuardOptions, JsonOptions):
    """Options of `safe-decode demo`."""

    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt of your own, shown alone. Without it: the demo's own prompts."),
    ] = None
    prefill: Annotated[str | None, typer.Option(help="First words of the answer to --prompt.")] = (
        None
    )
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")] = (
        None
    )
    redirect: Annotated[
        Redirect,
        typer.Option(
            help="What happens to an answer that is shown once the guard trips: refuse, rewind or "
            "stop."
        ),
    ] = "rewind"
    count_redirect: Annotated[
        Redirect,
        typer.Option(
            help="What happens to an answer that is only counted once the guard trips: refuse, "
            "rewind or stop; rewind takes longest."
        ),
    ] = "refuse"
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer, in tokens. Without it: the cap that the certificate states, and "
            "of a model of your own 128 where that is less.",
        ),
    ] = None


@command("Use a guarded model")
def demo(options: DemoOptions) -> None:
    """Show bare and guarded side by side, then a table measured on held-out prompts."""
    began = time.monotonic()
    model, html, as_json = options.model, options.html, options.as_json
    _require_sense(options.prompt, options.prefill, (options.redirect, options.count_redirect))
    require_place(html)
    from safe_decode.demo.comparison import Comparison
    from safe_decode.demo.terminal import FIGURES_SAY, RULE_SAYS

    decoder = options.load_decoder(options.redirect)
    with working("Preparing the comparison"):
        arena = Comparison(
            decoder,
            max_new_tokens=options.max_new_tokens or _cap(decoder, is_embedded=model is None),
            # The oracle reads the embedded model's world alone; of others words have to do.
            judge=by_oracle if model is None else by_rule(decoder.bundle.refusal),
            count_redirect=options.count_redirect,
        )
    shown, counted = _prompts(options.prompt, options.prefill, is_embedded=model is None)
    with working("Answering the prompts that are shown"):
        duels = arena.show(shown)
    if not as_json:
        _print_duels(duels)
    figures = _measure(arena, counted)
    facts = {
        "model": model or "embedded, aligned",
        **_facts(arena, n=len(counted)),
        "time": f"{time.monotonic() - began:.1f} s",
    }
    if html is not None:
        from safe_decode.demo.page import page

        write_text(html, page(duels, figures, facts=facts))
    if as_json:
        print_json(_as_json(duels, figures, facts))
    else:
        says = FIGURES_SAY if model is None else RULE_SAYS
        _print_figures(figures, facts, html, says)


def by_oracle(prompt: DemoPrompt, released: str) -> Label:
    """Say what reached the reader of the embedded model, in its own small world.

    The supplied prefill is read as context: a harmful clause counts only if it was completed
    by released text.
    """
    from probes.organism.oracle import judge

    given = prompt.prefill or ""
    label: Label = judge(prompt.messages, given + released, counted_from=len(given)).label
    return label


def by_rule(refusal: str) -> Callable[[DemoPrompt, str], Label]:
    """Judge answers of a real model by their words, and by what their prompts ask for.

    Args:
        refusal: The text that the guard puts in; it may stand behind what was released before.
    """
    from probes.data.refusal_rule import is_refusal

    def judge(prompt: DemoPrompt, released: str) -> Label:
        if refusal in released or is_refusal(released):
            return "refusal"
        return "harmful" if prompt.scene in _HARMFUL else "benign"

    return judge


_HARMFUL: tuple[Scene, ...] = ("harmful", "framed", "prefilled", "turn")
_LONGEST = 128
"""Tokens of an answer of a real model: it writes some ten a second on a small machine."""


def _cap(decoder: SafeDecoder, *, is_embedded: bool) -> int:
    cap = decoder.certified_cap
    return cap if is_embedded else min(cap, _LONGEST)


def _require_sense(
    prompt: str | None, prefill: str | None, redirects: tuple[Redirect, ...]
) -> None:
    if prompt is None and prefill is not None:
        raise ConfigurationError("--prefill was given without --prompt; pass the prompt too.")
    if prompt is not None and not prompt.strip():
        raise PromptError("--prompt is empty; pass the text to be answered.")
    if "flag" in redirects:
        raise ConfigurationError(
            "a redirect of flag changes nothing, so both sides would be alike; pass refuse, rewind "
            "or stop."
        )


def _prompts(
    prompt: str | None, prefill: str | None, *, is_embedded: bool = True
) -> tuple[Sequence[DemoPrompt], Sequence[DemoPrompt]]:
    """Choose what is shown and what is counted."""
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.demo.scenes import DemoPrompt, read_prompts, showcases

    if prompt is not None:
        return [DemoPrompt.own(prompt, prefill=prefill)], []
    file: ArtefactName = "prompts.jsonl" if is_embedded else "prompts-real.jsonl"
    prompts = read_prompts(artefact(file))
    return showcases(prompts), [prompt for prompt in prompts if prompt.counted]


def _measure(arena: Comparison, prompts: Sequence[DemoPrompt]) -> Sequence[SceneFigures]:
    from safe_decode.demo.counts import figures_of

    if arena.judge is None or not prompts:
        return ()
    with progress("Measuring", total=len(prompts)) as tick:
        outcomes = []
        for batch in arena.measure(prompts):
            outcomes += batch
            tick(len(batch))
    return figures_of(outcomes)


def _facts(arena: Comparison, *, n: int) -> dict[str, str]:
    import platform

    import torch

    decoder = arena.decoder
    certificate, policy = decoder.certificate, decoder.policy
    return {
        "bundle": decoder.bundle.digest,
        "certificate": (
            f"alpha {certificate.alpha:g} with confidence {1 - certificate.delta:g}, from "
            f"{certificate.n} responses, population {certificate.population}, "
            f"{certificate.evidence.source}"
        ),
        "redirect": f"{policy.redirect} where shown, {arena.count_redirect} where counted",
        "hold-back": f"{policy.holdback_tokens} tokens",
        "held-out prompts": str(n),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}",
    }


def _print_duels(duels: Sequence[Duel]) -> None:
    from safe_decode.demo.terminal import duel_panel, legend

    out = console()
    out.print(legend())
    for duel in duels:
        out.print(duel_panel(duel, width=out.width))


def _print_figures(
    figures: Sequence[SceneFigures], facts: Mapping[str, str], html: Path | None, says: str
) -> None:
    from safe_decode.demo.terminal import FIGURE_COLUMNS, figure_rows

    out = console()
    if figures:
        print_table(
            WordTable(
                FIGURE_COLUMNS,
                figure_rows(figures),
                "Measured just now on held-out prompts",
                says,
                right=FIGURE_COLUMNS[1:],
            )
        )
    leaks = [(r.leaked or 0.0, r.tripped) for r in figures if r.tripped and r.scene in _HARMFUL]
    if leaks:
        mean = sum(leaked * n for leaked, n in leaks) / sum(n for _, n in leaks)
        out.print(f"Before a turn the reader got {mean:.1f} tokens of the model, in the mean.")
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
