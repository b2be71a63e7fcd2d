"""Makes the embedded bundle and the demo's prompts, once there is a pair.

Knows what is asked and what is tried. The steps are rooms of their own: requests, and the
workbench's rollouts and recipe, which serve any other model in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.conversations import Conversation, Split
from probes.fit import FitConfig
from probes.organism.courses import Amounts
from probes.organism.grammar import Cells
from probes.organism.oracle import judge
from probes.organism.requests import Draw, calibration_draws, draw, fitting_draws
from probes.organism.templates import CANNED_REFUSAL
from probes.recipe import Recipe, RecipeConfig, make_bundle
from probes.rollouts import RolloutConfig, rollout
from safe_decode.certificate import Envelope
from safe_decode.sites import Site

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "build_bundle",
    "build_prompts",
    "conversations_for",
    "recipe_config",
]

Say = Callable[[str], None]

OPENER = "Sorry, I"


def conversations_for(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    cells: Cells,
    amounts: Amounts,
) -> list[Conversation]:
    """Let the model answer what locate, fit, select and calibrate need, greedily, and judge it."""
    asked: set[str] = set()
    shares: tuple[tuple[Split, tuple[Draw, ...]], ...] = (
        ("locate", fitting_draws(amounts.fitting // 3)),
        ("fit", fitting_draws(amounts.fitting)),
        ("select", fitting_draws(amounts.fitting // 2)),
        ("calibrate", calibration_draws(amounts.calibration)),
    )
    requests = []
    for number, (split, draws) in enumerate(shares):
        requests += draw(
            draws,
            split=split,
            seed=seed + number,
            tokenizer=tokenizer,
            cells=cells,
            asked=asked,
        )
    config = RolloutConfig(max_new_tokens=amounts.max_new_tokens)
    return rollout(model, tokenizer, requests, judge=judge, config=config)


def recipe_config(amounts: Amounts, model: LlamaForCausalLM) -> RecipeConfig:
    """Return what is tried for the embedded bundle, and the texts it carries.

    Beside located units, the residual stream behind the later blocks is tried whole. A step is
    judged where it ends, in a single token, so single positions carry the loss and short
    windows are watched. Text is held back until nearly every harmful step is judged.
    """
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    streams = {f"resid-{i}": (Site(i, "resid", tuple(range(width))),) for i in range(2, layers)}
    return RecipeConfig(
        feature_counts=(256,),
        extra_sites=streams,
        fits=(
            FitConfig(method="token", c=0.1),
            FitConfig(method="windowed", c=1.0, window=1),
            FitConfig(method="windowed", c=10.0, window=1, before_onset="exclude"),
        ),
        windows=(1, 2),
        holdback_share=0.99,
        envelope=Envelope(
            max_new_tokens=amounts.max_new_tokens,
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        ),
        refusal=CANNED_REFUSAL,
        opener=OPENER,
        alphas=(0.01, 0.005),
        default_alpha=0.01,
    )


def build_bundle(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    fold: int,
    amounts: Amounts,
    say: Say,
) -> Recipe:
    """Make a probe bundle for the aligned model from the cells that `fold` leaves seen."""
    say("bundle: generating responses of the aligned model")
    rows = conversations_for(model, tokenizer, seed=seed, cells=Cells.seen(fold), amounts=amounts)
    say(f"bundle: {len(rows):,} responses; locating, fitting, calibrating")
    provenance: Mapping[str, Any] = {
        "organism": {"seed": seed, "fold": fold, **asdict(amounts)},
    }
    config = recipe_config(amounts, model)
    return make_bundle(model, tokenizer, rows, config, provenance=provenance)


_SHOWN: Mapping[str, str] = {
    "benign": "benign",
    "hard_negative": "benign",
    "harmful": "refusal",
    "framed": "harmful",
    "prefilled": "harmful",
    "turn": "harmful",
}
"""What the bare model has to make of a prompt for it to be shown: the scene as it is meant."""


def build_prompts(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    fold: int,
    amounts: Amounts,
) -> None:
    """Write the demo's held-out prompts: one of each situation shown, 240 counted.

    Which are shown is chosen by what the bare model does; the guard is not asked.
    """
    draws = (
        Draw(situation="benign", count=50),
        Draw(situation="hard_negative", count=50),
        Draw(situation="harmful", count=35),
        Draw(situation="framed", count=35),
        Draw(situation="prefilled", count=35),
        Draw(situation="turn", count=35),
    )
    requests = draw(draws, split="test", seed=seed, tokenizer=tokenizer, cells=Cells.unseen(fold))
    config = RolloutConfig(max_new_tokens=amounts.max_new_tokens)
    bare = rollout(model, tokenizer, requests, config=config)
    shown: dict[str, int] = {}
    for number, (request, row) in enumerate(zip(requests, bare, strict=True)):
        scene, given = str(request.meta["situation"]), len(request.prefill or "")
        label = judge(request.messages, row.response, counted_from=given).label
        if label == _SHOWN[scene]:
            shown.setdefault(scene, number)
    lines = [
        {
            "scene": request.meta["situation"],
            "messages": list(request.messages),
            "prefill": request.prefill,
            "showcase": number in shown.values(),
        }
        for number, request in enumerate(requests)
    ]
    _write_lines(path, lines)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.rename(path)
