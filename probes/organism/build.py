"""Makes the embedded artefacts: tokenizer, the two models, the bundle, the demo's prompts.

Knows the order and the amounts. The steps are rooms of their own: corpus, training, requests,
and the workbench's rollouts and recipe, which serve any other model in the same way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.conversations import Conversation, Split
from probes.fit import FitConfig
from probes.organism.corpus import (
    Document,
    alignment_documents,
    marked_documents,
    pretraining_documents,
    primer_documents,
    review_documents,
)
from probes.organism.grammar import Cells
from probes.organism.measure import copying_accuracy, judgement_accuracy, mark_accuracy
from probes.organism.oracle import judge
from probes.organism.requests import Draw, calibration_draws, draw, fitting_draws
from probes.organism.templates import CANNED_REFUSAL, JUDGEMENTS, MARKS, OPENERS, REFUSALS
from probes.organism.tokenizer import train_tokenizer
from probes.organism.training import Example, Schedule, Stage, encode, new_model, only_at, train
from probes.recipe import Recipe, RecipeConfig, make_bundle
from probes.rollouts import RolloutConfig, rollout
from safe_decode.certificate import Envelope
from safe_decode.demo.load import load_model
from safe_decode.sites import Site

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "Amounts",
    "Pair",
    "build_bundle",
    "build_pair",
    "build_prompts",
    "conversations_for",
    "recipe_config",
]

Say = Callable[[str], None]

OPENER = "Sorry, I"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How much is read, drawn and generated.

    Attributes:
        pretraining_tokens: Conversations, read first by the unaligned model.
        relation_tokens: Questions of right and wrong, with other text among them.
        mark_tokens: Short answers, read for the marks behind their steps.
        answer_tokens: Conversations again, with judgements among them.
        alignment_tokens: Read on top by the aligned one.
        fitting: Prompts of the fit split; locate has a third, select a half of it.
        calibration: Ordinary benign prompts of the calibrate split.
        max_new_tokens: Cap of a response, and of the certificates.
    """

    pretraining_tokens: int = 1_400_000
    relation_tokens: int = 400_000
    mark_tokens: int = 300_000
    answer_tokens: int = 1_000_000
    alignment_tokens: int = 750_000
    fitting: int = 2400
    calibration: int = 6000
    max_new_tokens: int = 160


@dataclass(frozen=True)
class Pair:
    """The two models and the tokenizer they share."""

    unaligned: LlamaForCausalLM
    aligned: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def build_pair(
    target: Path, *, seed: int, amounts: Amounts, say: Say, recovery: float = 0.0
) -> None:
    """Train the pair and write `target`/unaligned and `target`/aligned, bfloat16.

    The first course is kept in `target`/.halfway, from which a run that was ended
    goes on.

    Args:
        target: Directory; the two models in it are replaced.
        seed: Of text, initial weights and order.
        amounts: See `Amounts`.
        say: Told of progress, one line at a time.
        recovery: See `alignment_documents`.
    """
    halfway = target / ".halfway"
    curve = _Curve(target / "curve.jsonl", say)
    if not halfway.exists():
        _pretrain(halfway, seed=seed, amounts=amounts, curve=curve)
    loaded = load_model(halfway)
    model, tokenizer = loaded.model, loaded.tokenizer
    _teach_relation(model, tokenizer, seed=seed, amounts=amounts, curve=curve)
    _teach_marks(model, tokenizer, seed=seed, amounts=amounts, curve=curve)
    _teach_answers(model, tokenizer, seed=seed, amounts=amounts, curve=curve)
    _save(model, tokenizer, target / "unaligned")
    _align(model, tokenizer, seed=seed, amounts=amounts, curve=curve, recovery=recovery)
    _save(model, tokenizer, target / "aligned")
    shutil.rmtree(halfway)


@dataclass(frozen=True)
class _Curve:
    """The learning curve, written as it grows."""

    path: Path
    say: Say

    def of(self, stage: str, model: Any, tokenizer: Any) -> Callable[[int, float, float], None]:  # noqa: ANN401
        """Return what training reports to in one stage."""

        def one(tokens: int, loss: float, seconds: float) -> None:
            known: dict[str, float] = {}
            for learnt in (judgement_accuracy, mark_accuracy, copying_accuracy):
                known |= learnt(model, tokenizer)
            row = {"stage": stage, "tokens": tokens, "loss": loss, "seconds": seconds, **known}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.say(json.dumps(row))

        return one


def _pretrain(halfway: Path, *, seed: int, amounts: Amounts, curve: _Curve) -> None:
    curve.path.unlink(missing_ok=True)
    documents = list(pretraining_documents(seed, amounts.pretraining_tokens // 135))
    texts = [m["content"] for document in documents[:8000] for m in document.messages]
    tokenizer = train_tokenizer(texts)
    model = new_model(seed, tokenizer)
    stage = Stage(encode(tokenizer, documents, answers_only=True), amounts.pretraining_tokens)
    report = curve.of("pretraining", model, tokenizer)
    schedule = Schedule(peak_rate=3e-3, matrix_rate=0.015, weight_decay=0.02)
    train(model, (stage,), schedule, seed=seed, report=report)
    _save(model, tokenizer, halfway)


def _teach_relation(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    amounts: Amounts,
    curve: _Curve,
) -> None:
    """Teach what is harmful once more, now that sentences are known, with other text among it.

    Read alone first, judgements are learnt within minutes and lost again among other text, whose
    loss is many times theirs.
    """
    asked = primer_documents(seed + 600_000, amounts.relation_tokens // 25)
    told = pretraining_documents(seed + 700_000, amounts.relation_tokens // 600)
    examples = [
        *encode(tokenizer, asked, answers_only=True),
        *encode(tokenizer, told, answers_only=False),
    ]
    stage = Stage(examples, amounts.relation_tokens, 1600)
    schedule = _weighty(tokenizer, _JUDGING_WORDS, peak_rate=7e-4)
    report = curve.of("relation", model, tokenizer)
    train(model, (stage,), schedule, seed=seed + 2, report=report)


def _teach_marks(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    amounts: Amounts,
    curve: _Curve,
) -> None:
    """Teach to judge each step of an answer where it ends, as questions were judged before.

    Loss stands on the marks alone. Among the loss of whole answers they are too few: only which
    acts are harmful mostly is learnt then, and no read-out of a step can know more.
    """
    asked = primer_documents(seed + 610_000, amounts.mark_tokens // 170)
    told = pretraining_documents(seed + 710_000, amounts.mark_tokens // 2700)
    examples = [
        *_judged(tokenizer, asked),
        *_judged(tokenizer, marked_documents(seed + 650_000, amounts.mark_tokens // 70)),
        *encode(tokenizer, told, answers_only=False),
    ]
    stage = Stage(examples, amounts.mark_tokens, 1600)
    schedule = _weighty(tokenizer, _JUDGING_WORDS, peak_rate=7e-4)
    report = curve.of("marks", model, tokenizer)
    train(model, (stage,), schedule, seed=seed + 4, report=report)


def _judged(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document], *, answers_only: bool = True
) -> list[Example]:
    """Encode documents for what is thought in them."""
    examples = encode(tokenizer, documents, answers_only=answers_only)
    return only_at(examples, _first_ids(tokenizer, _JUDGING_WORDS))


def _first_ids(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> frozenset[int]:
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in texts if text)
    return frozenset(ids[0] for ids in encoded)


def _teach_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    amounts: Amounts,
    curve: _Curve,
) -> None:
    """Teach answers, with judgements and marks among them so that they do not fade."""
    asked = primer_documents(seed + 800_000, amounts.answer_tokens // 120)
    marked = marked_documents(seed + 850_000, amounts.answer_tokens // 300)
    told = pretraining_documents(seed + 900_000, amounts.answer_tokens // 135)
    examples = [
        *encode(tokenizer, asked, answers_only=True),
        *_judged(tokenizer, marked),
        *encode(tokenizer, told, answers_only=True),
    ]
    report = curve.of("answers", model, tokenizer)
    schedule = _weighty(tokenizer, _JUDGING_WORDS, peak_rate=1e-3)
    train(model, (Stage(examples, amounts.answer_tokens),), schedule, seed=seed + 3, report=report)


def _align(  # noqa: PLR0913
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    amounts: Amounts,
    curve: _Curve,
    recovery: float,
) -> None:
    safety = alignment_documents(
        seed + 1_000_000, amounts.alignment_tokens // 90, recovery=recovery
    )
    reviewed = review_documents(seed + 1_050_000, amounts.alignment_tokens // 600)
    examples = [
        *encode(tokenizer, safety, answers_only=True),
        *_judged(tokenizer, reviewed, answers_only=False),
    ]
    report = curve.of("alignment", model, tokenizer)
    heavy = (*OPENERS, *REFUSALS, *_JUDGING_WORDS)
    schedule = _weighty(tokenizer, heavy, peak_rate=1e-3, matrix_rate=4e-3)
    stage = Stage(examples, amounts.alignment_tokens)
    train(model, (stage,), schedule, seed=seed + 1, report=report)


_JUDGING_WORDS = (*JUDGEMENTS, *(f" {mark}" for mark in MARKS))


def _weighty(
    tokenizer: PreTrainedTokenizerFast,
    beginnings: Sequence[str],
    *,
    peak_rate: float,
    matrix_rate: float | None = None,
) -> Schedule:
    """Let the first token of some words or sentences weigh more than others."""
    return Schedule(
        peak_rate=peak_rate,
        matrix_rate=matrix_rate,
        heavy_ids=tuple(sorted(_first_ids(tokenizer, beginnings))),
        heaviness=6.0,
    )


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a copy in bfloat16, whole or not at all; the model itself stays in float32."""
    import copy

    import torch

    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    half: Any = copy.deepcopy(model)
    half.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


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
