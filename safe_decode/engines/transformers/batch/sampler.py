"""How the rows of one batch choose their tokens, each by its own settings and draws.

Knows scores, penalties, truncation and one uniform number a row and step. Does not know
models, text or the guard. A row's choice is a function of its scores, its settings and its
seed; who runs beside it does not matter. Greedy rows keep their scores bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_decode.engines.rows import Sampling

__all__ = ["ModelOwn", "RowSampler", "StepLogprobs"]

_NEVER = -1e30


class StepLogprobs:
    """What is reported of one step: log-probabilities of ids, and the likeliest ones if asked for.

    Args:
        scores: [rows, vocab] of the rows that asked, untouched.
        width: Alternatives kept; 0: none.
    """

    def __init__(self, scores: Tensor, width: int) -> None:
        self._logprobs = torch.log_softmax(scores.float(), -1)
        values, ids = self._logprobs.topk(min(width, scores.shape[-1]), -1)
        self._values, self._ids = values.tolist(), ids.tolist()

    def of(self, index: int, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Return the log-probability of `token` in a row, and that row's `top` likeliest."""
        pairs = list(zip(self._ids[index], self._values[index], strict=True))[:top]
        return float(self._logprobs[index, token]), tuple(pairs)


@dataclass(frozen=True)
class ModelOwn:
    """What a model's own configuration does to every row.

    Attributes:
        ends: Ids at which it ends.
        repetition_penalty: `generate` itself has put it into the scores; 1.0: none.
    """

    ends: tuple[int, ...] = ()
    repetition_penalty: float = 1.0


class RowSampler:
    """A logits processor that chooses; to be run with greedy decoding, before the guard's.

    Args:
        samplings: One a row.
        vocab: Width of the scores.
        device: Where they are.
        n_ahead: Unseen tokens that may be drawn behind the longest row's cap.
        own: Of the model.
        prompts: Ids of the rows' prompts, for penalties on what stands in them.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        vocab: int,
        device: torch.device,
        *,
        n_ahead: int = 0,
        own: ModelOwn = ModelOwn(),  # noqa: B008 - frozen
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self._step = 0
        self.chosen: StepLogprobs | None = None
        self.reported = [i for i, s in enumerate(samplings) if s.top_logprobs is not None]
        self._width = max((s.top_logprobs or 0 for s in samplings), default=0)
        drawn = [i for i, s in enumerate(samplings) if s.temperature > 0]
        # Two ways to the same draw: which one a row takes is its own affair, not the batch's.
        cut = [i for i in drawn if _is_cut(samplings[i])]
        self._plain = torch.tensor([i for i in drawn if i not in cut], device=device).long()
        self._cut = torch.tensor(cut, device=device).long()

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device, dtype=torch.float32)[:, None]

        self._temperature = column([max(s.temperature, 1e-4) for s in samplings])
        self._top_p = column([s.top_p for s in samplings])
        self._top_k = torch.tensor([s.top_k or vocab for s in samplings], device=device)[:, None]
        self._min_p = column([s.min_p for s in samplings])
        self._penalty = _Repetition.of(samplings, own, prompts, vocab, device)
        self._floors = _Floors.of(samplings, own, vocab, device)
        self._presence = column([s.presence_penalty for s in samplings])
        self._frequency = column([s.frequency_penalty for s in samplings])
        penalised = any(s.presence_penalty or s.frequency_penalty for s in samplings)
        self._counts = torch.zeros(len(samplings), vocab, device=device) if penalised else None
        self._bias = _bias(samplings, vocab, device)
        longest = max(s.max_tokens for s in samplings) + n_ahead
        # Drawn once: no step does anything row by row.
        self._uniform = torch.stack([_draws(s.seed, longest) for s in samplings]).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose.

        Args:
            input_ids: [batch, seq].
            scores: [batch, vocab] float32.

        Returns:
            [batch, vocab]: untouched in greedy rows without penalties; in drawn rows 0 at the
            drawn id and far below elsewhere; where a row is not finite, as it came.
        """
        if self.reported:
            self.chosen = StepLogprobs(scores[self.reported], self._width)
        if self._penalty is not None:
            scores = self._penalty(input_ids, scores, is_first=not self._step)
        if self._counts is not None and self._step:
            newest = input_ids[:, -1:]
            self._counts.scatter_add_(1, newest, torch.ones_like(newest, dtype=torch.float32))
            said = (self._counts > 0).float()
            scores = scores - self._presence * said - self._frequency * self._counts
        if self._bias is not None:
            scores = scores + self._bias
        if self._floors is not None:
            scores = self._floors(scores, self._step)
        if self._plain.numel():
            scores = self._drawn(scores, self._plain, is_cut=False)
        if self._cut.numel():
            scores = self._drawn(scores, self._cut, is_cut=True)
        self._step += 1
        return scores

    def _drawn(self, scores: Tensor, rows: Tensor, *, is_cut: bool) -> Tensor:
        own = scores[rows] / self._temperature[rows]
        mark = self._uniform[rows, min(self._step, self._uniform.shape[1] - 1)][:, None]
        if is_cut:
            ordered, order = torch.sort(own, dim=-1, descending=True, stable=True)
            mass = torch.softmax(ordered, -1).double()
            before = mass.cumsum(-1) - mass
            places = torch.arange(mass.shape[-1], device=mass.device)[None]
            gone = (before >= self._top_p[rows]) | (places >= self._top_k[rows])
            gone |= mass < self._min_p[rows] * mass[:, :1]
            gone[:, 0] = False
            token = order.gather(1, _inverse(mass.masked_fill(gone, 0.0), mark))
        else:
            token = _inverse(torch.softmax(own, -1).double(), mark)
        # Finite, since the guard takes a chosen score that is not for a broken row, and a row
        # that has ended is given its pad whatever is drawn.
        forced = torch.full_like(own, _NEVER).scatter_(1, token, 0.0)
        top = own.amax(-1, keepdim=True)
        # NaN and Inf are the guard's to see, so they stay.
        return scores.index_copy(0, rows, torch.where(top - top == 0, forced, scores[rows]))


class _Repetition:
    """The penalty on what stands in the prompt or was said, as transformers computes it.

    Args:
        ratio: [rows, 1] what a row's penalty is of the model's own, which is in the scores.
        seen: [rows, vocab] bool, ids of the prompts.
    """

    def __init__(self, ratio: Tensor, seen: Tensor) -> None:
        self._ratio, self._seen = ratio, seen

    @classmethod
    def of(
        cls,
        samplings: Sequence[Sampling],
        own: ModelOwn,
        prompts: Sequence[Sequence[int]],
        vocab: int,
        device: torch.device,
    ) -> _Repetition | None:
        """Make it; None: no row asks for another penalty than the model's own."""
        wanted = [s.repetition_penalty for s in samplings]
        ratios = [1.0 if w is None else w / own.repetition_penalty for w in wanted]
        if all(ratio == 1.0 for ratio in ratios):
            return None
        seen = torch.zeros(len(samplings), vocab, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            seen[row, list(ids)] = True
        ratio = torch.tensor(ratios, device=device, dtype=torch.float32)[:, None]
        return cls(ratio, seen.to(device))

    def __call__(self, input_ids: Tensor, scores: Tensor, *, is_first: bool) -> Tensor:
        """Penalise [batch, vocab]; a ratio of 1 leaves a row as it is, bit for bit."""
        if not is_first:
            self._seen.scatter_(1, input_ids[:, -1:], value=True)
        penalised = torch.where(scores < 0, scores * self._ratio, scores / self._ratio)
        return torch.where(self._seen, penalised, scores)


class _Floors:
    """Keeps rows from ending before they have said what they were asked for.

    Args:
        floors: [rows, 1] int64, steps at which a row cannot end.
        ends: [vocab] bool, ids at which it would.
    """

    def __init__(self, floors: Tensor, ends: Tensor) -> None:
        self._floors, self._ends = floors, ends
        self._longest = int(floors.max())

    @classmethod
    def of(
        cls, samplings: Sequence[Sampling], own: ModelOwn, vocab: int, device: torch.device
    ) -> _Floors | None:
        """Make them; None: every row may end where it likes."""
        # Behind the cap, unseen tokens are drawn under the same rule.
        floors = [2**62 if s.ignore_eos else s.min_tokens for s in samplings]
        if not any(floors):
            return None
        ends = torch.zeros(vocab, dtype=torch.bool)
        ends[[i for i in own.ends if i < vocab]] = True
        return cls(torch.tensor(floors, device=device)[:, None], ends.to(device))

    def __call__(self, scores: Tensor, step: int) -> Tensor:
        """Forbid the ends in [batch, vocab]; what is not finite stays for the guard to see."""
        if step >= self._longest:
            return scores
        forbidden = (step < self._floors) & self._ends & scores.isfinite()
        return scores.masked_fill(forbidden, _NEVER)


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _inverse(mass: Tensor, mark: Tensor) -> Tensor:
    total = mass.cumsum(-1)
    found = torch.searchsorted(total, mark * total[:, -1:], right=True)
    last = (mass > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(found, last)


def _draws(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _bias(samplings: Sequence[Sampling], vocab: int, device: torch.device) -> Tensor | None:
    if not any(s.logit_bias for s in samplings):
        return None
    bias = torch.zeros(len(samplings), vocab)
    for row, sampling in enumerate(samplings):
        for token, value in sampling.logit_bias.items():
            bias[row, token] = value
    return bias.to(device)
