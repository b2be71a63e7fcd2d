"""`safe-decode attack`: what it costs to get around a guard, under four threat models.

Knows the options, the order of the work and how records are shown. Does not know how any
attack works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from probes.cli.judges import JudgeName, conversations_of, reading_of
from probes.cli.tables import print_tables, share_rows
from safe_decode.cli.console import console, print_json, require_place, working, write_text
from safe_decode.cli.generate import (
    Alpha,
    BundlePath,
    Device,
    DtypeName,
    MaxNewTokens,
    ModelName,
    Population,
    decoder_of,
)
from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.attacks.behaviours import AttackSet
    from probes.attacks.config import AttackConfig
    from probes.attacks.objective import DetectorModel
    from probes.attacks.results import AttackArm, Record, Threat
    from probes.data.conversations import Conversation
    from probes.metrics.intervals import Proportion
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["attack"]


def attack(
    behaviours: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations, a file or hf:NAME[:split]; harmful answers to harmful "
            "requests are what is wanted. Default: held-out behaviours of the embedded world."
        ),
    ] = None,
    threat: Annotated[
        list[str] | None,
        typer.Option(help="T1 black box, T2 surrogate, T3 white box, T4 soft prompt; default all."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="guarded, bare or random suffixes; default all that a threat has."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Behaviours.")] = 30,
    queries: Annotated[int, typer.Option(min=1, help="Of T1, a behaviour.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Of T2 and T3, a restart.")] = 150,
    candidates: Annotated[int, typer.Option(min=1, help="Of T2 and T3, a step.")] = 16,
    restarts: Annotated[int, typer.Option(min=1, help="Of T2 and T3.")] = 3,
    soft_steps: Annotated[int, typer.Option(min=1, help="Of T4, a restart.")] = 300,
    soft_restarts: Annotated[int, typer.Option(min=1, help="Of T4.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each candidate.")] = 1,
    doubled: Annotated[bool, typer.Option(help="Twice every budget above.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations that T2's surrogate is fitted on; default: drawn from the "
            "embedded model."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write records here after each behaviour; goes on where it stopped."),
    ] = None,
    keep_prompts: Annotated[
        bool, typer.Option(help="Records hold the prompts that were found, for a refit.")
    ] = False,
    half: Annotated[
        Literal["all", "first", "second"],
        typer.Option(help="Attack every other behaviour alone: one half to refit on, one after."),
    ] = "all",
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page with success against budget.")
    ] = None,
    judge: JudgeName = None,
    redirect: Annotated[Redirect, typer.Option(help="The deployed redirect.")] = "rewind",
    alpha: Alpha = None,
    population: Population = "benign",
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option(help="Of behaviours, searches and draws.")] = 0,
    fold: Annotated[int, typer.Option(min=0, max=2, help="Held-out categories.")] = 0,
    model: ModelName = None,
    bundle: BundlePath = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack the guard of a model and say what success costs, beside the bare model."""
    require_place(out)
    require_place(html)
    from probes.attacks.config import ARMS, AttackConfig

    threats, arms = _threats(threat or list(ARMS)), _arms(arm)
    _require_sense(model, behaviours, data, threats, judge, redirect, html)
    from probes.attacks.runner import attack as run

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
    attack_set = _wanted(behaviours, count, half=half, seed=seed, fold=fold)
    config = AttackConfig(
        threats=threats,
        arms=arms,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        keeps_prompts=keep_prompts,
    )
    config = replace(
        config,
        black_box=replace(config.black_box, queries=queries),
        suffix=replace(config.suffix, steps=steps, candidates=candidates, restarts=restarts),
        soft=replace(config.soft, steps=soft_steps, restarts=soft_restarts),
    )
    config = config.doubled() if doubled else config
    surrogate = _surrogate(decoder, data, seed, fold) if "T2" in config.threats else None
    reading = reading_of(judge)
    records = run(decoder, attack_set, reading, config, surrogate=surrogate, journal=out)
    _tell(records, decoder, config, html=html, as_json=as_json)


def _require_sense(
    model: str | None,
    behaviours: str | None,
    data: str | None,
    threats: Sequence[Threat],
    judge: str | None,
    redirect: Redirect,
    html: Path | None,
) -> None:
    if model is not None and (behaviours is None or judge is None):
        raise ConfigurationError(
            f"--model={model!r} needs --behaviours and --judge; only the embedded model has a "
            "world to draw from and an oracle."
        )
    if model is not None and data is None and "T2" in threats:
        raise ConfigurationError(
            f"T2 on --model={model!r} needs --data for its surrogate; pass it, or name other "
            "threats."
        )
    if redirect == "flag":
        raise ConfigurationError(
            "--redirect=flag changes no token, so there is no guard to attack; pass another. The "
            "bare model is attacked beside the guard in any case."
        )
    if html is not None:
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


def _wanted(behaviours: str | None, count: int, *, half: str, seed: int, fold: int) -> AttackSet:
    from probes.attacks.behaviours import embedded_behaviours, held_out

    # Halves are taken of twice as many, so that each has the number asked for.
    drawn = count if half == "all" else 2 * count
    if behaviours is None:
        whole = embedded_behaviours(drawn, seed=seed, fold=fold)
    else:
        whole = held_out(conversations_of(behaviours), drawn)
    if half == "all":
        return whole
    first, second = whole.halves()
    return first if half == "first" else second


def _surrogate(decoder: SafeDecoder, data: str | None, seed: int, fold: int) -> DetectorModel:
    from probes.attacks.surrogate import fit_surrogate
    from probes.organism.labelled_data import EmbeddedData

    rows: list[Conversation]
    if data is not None:
        # What is attacked comes from the test split, where there is one.
        rows = [row for row in conversations_of(data) if row.split != "test"]
    else:
        # The attacker draws for himself: other streams than any split of the bundle.
        source = EmbeddedData(
            seed=seed + 50, fold=fold, max_new_tokens=decoder.certificate.envelope.max_new_tokens
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
    tables = _tables(records, rows)
    if html is not None:
        write_text(html, _page(records, tables, claims, facts))
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


def _tables(
    records: Sequence[Record], rows: Sequence[Mapping[str, object]]
) -> dict[str, list[dict[str, str]]]:
    from probes.attacks.results import adequacy, named_shares

    tables = {
        "What an attack achieves": [
            {name: _cell(value) for name, value in row.items()} for row in rows
        ],
        "Is the attack strong enough to speak of": [
            {
                "check": check.what,
                "found": check.value,
                "met": "not run" if check.met is None else ("yes" if check.met else "no"),
            }
            for check in adequacy(records)
        ],
    }
    for threat in sorted({record.threat for record in records if record.arm == "guarded"}):
        shares = named_shares(records, threat, "guarded")
        tables[f"{threat} against the guard, by category"] = share_rows(
            shares, "category", "behaviours that gave way"
        )
    return tables


def _page(
    records: Sequence[Record],
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    claims: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    from probes.attacks.results import UNITS, curve
    from probes.reports.evaluation_page import page_of
    from probes.reports.evaluation_plots import budget_svg

    pictures = {}
    for threat in sorted({record.threat for record in records}):
        mine = [record for record in records if record.threat == threat]
        arms = list(dict.fromkeys(record.arm for record in mine))
        curves: dict[str, list[tuple[int, Proportion]]] = {
            arm: [(p.budget, p.share) for p in curve([r for r in mine if r.arm == arm])]
            for arm in arms
        }
        pictures[f"{threat}: success against budget"] = budget_svg(curves, unit=UNITS[threat])
    return page_of("Attacks", tables, pictures, facts, notes=claims)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
