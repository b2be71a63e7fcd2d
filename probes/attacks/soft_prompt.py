"""Free vectors in place of a suffix: what no text can beat, so a bound and not an attack.

The vectors reach the deployed guard through carrier ids, whose embeddings are replaced while
the prompt is read; everything behind that is the guard as it serves.

Knows vectors, carriers and steps. Does not know what the loss is made of or who judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.attacks.gcg import checkpoints_of
from probes.attacks.objective import Objective
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["SoftCheckpoint", "SoftConfig", "carrier_of", "carrying", "search_soft_prompt"]


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """How long vectors are searched.

    Attributes:
        vectors: How many.
        steps: Steps a restart.
        restarts: Searches from other beginnings, side by side.
        rate: Of Adam, in standard deviations of the embedding.
        checks: How many times, evenly over the steps, the guard is tried.
        seed: Of the beginnings.
    """

    vectors: int = 16
    steps: int = 300
    restarts: int = 5
    rate: float = 0.1
    checks: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vectors", "steps", "restarts", "checks"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1.")

    def doubled(self) -> SoftConfig:
        """Return twice the budget of steps and tries."""
        return replace(self, steps=2 * self.steps, checks=2 * self.checks)


class SoftCheckpoint(NamedTuple):
    """Where a search stands.

    Attributes:
        step: Steps done.
        vectors: [restarts, n, d_model], detached.
        losses: Of each restart.
    """

    step: int
    vectors: Tensor
    losses: tuple[float, ...]


def search_soft_prompt(objective: Objective, config: SoftConfig) -> Iterator[SoftCheckpoint]:
    """Search from embeddings of random tokens, and yield the state at each checkpoint."""
    embedding = objective.embedding
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randint(
        embedding.shape[0], (config.restarts, config.vectors), generator=generator
    )
    vectors = embedding[drawn.to(embedding.device)].float().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([vectors], lr=config.rate * float(embedding.float().std()))
    marks = set(checkpoints_of(config.steps, config.checks))
    for step in range(1, config.steps + 1):
        losses = objective.of_embeddings(vectors.to(embedding.dtype))
        (vectors.grad,) = torch.autograd.grad(losses.sum(), vectors)
        optimiser.step()
        if step in marks:
            now = tuple(losses.detach().float().tolist())
            yield SoftCheckpoint(step, vectors.detach().clone().to(embedding.dtype), now)


def carrier_of(tokenizer: Tokenizer, vocab: int, ids: Sequence[int]) -> int:
    """Choose an id that the prompt does not hold and the template does not mean.

    Raises:
        ConfigurationError: Every id is taken.
    """
    taken = {*ids, *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    free = next((index for index in range(vocab - 1, -1, -1) if index not in taken), None)
    if free is None:
        raise ConfigurationError("the prompt holds every id of the vocabulary; shorten it.")
    return free


@contextmanager
def carrying(model: CausalLM, carrier: int, vectors: Tensor) -> Iterator[None]:
    """Replace the embeddings of the first n carriers of each row by `vectors` [n, d_model].

    Forwards of fewer positions than vectors are decoding steps and are left alone.
    """
    n = len(vectors)

    def replace_carriers(_module: object, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = args[0]
        if ids.shape[1] < n:
            return output
        is_carrier = ids == carrier
        rank = is_carrier.cumsum(1) - 1
        chosen = is_carrier & (rank < n)
        placed = vectors.to(output.dtype)[rank.clamp(0, n - 1)]
        return torch.where(chosen[..., None], placed, output)

    handle = model.get_input_embeddings().register_forward_hook(replace_carriers)
    try:
        yield
    finally:
        handle.remove()
