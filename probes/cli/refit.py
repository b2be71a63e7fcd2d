"""`safe-decode refit`: fit a bundle again on the prompts that an attack found, and certify anew.

Knows the options and where rows come from. Does not know fitting or certificates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.harvest import residual_sites
from probes.cli.judges import conversations_of, judge_of
from safe_decode.cli.console import console, print_json, working
from safe_decode.cli.generate import (
    BundlePath,
    Device,
    DtypeName,
    ModelName,
    decoder_of,
)
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.attacks.behaviours import AttackSet
    from probes.data.conversations import Conversation
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["refit"]


def refit(
    records: Annotated[
        list[Path],
        typer.Option(
            help="Written by `attack --keep-prompts --half first --out`; several, where what was "
            "refitted has been attacked again."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the new bundle.")],
    behaviours: Annotated[
        str | None, typer.Option(help="What was attacked, as given to `attack`.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Judged conversations with splits; default: drawn from the embedded model."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Behaviours, as given to `attack`.")] = 30,
    calibrate: Annotated[
        int, typer.Option(min=100, help="Ordinary responses for the certificate, where drawn.")
    ] = 3000,
    fit: Annotated[int, typer.Option(min=100, help="Responses to fit on, where drawn.")] = 1500,
    seed: Annotated[int, typer.Option(help="As given to `attack`.")] = 0,
    fold: Annotated[int, typer.Option(min=0, max=2, help="As given to `attack`.")] = 0,
    spread: Annotated[
        int,
        typer.Option(
            min=0, help="Other harmful requests to put each suffix behind, and as many harmless."
        ),
    ] = 8,
    random_suffixes: Annotated[
        int, typer.Option(min=0, help="Suffixes drawn by lot to learn from, beside those found.")
    ] = 100,
    answers: Annotated[
        int, typer.Option(min=1, help="How often each of these prompts is answered, sampled.")
    ] = 8,
    residual: Annotated[
        str | None,
        typer.Option(
            help="Whole residual layers to read instead of the bundle's sites: all, or 2,4."
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="module:function, of whole responses; see rollouts.Judge.")
    ] = None,
    model: ModelName = None,
    bundle: BundlePath = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Refit a bundle adversarially; attack the result anew, on other behaviours, before use."""
    if model is not None and (behaviours is None or data is None or judge is None):
        raise ConfigurationError(
            f"--model={model!r} needs --behaviours, --data and --judge; only the embedded model "
            "has a world to draw from."
        )
    from probes.attacks.refit import RefitConfig, adversarial_requests, fit_config_of
    from probes.attacks.refit import refit as fit_again
    from probes.attacks.results import read_records
    from probes.attacks.transfer import Spread, spread_over, suffixes_of
    from probes.rollouts.generate import RolloutConfig

    found = [record for path in records for record in read_records(path)]
    with working("Loading the model"):
        decoder = decoder_of(
            model, bundle, redirect="rewind", alpha=None, device=device, dtype=dtype
        )
    attack_set = _attacked(behaviours, count, seed=seed, fold=fold)
    rows = _rows(decoder, data, fit=fit, calibrate=calibrate, seed=seed, fold=fold)
    benign = [row.messages for row in rows if row.split == "fit" and row.prompt_harmful is False]
    harmful = [row.messages for row in rows if row.split == "fit" and row.prompt_harmful]
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    requests = [
        *adversarial_requests(found, attack_set, benign),
        *spread_over(
            suffixes_of(found, attack_set),
            harmful,
            benign,
            Spread(each=spread, random=random_suffixes, seed=seed),
            tokenizer=decoder.tokenizer,
            vocab=vocab,
        ),
    ]
    new = fit_again(
        decoder.model,
        decoder.tokenizer,
        decoder.bundle,
        rows,
        requests,
        judge_of(judge),
        RefitConfig(
            fit=fit_config_of(decoder.bundle),
            answers=answers,
            sites=None if residual is None else residual_sites(decoder.model, residual),
            rollout=RolloutConfig(
                max_new_tokens=decoder.certificate.envelope.max_new_tokens,
                do_sample=True,
                seed=seed,
            ),
        ),
    )
    new.save(out)
    told = {
        "out": str(out),
        "bundle": new.digest[:12],
        "refitted_from": decoder.bundle.digest[:12],
        "adversarial_rows": new.provenance["adversarial_rows"],
        "adversarial_harmful": new.provenance["adversarial_harmful"],
        "threshold": new.certificate().threshold,
        "n": new.certificate().n,
        "holdback_tokens": new.holdback_tokens,
    }
    if as_json:
        print_json(told)
    else:
        text = "; ".join(f"{name}: {value}" for name, value in told.items())
        console().print(text, soft_wrap=True)


def _attacked(behaviours: str | None, count: int, *, seed: int, fold: int) -> AttackSet:
    """Both halves, as `attack` drew them: records name behaviours of one of them."""
    from probes.attacks.behaviours import embedded_behaviours, held_out

    if behaviours is None:
        return embedded_behaviours(2 * count, seed=seed, fold=fold)
    return held_out(conversations_of(behaviours), 2 * count)


def _rows(
    decoder: SafeDecoder, data: str | None, *, fit: int, calibrate: int, seed: int, fold: int
) -> list[Conversation]:
    if data is not None:
        return conversations_of(data)
    from probes.organism.labelled_data import EmbeddedData

    source = EmbeddedData(
        seed=seed + 90, fold=fold, max_new_tokens=decoder.certificate.envelope.max_new_tokens
    )
    parts = source.apart(
        decoder.model,
        decoder.tokenizer,
        {"fit": fit, "select": fit // 2, "calibrate": calibrate},
    )
    return [row for part in parts.values() for row in part]
