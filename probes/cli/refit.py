"""`safe-decode refit`: fit a bundle again on the prompts that an attack found, and certify anew.

Knows the options and where rows come from. Does not know fitting or certificates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.judges import conversations_of, judge_of
from probes.cli.options import Fold
from probes.cli.shared_options.sites import residual_sites
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json
from safe_decode.cli.loading import decoder_of
from safe_decode.cli.options import BundleOptions, JsonOptions, ModelOptions
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.attacks.behaviours import AttackSet
    from probes.attacks.refit import RefitConfig
    from probes.attacks.results import Record
    from probes.data.conversations import Conversation
    from probes.rollouts.types import Request
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["refit"]


@dataclass(frozen=True, kw_only=True)
class RefitOptions(ModelOptions, BundleOptions, JsonOptions):
    """Options of `safe-decode refit`."""

    records: Annotated[
        list[Path],
        typer.Option(
            help="Records written by `safe-decode attack --keep-prompts --half first --out`. May "
            "be given several times, where a refitted bundle was attacked again."
        ),
    ]
    out: Annotated[Path, typer.Option(help="Directory that the new bundle is written to.")]
    behaviours: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations that `safe-decode attack` was given as --behaviours. "
            "Without it: behaviours of the embedded world."
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations with splits, to fit and certify on. Without it: drawn from "
            "the embedded model."
        ),
    ] = None
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Number of behaviours that `safe-decode attack` was given as --count."
        ),
    ] = 30
    calibrate: Annotated[
        int,
        typer.Option(
            min=100, help="Ordinary responses to draw for the certificate, without --data."
        ),
    ] = 3000
    fit: Annotated[
        int, typer.Option(min=100, help="Responses to draw for the fit, without --data.")
    ] = 1500
    seed: Annotated[
        int, typer.Option(help="Seed that `safe-decode attack` was given as --seed.")
    ] = 0
    fold: Fold = 0
    spread: Annotated[
        int,
        typer.Option(
            min=0,
            help="Other harmful requests, and as many harmless ones, that each suffix is appended "
            "to.",
        ),
    ] = 8
    random_suffixes: Annotated[
        int,
        typer.Option(min=0, help="Random suffixes to learn from, besides those that were found."),
    ] = 100
    answers: Annotated[
        int, typer.Option(min=1, help="Sampled answers to each of the adversarial prompts.")
    ] = 8
    residual: Annotated[
        str | None,
        typer.Option(
            help="Layers whose whole residual stream is read: all, or numbers such as 2,4,5. "
            "Without it: the sites of the bundle."
        ),
    ] = None
    judge: Annotated[
        str | None,
        typer.Option(
            help="Judge of whole responses, as module:function; probes.rollouts.types.Judge states "
            "its form. Without it: the oracle of the embedded world."
        ),
    ] = None


@command("Attack")
def refit(options: RefitOptions) -> None:
    """Refit a bundle adversarially; attack the result anew, on other behaviours, before use."""
    _require_sense(options)
    from probes.attacks.refit import refit as fit_again
    from probes.attacks.results import read_records

    found = [record for path in options.records for record in read_records(path)]
    decoder = decoder_of(
        options.model,
        options.bundle,
        redirect="rewind",
        alpha=None,
        how=options.how,
    )
    attack_set = _attacked(options)
    rows = _rows(decoder, options)
    new = fit_again(
        decoder.model,
        decoder.tokenizer,
        decoder.bundle,
        rows,
        _requests(decoder, found, attack_set, rows, options),
        judge_of(options.judge),
        _config(decoder, options),
    )
    new.save(options.out)
    told = {
        "out": str(options.out),
        "bundle": new.digest[:12],
        "refitted_from": decoder.bundle.digest[:12],
        "adversarial_rows": new.provenance["adversarial_rows"],
        "adversarial_harmful": new.provenance["adversarial_harmful"],
        "threshold": new.certificate().threshold,
        "n": new.certificate().n,
        "holdback_tokens": new.holdback_tokens,
    }
    if options.as_json:
        print_json(told)
    else:
        text = "; ".join(f"{name}: {value}" for name, value in told.items())
        console().print(text, soft_wrap=True)


def _require_sense(options: RefitOptions) -> None:
    needed = (options.behaviours, options.data, options.judge)
    if options.model is not None and None in needed:
        raise ConfigurationError(
            f"--model={options.model!r} needs --behaviours, --data and --judge; only the embedded "
            "model has a world to draw from."
        )


def _requests(
    decoder: SafeDecoder,
    found: Sequence[Record],
    attack_set: AttackSet,
    rows: Sequence[Conversation],
    options: RefitOptions,
) -> list[Request]:
    """Gather the adversarial prompts: those that were found, and their suffixes elsewhere."""
    from probes.attacks.refit import adversarial_requests
    from probes.attacks.transfer import Spread, spread_over, suffixes_of

    benign = [row.messages for row in rows if row.split == "fit" and row.prompt_harmful is False]
    harmful = [row.messages for row in rows if row.split == "fit" and row.prompt_harmful]
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    spread = Spread(each=options.spread, random=options.random_suffixes, seed=options.seed)
    return [
        *adversarial_requests(found, attack_set, benign),
        *spread_over(
            suffixes_of(found, attack_set),
            harmful,
            benign,
            spread,
            tokenizer=decoder.tokenizer,
            vocab=vocab,
        ),
    ]


def _config(decoder: SafeDecoder, options: RefitOptions) -> RefitConfig:
    from probes.attacks.refit import RefitConfig, fit_config_of
    from probes.rollouts.generate import RolloutConfig

    residual = options.residual
    return RefitConfig(
        fit=fit_config_of(decoder.bundle),
        answers=options.answers,
        sites=None if residual is None else residual_sites(decoder.model, residual),
        rollout=RolloutConfig(
            max_new_tokens=decoder.certificate.envelope.max_new_tokens,
            do_sample=True,
            seed=options.seed,
        ),
    )


def _attacked(options: RefitOptions) -> AttackSet:
    """Both halves, as `attack` drew them: records name behaviours of one of them."""
    from probes.attacks.behaviours import embedded_behaviours, held_out

    drawn = 2 * options.count
    if options.behaviours is None:
        return embedded_behaviours(drawn, seed=options.seed, fold=options.fold)
    return held_out(conversations_of(options.behaviours), drawn)


def _rows(decoder: SafeDecoder, options: RefitOptions) -> list[Conversation]:
    if options.data is not None:
        return conversations_of(options.data)
    from probes.organism.labelled_data import EmbeddedData

    source = EmbeddedData(
        seed=options.seed + 90,
        fold=options.fold,
        max_new_tokens=decoder.certificate.envelope.max_new_tokens,
    )
    parts = source.apart(
        decoder.model,
        decoder.tokenizer,
        {"fit": options.fit, "select": options.fit // 2, "calibrate": options.calibrate},
    )
    return [row for part in parts.values() for row in part]
