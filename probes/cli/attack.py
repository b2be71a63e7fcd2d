"""`safe-decode attack`: what it costs to get around a guard, under four threat models.

Knows the options, the order of the work and how records are shown. Does not know how any
attack works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from probes.cli.judges import JudgeName, conversations_of, reading_of
from probes.cli.options import Fold
from probes.cli.tables.attacks import attack_page, attack_tables
from probes.cli.tables.figures import print_tables
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, require_place, write_text
from safe_decode.cli.options import CertifiedOptions, JsonOptions
from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.attacks.behaviours import AttackSet
    from probes.attacks.config import AttackConfig
    from probes.attacks.objective import DetectorModel
    from probes.attacks.results import AttackArm, Record, Threat
    from probes.data.conversations import Conversation
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["attack"]


@dataclass(frozen=True, kw_only=True)
class AttackOptions(CertifiedOptions, JsonOptions):
    """Options of `safe-decode attack`."""

    behaviours: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations, a file or hf:NAME[:split], whose harmful answers to "
            "harmful requests the attack aims at. Without it: held-out behaviours of the embedded "
            "world."
        ),
    ] = None
    threat: Annotated[
        list[str] | None,
        typer.Option(
            help="Threat model: T1 (black box), T2 (surrogate), T3 (white box) or T4 (soft "
            "prompt). May be given several times. Without it: all four."
        ),
    ] = None
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="What is attacked or tried: guarded, bare or random. May be given several times. "
            "Without it: every arm of the threat model."
        ),
    ] = None
    count: Annotated[int, typer.Option(min=1, help="Behaviours that are attacked.")] = 30
    queries: Annotated[
        int, typer.Option(min=1, help="Queries that T1 spends on each behaviour.")
    ] = 100
    steps: Annotated[
        int, typer.Option(min=1, help="Search steps that T2 and T3 take in each restart.")
    ] = 150
    candidates: Annotated[
        int, typer.Option(min=1, help="Candidate suffixes that T2 and T3 evaluate in each step.")
    ] = 16
    restarts: Annotated[int, typer.Option(min=1, help="Restarts of the search of T2 and T3.")] = 3
    soft_steps: Annotated[
        int, typer.Option(min=1, help="Gradient steps that T4 takes in each restart.")
    ] = 300
    soft_restarts: Annotated[int, typer.Option(min=1, help="Restarts of T4.")] = 5
    samples: Annotated[
        int, typer.Option(min=1, help="Responses that are generated to each candidate prompt.")
    ] = 1
    doubled: Annotated[
        bool, typer.Option(help="Double every budget: queries, steps and restarts.")
    ] = False
    data: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations that the surrogate of T2 is fitted on. Without it: drawn "
            "from the embedded model."
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the records to this file after each behaviour. A run that was interrupted "
            "goes on from it."
        ),
    ] = None
    keep_prompts: Annotated[
        bool,
        typer.Option(
            help="Write the prompts that were found into the records, for `safe-decode refit`."
        ),
    ] = False
    half: Annotated[
        Literal["all", "first", "second"],
        typer.Option(
            help="Which behaviours are attacked: all, or one of two halves, of which the first "
            "serves a refit and the second its evaluation."
        ),
    ] = "all"
    html: Annotated[
        Path | None,
        typer.Option(help="Write a self-contained page that shows success against budget."),
    ] = None
    judge: JudgeName = None
    redirect: Annotated[
        Redirect, typer.Option(help="What the attacked guard does with an answer that trips it.")
    ] = "rewind"
    seed: Annotated[
        int, typer.Option(help="Seed of the behaviours, the searches and the sampling.")
    ] = 0
    fold: Fold = 0


@command("Attack")
def attack(options: AttackOptions) -> None:
    """Attack the guard of a model and say what success costs, beside the bare model."""
    require_place(options.out)
    require_place(options.html)
    config = _config(options)
    _require_sense(options, config.threats)
    from probes.attacks.runner import attack as run

    decoder = options.load_decoder(options.redirect)
    attack_set = _wanted(options)
    surrogate = _surrogate(decoder, options) if "T2" in config.threats else None
    records = run(
        decoder,
        attack_set,
        reading_of(options.judge),
        config,
        surrogate=surrogate,
        journal=options.out,
    )
    _tell(records, decoder, config, html=options.html, as_json=options.as_json)


def _config(options: AttackOptions) -> AttackConfig:
    from probes.attacks.config import ARMS, AttackConfig

    config = AttackConfig(
        threats=_threats(options.threat or list(ARMS)),
        arms=_arms(options.arm),
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        seed=options.seed,
        keeps_prompts=options.keep_prompts,
    )
    config = replace(
        config,
        black_box=replace(config.black_box, queries=options.queries),
        suffix=replace(
            config.suffix,
            steps=options.steps,
            candidates=options.candidates,
            restarts=options.restarts,
        ),
        soft=replace(config.soft, steps=options.soft_steps, restarts=options.soft_restarts),
    )
    return config.doubled() if options.doubled else config


def _require_sense(options: AttackOptions, threats: Sequence[Threat]) -> None:
    model = options.model
    if model is not None and (options.behaviours is None or options.judge is None):
        raise ConfigurationError(
            f"--model={model!r} needs --behaviours and --judge; only the embedded model has a "
            "world to draw from and an oracle."
        )
    if model is not None and options.data is None and "T2" in threats:
        raise ConfigurationError(
            f"T2 on --model={model!r} needs --data for its surrogate; pass it, or name other "
            "threats."
        )
    if options.redirect == "flag":
        raise ConfigurationError(
            "--redirect=flag changes no token, so there is no guard to attack; pass another. The "
            "bare model is attacked beside the guard in any case."
        )
    if options.html is not None:
        from probes.reports.figures import require_plots

        require_plots()


def _threats(names: Sequence[str]) -> tuple[Threat, ...]:
    from probes.attacks.config import ARMS

    known = {name: threat for threat in ARMS for name in (threat, threat.lower())}
    for name in names:
        if name not in known:
            raise ConfigurationError(f"--threat={name!r} is not one of {list(ARMS)}; pass one.")
    return tuple(dict.fromkeys(known[name] for name in names))


def _arms(names: Sequence[str] | None) -> tuple[AttackArm, ...]:
    from probes.attacks.results import AttackArm

    known: tuple[AttackArm, ...] = get_args(AttackArm)
    for name in names or ():
        if name not in known:
            raise ConfigurationError(f"--arm={name!r} is not one of {list(known)}; pass one.")
    return tuple(arm for arm in known if names is None or arm in names)


def _wanted(options: AttackOptions) -> AttackSet:
    from probes.attacks.behaviours import embedded_behaviours, held_out

    # Halves are taken of twice as many, so that each has the number asked for.
    half = options.half
    drawn = options.count if half == "all" else 2 * options.count
    if options.behaviours is None:
        whole = embedded_behaviours(drawn, seed=options.seed, fold=options.fold)
    else:
        whole = held_out(conversations_of(options.behaviours), drawn)
    if half == "all":
        return whole
    first, second = whole.halves()
    return first if half == "first" else second


def _surrogate(decoder: SafeDecoder, options: AttackOptions) -> DetectorModel:
    from probes.attacks.surrogate import fit_surrogate
    from probes.organism.labelled_data import EmbeddedData

    rows: list[Conversation]
    if options.data is not None:
        # What is attacked comes from the test split, where there is one.
        rows = [row for row in conversations_of(options.data) if row.split != "test"]
    else:
        # The attacker draws for himself: other streams than any split of the bundle.
        source = EmbeddedData(
            seed=options.seed + 50,
            fold=options.fold,
            max_new_tokens=decoder.certificate.envelope.max_new_tokens,
        )
        rows = source.seen(decoder.model, decoder.tokenizer, "fit", 400)
    return fit_surrogate(decoder.model, decoder.tokenizer, rows)


def _tell(
    records: Sequence[Record],
    decoder: SafeDecoder,
    config: AttackConfig,
    *,
    html: Path | None,
    as_json: bool,
) -> None:
    from probes.attacks.results import adequacy, claim, rows_of

    rows = rows_of(records)
    checks = adequacy(records)
    claims = [told for name in config.threats if (told := claim(records, name)) is not None]
    facts = {
        "bundle": decoder.bundle.digest[:12],
        "alpha": f"{decoder.certificate.alpha:g}",
        "population": decoder.certificate.population,
        "certified on": decoder.certificate.evidence.source,
        "redirect": decoder.policy.redirect,
        "hold-back": f"{decoder.policy.holdback_tokens} tokens",
        "samples": str(config.samples),
        "seed": str(config.seed),
    }
    tables = attack_tables(records, rows)
    if html is not None:
        write_text(html, attack_page(records, tables, claims, facts))
    if as_json:
        print_json(
            {
                "facts": facts,
                "rows": rows,
                "adequacy": [check._asdict() for check in checks],
                "claims": claims,
            }
        )
        return
    print_tables(tables)
    for line in (*claims, "; ".join(f"{name}: {value}" for name, value in facts.items())):
        console().print(line, soft_wrap=True)
