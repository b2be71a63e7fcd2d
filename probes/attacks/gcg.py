"""A text suffix found by greedy coordinate gradients (arXiv 2307.15043), or drawn at random.

Each step ranks single-token swaps by the gradient in the token's indicator, draws a few of
the best, keeps what types back to the same ids, and takes the one of least loss. All restarts
run side by side.

Knows ids, gradients and restarts. Does not know what the loss is made of or who judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.attacks.objective import Objective
from probes.attacks.prompt_gap import PromptGap
from safe_decode.errors import ConfigurationError, PromptError

__all__ = ["Checkpoint", "SuffixConfig", "checkpoints_of", "random_suffixes", "search_suffix"]

_DRAWS = 64  # attempts to find a typeable suffix to begin with, and to find a swap


@dataclass(frozen=True, kw_only=True)
class SuffixConfig:
    """How long a suffix is searched.

    Attributes:
        tokens: Length of the suffix.
        steps: Gradient steps a restart.
        candidates: Swaps whose loss is computed at each step.
        restarts: Searches from other beginnings, side by side.
        top_k: Tokens a position from which swaps are drawn.
        checks: How many times, evenly over the steps, the guard is tried.
        seed: Of beginnings and swaps.
    """

    tokens: int = 20
    steps: int = 150
    candidates: int = 16
    restarts: int = 3
    top_k: int = 64
    checks: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "candidates", "restarts", "top_k", "checks"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1.")

    def doubled(self) -> SuffixConfig:
        """Return twice the budget of steps and tries."""
        return replace(self, steps=2 * self.steps, checks=2 * self.checks)


class Checkpoint(NamedTuple):
    """Where a search stands.

    Attributes:
        step: Steps done.
        gaps: Ids of the best suffix of each restart.
        losses: Theirs.
    """

    step: int
    gaps: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]


def checkpoints_of(steps: int, checks: int) -> tuple[int, ...]:
    """Place the tries: evenly, the last one at the end, none before the first step."""
    return tuple(sorted({max(1, round(steps * n / checks)) for n in range(1, checks + 1)}))


def search_suffix(
    objective: Objective, frame: PromptGap, typeable: Sequence[int], config: SuffixConfig
) -> Iterator[Checkpoint]:
    """Search, and yield the state at each checkpoint; stop reading to stop the search.

    Args:
        objective: The loss.
        frame: Where the suffix stands.
        typeable: Ids that may be used.
        config: See `SuffixConfig`.

    Raises:
        PromptError: No suffix of these ids types back to itself.
    """
    rng = np.random.default_rng(config.seed)
    current = [_beginning(frame, typeable, config, rng) for _ in range(config.restarts)]
    losses = objective.of_ids(_tensor(current, objective)).tolist()
    allowed = torch.tensor(sorted(typeable), device=objective.embedding.device)
    marks = set(checkpoints_of(config.steps, config.checks))
    for step in range(1, config.steps + 1):
        gradient = objective.token_gradient(_tensor(current, objective))
        top = _best_swaps(gradient, allowed, config.top_k)
        swaps = [
            _swaps(frame, gap, top[restart], config.candidates, rng)
            for restart, gap in enumerate(current)
        ]
        found = _losses(objective, swaps)
        for restart, (tried, reached) in enumerate(zip(swaps, found, strict=True)):
            if not tried:
                continue
            best = int(np.argmin(reached))
            if reached[best] < losses[restart]:
                current[restart], losses[restart] = tried[best], reached[best]
        if step in marks:
            yield Checkpoint(step, tuple(current), tuple(losses))


def random_suffixes(
    frame: PromptGap, typeable: Sequence[int], config: SuffixConfig
) -> Iterator[Checkpoint]:
    """Draw new suffixes at every checkpoint: what the tries alone achieve, without a search."""
    rng = np.random.default_rng(config.seed)
    for step in checkpoints_of(config.steps, config.checks):
        gaps = tuple(_beginning(frame, typeable, config, rng) for _ in range(config.restarts))
        yield Checkpoint(step, gaps, (float("nan"),) * config.restarts)


def _beginning(
    frame: PromptGap, typeable: Sequence[int], config: SuffixConfig, rng: np.random.Generator
) -> tuple[int, ...]:
    """Grow a typeable suffix token by token."""
    gap: tuple[int, ...] = ()
    while len(gap) < config.tokens:
        draws = rng.choice(np.asarray(typeable), size=_DRAWS)
        longer = next((g for d in draws if frame.is_typeable(g := (*gap, int(d)))), None)
        if longer is None:
            raise PromptError(
                f"no token of {len(typeable)} can be typed after {frame.text_of(gap)!r}; the "
                "tokenizer merges whatever follows, so a suffix of ids has no text."
            )
        gap = longer
    return gap


def _best_swaps(gradient: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """Return [restarts, n, k] the allowed ids whose indicators lower the loss most."""
    kept = gradient[:, :, allowed]
    order = kept.topk(min(top_k, len(allowed)), dim=-1, largest=False).indices
    return allowed[order].cpu()


def _swaps(
    frame: PromptGap,
    gap: tuple[int, ...],
    top: Tensor,
    wanted: int,
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_DRAWS):
        position = int(rng.integers(len(gap)))
        token = int(top[position, int(rng.integers(top.shape[1]))])
        swap = (*gap[:position], token, *gap[position + 1 :])
        if swap != gap and swap not in found and frame.is_typeable(swap):
            found[swap] = None
        if len(found) == wanted:
            break
    return list(found)


def _losses(objective: Objective, swaps: Sequence[Sequence[tuple[int, ...]]]) -> list[list[float]]:
    """Read the losses of all restarts' candidates in as few forwards as they fit into."""
    flat = [swap for of_restart in swaps for swap in of_restart]
    if not flat:
        return [[] for _ in swaps]
    found = iter(objective.of_ids(_tensor(flat, objective)).tolist())
    return [[next(found) for _ in of_restart] for of_restart in swaps]


def _tensor(gaps: Sequence[tuple[int, ...]], objective: Objective) -> Tensor:
    return torch.tensor(gaps, dtype=torch.long, device=objective.embedding.device)
