"""What a gradient attack minimises: harm made likely, the monitor kept below its threshold.

    loss = NLL(target | prompt, gap)  +  w * tau * log( e^(-slack/tau) + sum_t e^(margin_t/tau) )

with margin_t = smoothed_t - threshold over the scores s_0 .. s_T of the target. The log-sum-exp
stands for the running maximum, and the slack keeps an attacker from spending steps on a margin
that is already won (the obfuscated activations of arXiv 2412.09565, against a statistic over
time). The monitor is the runtime's own, with gradients.

Knows one behaviour, its ids and what watches them. Does not know how the gap is searched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from probes.attacks.gradient_tap import GradientTap
from probes.attacks.prompt_gap import PromptGap
from safe_decode.errors import ConfigurationError
from safe_decode.monitor.monitor import MonitorConfig, RiskMonitor
from safe_decode.probe.interface import Probe
from safe_decode.typing import CausalLM

__all__ = ["TargetAnswer", "Objective", "DetectorModel", "Weights"]

_TOKENS_AT_ONCE = 4096  # of one forward; see `probes.activations.teacher_forcing.TOKENS_PER_BATCH`


@dataclass(frozen=True, eq=False)
class DetectorModel:
    """What the attacker believes watches the answer.

    Attributes:
        probe: On the model's device.
        monitor: How its logits become a statistic.
        threshold: An alarm is statistic > threshold.
    """

    probe: Probe
    monitor: MonitorConfig
    threshold: float


class TargetAnswer(NamedTuple):
    """A continuation whose likelihood is raised.

    Attributes:
        begun: Ids that stand before it and are not the attacker's, such as an opener.
        target: Ids made likely.
        weight: Of this answer in the loss.
    """

    begun: tuple[int, ...]
    target: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the parts of the loss are weighed.

    Attributes:
        margin: w; 0 attacks the bare model.
        temperature: tau, in units of the statistic.
        slack: How far below the threshold is far enough, in the unit of the statistic.
    """

    margin: float = 1.0
    temperature: float = 0.25
    slack: float = 0.5

    def __post_init__(self) -> None:
        if self.margin < 0 or self.temperature <= 0:
            raise ConfigurationError(
                f"margin={self.margin} and temperature={self.temperature} must be at least 0 and "
                "above 0."
            )


class _Read(NamedTuple):
    """Scores [batch, positions, vocab] and features [batch, positions, F] of a forward."""

    scores: Tensor
    features: Tensor | None

    def then(self, later: _Read) -> _Read:
        """Join what was read of the positions that follow."""
        features = None
        if self.features is not None and later.features is not None:
            features = torch.cat([self.features, later.features], dim=1)
        return _Read(torch.cat([self.scores, later.scores], dim=1), features)


class Objective:
    """The loss of one behaviour as a function of what stands in the gap.

    Args:
        model: In eval mode; its parameters are not changed and get no gradients.
        frame: Where the gap is.
        answers: What is to be said, at least one.
        watch: What watches; None attacks the bare model.
        weights: See `Weights`.

    Raises:
        ConfigurationError: No answer, or one without a token.
    """

    def __init__(
        self,
        model: CausalLM,
        frame: PromptGap,
        answers: Sequence[TargetAnswer],
        *,
        watch: DetectorModel | None,
        weights: Weights,
    ) -> None:
        if not answers or not all(answer.target for answer in answers):
            raise ConfigurationError("answers is empty or holds an empty target; pass token ids.")
        self._model, self._frame, self._answers = model, frame, tuple(answers)
        self._watch, self._weights = (None if weights.margin == 0 else watch), weights
        self._reader = None if watch is None else GradientTap(model, watch.probe.sites)
        self._embed = model.get_input_embeddings()
        # Scores of the prompt are never read, and with a large vocabulary they are most of it.
        self._keeps_few = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def embedding(self) -> Tensor:
        """[vocab, d_model], detached."""
        weight: Tensor = self._embed.weight.detach()
        return weight

    def of_embeddings(self, gap: Tensor) -> Tensor:
        """Return the loss of each row, [batch], differentiable in `gap` [batch, n, d_model]."""
        losses = [self._of_answer(gap, answer) * answer.weight for answer in self._answers]
        return torch.stack(losses).sum(0)

    def of_ids(self, gap: Tensor) -> Tensor:
        """Return the loss of each row, [batch], for ids [batch, n]; no graph is built.

        What stands before the gap is run once for all calls, and what stands before the answers
        once for all of them.
        """
        frame, longest = self._frame, max(len(a.begun) + len(a.target) for a in self._answers)
        rows = max(1, _TOKENS_AT_ONCE // (gap.shape[1] + len(frame.tail) + longest))
        with torch.no_grad():
            return torch.cat([self._of_stem(part) for part in torch.split(gap, rows)])

    def token_gradient(self, gap: Tensor) -> Tensor:
        """Return the gradient of the loss in each id's indicator, [batch, n, vocab].

        A constant by which a model scales its embeddings drops out of any ranking.
        """
        free = self._embed(gap).detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.of_embeddings(free).sum(), free)
        of_tokens: Tensor = gradient @ self.embedding.T
        return of_tokens

    def _of_stem(self, gap: Tensor) -> Tensor:
        """Sum what `of_embeddings` sums, from a cache of what the answers have in common."""
        batch = gap.shape[0]
        said = self._embedded(self._frame.tail, batch)
        stem = torch.cat([self._embed(gap), said], dim=1)
        cache = copy.deepcopy(self._head)
        cache.batch_repeat_interleave(batch)
        start = self._read(stem, cache, 1)
        total = stem.new_zeros(batch, dtype=torch.float32)
        for number, answer in enumerate(self._answers, 1):
            # A forward adds to its cache.
            own = cache if number == len(self._answers) else copy.deepcopy(cache)
            ids = (*answer.begun, *answer.target)
            found = start.then(self._read(self._embedded(ids, batch), own, len(ids)))
            total += answer.weight * self._loss(found, answer)
        return total

    @cached_property
    def _head(self) -> DynamicCache:
        config: Any = self._model.config  # the cache asks for transformers' own class
        cache = DynamicCache(config=config)
        self._read(self._embedded(self._frame.head, 1), cache, 1)
        return cache

    def _read(self, embeddings: Tensor, cache: DynamicCache | None, n_positions: int) -> _Read:
        """Run `embeddings` [batch, seq, d_model] behind a cache; keep the last positions."""
        kept: dict[str, Any] = {"logits_to_keep": n_positions} if self._keeps_few else {}
        kept |= {"use_cache": False} if cache is None else {"past_key_values": cache}
        if self._watch is None or self._reader is None:
            output = self._model(inputs_embeds=embeddings, **kept)
            return _Read(output.logits[:, -n_positions:], None)
        with self._reader.reading(embeddings.shape[0]) as found:
            output = self._model(inputs_embeds=embeddings, **kept)
        features = torch.cat([part[:, -n_positions:] for part in found], dim=-1)
        return _Read(output.logits[:, -n_positions:], features)

    def _of_answer(self, gap: Tensor, answer: TargetAnswer) -> Tensor:
        batch = gap.shape[0]
        before = self._embedded((*self._frame.head,), batch)
        said = (*self._frame.tail, *answer.begun, *answer.target)
        whole = torch.cat([before, gap, self._embedded(said, batch)], dim=1)
        return self._loss(
            self._read(whole, None, len(answer.begun) + len(answer.target) + 1), answer
        )

    def _loss(self, found: _Read, answer: TargetAnswer) -> Tensor:
        """Return the loss [batch] of the positions from s_0 to the end of the target."""
        likelihood = self._nll(found.scores, answer)
        if found.features is None:
            return likelihood
        return likelihood + self._weights.margin * self._margin(found.features)

    def _embedded(self, ids: tuple[int, ...], batch: int) -> Tensor:
        row = torch.tensor([ids], device=self._embed.weight.device, dtype=torch.long)
        vectors: Tensor = self._embed(row).detach()
        return vectors.expand(batch, -1, -1)

    def _nll(self, scores: Tensor, answer: TargetAnswer) -> Tensor:
        length = len(answer.target)
        scores = scores[:, -length - 1 : -1].float()
        ids = torch.tensor(answer.target, device=scores.device).expand(scores.shape[0], -1)
        losses = functional.cross_entropy(scores.transpose(1, 2), ids, reduction="none")
        means: Tensor = losses.mean(1)
        return means

    def _margin(self, features: Tensor) -> Tensor:
        assert self._watch is not None
        watch, weights = self._watch, self._weights
        monitor = RiskMonitor(watch.monitor, watch.threshold)
        margins = monitor.path(watch.probe(features)) - watch.threshold
        stacked = torch.cat([margins, torch.full_like(margins[:, :1], -weights.slack)], dim=1)
        return weights.temperature * torch.logsumexp(stacked / weights.temperature, dim=1)
