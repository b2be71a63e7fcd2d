"""Teacher-forced forwards over finished responses, and the activations read in them.

The positions are those of serving: s_0 at the last template token, s_{t+1} at content
token t; the end-of-sequence token is no content and is not run.

Knows encoding, batching and where positions lie in a padded batch. Does not know what
is done with the activations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.data.conversations import Conversation
from probes.runs.progress import progress
from safe_decode.activations.site import Site
from safe_decode.activations.tap import ActivationTap
from safe_decode.errors import ConfigurationError, DataError, PromptError
from safe_decode.prompts.chat import encode_chat
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "EncodedResponse",
    "FeatureBatch",
    "encode_response",
    "left_padded",
    "PaddedBatch",
    "onset_token",
    "padded_batches",
    "teacher_forced",
    "visit_activations",
    "within_context",
]

TOKENS_PER_BATCH = 4096  # beyond it a small model on a CPU falls out of the cache


class EncodedResponse(NamedTuple):
    """Prompt and response as one sequence.

    Attributes:
        ids: Template, prompt and content tokens, without end of sequence.
        turn_start: Index of the first content token.
    """

    ids: tuple[int, ...]
    turn_start: int

    @property
    def n_scores(self) -> int:
        """Count the scores of the response: its content tokens and one more."""
        return len(self.ids) - self.turn_start + 1


class PaddedBatch(NamedTuple):
    """Some responses as arguments of a forward.

    Attributes:
        rows: Which of the encoded responses.
        inputs: Left-padded, on the model's device, for one forward without a cache.
        n_scores: T + 1 of each row.
    """

    rows: tuple[int, ...]
    inputs: dict[str, Any]
    n_scores: tuple[int, ...]


class FeatureBatch(NamedTuple):
    """Activations of some responses.

    Attributes:
        rows: Which of the encoded responses, in the order of the batch.
        features: [batch, positions, F] float32; the scores of a row stand at its right end.
        n_scores: T + 1 of each row.
    """

    rows: tuple[int, ...]
    features: Tensor
    n_scores: tuple[int, ...]

    def of(self, index: int) -> Tensor:
        """Return the activations of one row of the batch, [T + 1, F], a view."""
        return self.features[index, -self.n_scores[index] :]


def encode_response(tokenizer: Tokenizer, conversation: Conversation) -> EncodedResponse:
    """Encode a conversation with its response.

    The generated ids are used where the conversation has them; text alone is tokenised
    as a prefill of the assistant's turn, which may yield other ids than were generated.
    """
    if conversation.response_ids is None:
        chat = encode_chat(tokenizer, conversation.messages, prefill=conversation.response or None)
        return EncodedResponse(tuple(chat.ids), chat.turn_start)
    chat = encode_chat(tokenizer, conversation.messages, prefill=None)
    return EncodedResponse((*chat.ids, *conversation.response_ids), chat.turn_start)


def within_context(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
) -> list[Conversation]:
    """Keep the conversations that fit the model's context whole."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return list(conversations)
    return [row for row in conversations if len(encode_response(tokenizer, row).ids) <= limit]


def onset_token(
    tokenizer: Tokenizer,
    conversation: Conversation,
    encoded: EncodedResponse,
) -> int | None:
    """Find the content token that holds the onset character; None without an onset.

    Raises:
        DataError: The tokens decode to a text that ends before the onset.
    """
    if conversation.onset_char is None:
        return None
    content = list(encoded.ids[encoded.turn_start :])
    low, high = 1, len(content)
    while low < high:  # the fewest tokens whose text reaches beyond the onset character
        middle = (low + high) // 2
        if len(_decoded(tokenizer, content[:middle])) > conversation.onset_char:
            high = middle
        else:
            low = middle + 1
    if not content or len(_decoded(tokenizer, content)) <= conversation.onset_char:
        raise DataError(
            f"onset_char={conversation.onset_char} lies beyond the text of the response_ids of "
            f"group {conversation.group!r}; they do not spell the response."
        )
    return low - 1


def teacher_forced(
    model: CausalLM,
    sites: Sequence[Site],
    encoded: Sequence[EncodedResponse],
    *,
    description: str,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[FeatureBatch]:
    """Run responses through the model and yield their activations, batch by batch.

    Batches are left-padded and hold rows of similar length, so they come in the order of
    length, not of `encoded`. Memory is bounded by `tokens_per_batch` times the features.

    Args:
        model: A causal language model in eval mode.
        sites: Where to read.
        encoded: Prompt and response ids.
        description: What the progress display says.
        tokens_per_batch: Padded tokens of a batch; a longer row gets a batch of its own.

    Raises:
        ConfigurationError: The model is in training mode.
        PromptError: A response is longer than the model's context.
    """
    tap = ActivationTap(model, sites)
    with progress(description, len(encoded)) as advance:
        for batch in padded_batches(model, encoded, tokens_per_batch=tokens_per_batch):
            with tap.listening() as beats, torch.inference_mode():
                beats.keep_last(max(batch.n_scores))
                model(**batch.inputs)
                features = beats.take()
            yield FeatureBatch(batch.rows, features, batch.n_scores)
            advance(len(batch.rows))


def visit_activations(
    model: CausalLM,
    sites: Sequence[Site],
    encoded: Sequence[EncodedResponse],
    visit: Callable[[PaddedBatch, int, Tensor], None],
    *,
    description: str,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> None:
    """Run responses through the model and show their activations, uncopied.

    Arguments and errors are those of `teacher_forced`. `visit` is called with the batch, the
    index of a site in `sorted_sites` and its channels, [batch, seq, n] in the model's dtype,
    padding and prompt included, not to be changed or kept.
    """
    tap = ActivationTap(model, sites)
    with progress(description, len(encoded)) as advance:
        for batch in padded_batches(model, encoded, tokens_per_batch=tokens_per_batch):
            with tap.visiting(partial(visit, batch)) as visits, torch.inference_mode():
                model(**batch.inputs)
                visits.require_one_each()
            advance(len(batch.rows))


def padded_batches(
    model: CausalLM,
    encoded: Sequence[EncodedResponse],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[PaddedBatch]:
    """Yield the forwards that `teacher_forced` runs.

    Raises:
        ConfigurationError: The model is in training mode.
        PromptError: A response is longer than the model's context.
    """
    if model.training:
        raise ConfigurationError("model is in training mode; call model.eval().")
    _check_lengths(model, encoded)
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    # Only the activations are wanted: the last position's scores are the fewest one can ask for.
    fixed: dict[str, Any] = {"use_cache": False}
    fixed |= {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    for rows in _buckets(encoded, tokens_per_batch):
        inputs: dict[str, Any] = dict(left_padded([encoded[row].ids for row in rows], device))
        if "position_ids" not in accepted:
            inputs.pop("position_ids")
        n_scores = tuple(encoded[row].n_scores for row in rows)
        yield PaddedBatch(rows, {**inputs, **fixed}, n_scores)


def _buckets(
    encoded: Sequence[EncodedResponse], tokens_per_batch: int
) -> Iterator[tuple[int, ...]]:
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].ids))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(encoded[row].ids) > tokens_per_batch:
            yield tuple(batch)
            batch = []
        batch.append(row)
    if batch:
        yield tuple(batch)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Pad on the left; the id of a pad is never attended to, so any will do."""
    longest = max(len(ids) for ids in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    values = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in values.items()}


def _check_lengths(model: CausalLM, encoded: Sequence[EncodedResponse]) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(row.ids) for row in encoded), default=0)
    if isinstance(limit, int) and longest > limit:
        raise PromptError(
            f"a conversation has {longest} tokens, the model's context {limit}; cut or drop it."
        )


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")  # half a character is not yet reached
