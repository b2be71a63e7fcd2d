"""The rows of a build: the model's own answers, and what others wrote, read as far.

Knows how the model is asked and where its answers are kept. Does not know probes.
"""

from __future__ import annotations

from dataclasses import replace

from probes.activations.teacher_forcing import encode_response, within_context
from probes.building.material import Material
from probes.building.recipe import BuildRecipe
from probes.building.workplace import Workplace
from probes.data.conversations import Conversation, read_jsonl
from probes.rollouts.generate import RolloutConfig
from probes.rollouts.judges import RowJudge
from probes.rollouts.resume import rollout_to, with_room
from safe_decode.loading import Loaded

__all__ = ["judged_rows", "rollout_config", "up_to"]

_PART = 128
"""Answers that an interruption can cost at most."""


def rollout_config(recipe: BuildRecipe) -> RolloutConfig:
    """Return how the model answers."""
    asked = recipe.answers
    return RolloutConfig(
        max_new_tokens=asked.max_new_tokens,
        do_sample=asked.temperature > 0,
        temperature=asked.temperature or 1.0,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=recipe.seed,
        batch_size=asked.batch_size,
    )


def judged_rows(
    own: Loaded, recipe: BuildRecipe, material: Material, work: Workplace, judge: RowJudge
) -> list[Conversation]:
    """Return all judged rows: what others wrote, read up to the cap, and the model's answers.

    Args:
        own: The protected model with its tokenizer.
        recipe: How it is asked.
        material: What it is asked, and what others wrote.
        work: Where its answers are kept; a run that was ended goes on there.
        judge: Labels its answers.
    """
    cap = recipe.answers.max_new_tokens
    answers = _answers(own, recipe, material, work, judge)
    labelled = [up_to(own, row, cap) for row in material.labelled]
    labelled = within_context(own.model, own.tokenizer, labelled)
    return [row for row in (*labelled, *answers) if row.response_harmful is not None]


def _answers(
    own: Loaded, recipe: BuildRecipe, material: Material, work: Workplace, judge: RowJudge
) -> list[Conversation]:
    path = work.path("answers.jsonl")
    if path.exists():  # written whole, and of this build: the work directory says so
        return read_jsonl(path)
    cap = recipe.answers.max_new_tokens
    return rollout_to(
        path,
        own.model,
        own.tokenizer,
        with_room(own.model, own.tokenizer, material.requests, cap),
        judge=judge,
        config=rollout_config(recipe),
        judged_at_once=recipe.labels.at_once if recipe.labels.judge.startswith("http") else 1,
        responses_per_part=_PART,
    ).conversations


def up_to(own: Loaded, row: Conversation, cap: int) -> Conversation:
    """Cut a response where an answer of the model would be cut, at `cap` tokens."""
    encoded = encode_response(own.tokenizer, row)
    ids = encoded.ids[encoded.turn_start :]
    if len(ids) <= cap:
        return row
    text = own.tokenizer.decode(list(ids[:cap]), clean_up_tokenization_spaces=False)
    onset = row.onset_char if row.onset_char is not None and row.onset_char < len(text) else None
    return replace(
        row, response=text, response_ids=ids[:cap], prefill_tokens=0, ended=None, onset_char=onset
    )
