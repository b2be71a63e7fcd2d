"""Fit a perceptron with one hidden layer to activations of labelled responses.

Knows its loss, its optimiser and when to stop. Does not know models, text, thresholds or which
settings are best.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from probes.activations.features import ResponseFeatures, Segment, columns_of, label_segments
from probes.fitting.examples import Examples, examples_of, standardise
from probes.fitting.interface import (
    Ability,
    FitSettings,
    FittedProbe,
    Fitter,
    mean_logit,
    require_positive,
)
from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.probe.interface import Probe
from safe_decode.probe.mlp import MLPProbe

__all__ = ["MLPFitConfig", "MLPProbeFitter"]

_LEAST_GAIN = 1e-4
"""A held-out loss that falls by less than this has not fallen."""


@dataclass(frozen=True, kw_only=True)
class MLPFitConfig(FitSettings):
    """How an MLP probe is fitted.

    Attributes:
        before_onset: See `BeforeOnset`.
        tokens_per_response: As in `FitSettings`.
        hidden: Units of the hidden layer.
        weight_decay: Of AdamW, for the weights of both layers; biases are not decayed.
        learning_rate: Of AdamW.
        rows_per_step: Positions of one step of the optimiser.
        held_out_share: Share of the groups that early stopping measures the loss on.
        patience: Passes without a lower held-out loss after which fitting stops.
        max_passes: Passes over the rows at most.
        seed: Of the first weights, of the order of the rows and of the groups held out.

    Raises:
        ConfigurationError: A number is not above 0, the share is not below 1, or the weight decay
            is negative.
    """

    kind: ClassVar[str] = "mlp"
    hidden: int = 64
    weight_decay: float = 0.01
    learning_rate: float = 1e-3
    rows_per_step: int = 256
    held_out_share: float = 0.2
    patience: int = 8
    max_passes: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(
            self,
            (
                "hidden",
                "learning_rate",
                "rows_per_step",
                "held_out_share",
                "patience",
                "max_passes",
                "tokens_per_response",
            ),
        )
        if self.held_out_share >= 1 or self.weight_decay < 0:
            raise ConfigurationError(
                f"held_out_share={self.held_out_share} must be below 1 and "
                f"weight_decay={self.weight_decay} at least 0."
            )

    @property
    def label(self) -> str:
        """Name these settings in tables."""
        return f"mlp H={self.hidden} decay={self.weight_decay:g}"


class MLPProbeFitter(Fitter):
    """Fits one `MLPProbe`; after `fit`, it holds nothing of the data.

    The loss is the cross-entropy of single positions, each response of equal weight. Groups of
    responses are held out whole: fitting stops when their loss no longer falls, and the weights
    of its lowest value are kept. On the CPU, with one number of threads, a seed yields the same
    weights each time.

    Args:
        config: How to fit.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset({"heads"})

    def __init__(self, config: MLPFitConfig | None = None) -> None:
        self.config = config or MLPFitConfig()

    @classmethod
    def ways(cls, methods: Sequence[str] | None, c: float | None) -> tuple[FitSettings, ...]:
        """Name two strengths of weight decay to try. Raises as `Fitter.ways`."""
        if methods or c is not None:
            given = f"method={methods[0]!r}" if methods else f"c={c:g}"
            raise ConfigurationError(
                f"{given} is of linear probes; leave it out, or fit a probe of the kind 'linear'."
            )
        return tuple(MLPFitConfig(weight_decay=decay) for decay in (0.01, 0.1))

    def fit(
        self,
        features: ResponseFeatures,
        harmful: Sequence[bool],
        *,
        groups: Sequence[str] | None = None,
    ) -> FittedProbe:
        """Fit a probe that tells harmful from harmless positions.

        Raises:
            DataError: Fewer than two groups of a label, so that none can be held out.
            ConfigurationError, DataError, NonFiniteError: As `Fitter.fit`.
        """
        config = self.config
        segments = label_segments(features, harmful, before_onset=config.before_onset)
        names = groups if groups is not None else [str(row) for row in range(len(features))]
        held_out = _held_out(harmful, names, config)
        examples = examples_of(features, segments, most_rows=config.tokens_per_response)
        standard = standardise(examples)
        trained = _trained(examples, _rows_of(segments, held_out, examples.sizes), config)
        trained.tensors["hidden_weight"][torch.from_numpy(standard.dead)] = 0.0
        mean, std = torch.from_numpy(standard.mean), torch.from_numpy(standard.std)
        probe = MLPProbe.folded(features.sites, trained.tensors, mean, std, ("harm",))
        benign = [v for v, label in zip(features.responses, harmful, strict=True) if not label]
        return FittedProbe(
            probe,
            mean_logit(probe, benign),
            config,
            int(standard.dead.sum()),
            trained.is_converged,
        )

    def joined(self, sites: Sequence[Site], parts: Mapping[str, Probe]) -> Probe:
        """Put the hidden layers side by side; each head reads the units of its own part."""
        ordered = sorted_sites(sites)
        own = [part.tensors() for part in parts.values()]
        hidden = []
        for part, tensors in zip(parts.values(), own, strict=True):
            whole = torch.zeros(n_features(ordered), tensors["hidden_weight"].shape[1])
            whole[columns_of(ordered, part.sites)] = tensors["hidden_weight"]
            hidden.append(whole)
        return MLPProbe(
            ordered,
            torch.cat(hidden, dim=1),
            torch.cat([one["hidden_bias"] for one in own]),
            torch.block_diag(*[one["output_weight"] for one in own]),  # type: ignore[no-untyped-call]
            torch.cat([one["output_bias"] for one in own]),
            tuple(parts),
        )


class _Trained(NamedTuple):
    """Tensors for standardised features, by name, and whether fitting stopped by itself."""

    tensors: dict[str, Tensor]
    is_converged: bool


def _held_out(
    harmful: Sequence[bool], groups: Sequence[str], config: MLPFitConfig
) -> NDArray[np.bool_]:
    """Choose the responses held out, [n]: a share of the groups of each label, whole groups."""
    if len(groups) != len(harmful):
        raise ConfigurationError(
            f"{len(groups)} groups for {len(harmful)} responses; pass one each."
        )
    labels: dict[str, set[bool]] = {}
    for name, label in zip(groups, harmful, strict=True):
        labels.setdefault(name, set()).add(bool(label))
    rng, chosen = np.random.default_rng(config.seed), set[str]()
    for wanted in ({False}, {True}, {False, True}):
        own = [name for name, found in labels.items() if found == wanted]
        count = max(1, round(config.held_out_share * len(own)))
        if count < len(own):
            chosen |= {own[place] for place in rng.permutation(len(own))[:count]}
    held_out = np.asarray([name in chosen for name in groups])
    marks = np.asarray(harmful, dtype=bool)
    if any(len(set(marks[part])) < 2 for part in (held_out, ~held_out)):
        raise DataError(
            f"{len(labels)} groups cannot be parted so that both parts hold harmful and harmless "
            "responses; give at least two groups of each label."
        )
    return held_out


def _rows_of(
    segments: Sequence[Segment], held_out: NDArray[np.bool_], sizes: NDArray[np.intp]
) -> Tensor:
    """Spread the choice of responses over their rows, [N] bool."""
    return torch.from_numpy(np.repeat([held_out[segment.row] for segment in segments], sizes))


def _trained(examples: Examples, is_held_out: Tensor, config: MLPFitConfig) -> _Trained:
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.from_numpy(examples.rows)
    targets = torch.from_numpy(np.repeat(examples.harmful, examples.sizes).astype(np.float32))
    weights = torch.from_numpy(examples.row_weights().astype(np.float32))
    train, held = (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    layers = _layers(rows.shape[1], config.hidden, generator)
    optimiser = torch.optim.AdamW(
        [
            {"params": [layer.weight for layer in layers], "weight_decay": config.weight_decay},
            {"params": [layer.bias for layer in layers], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )

    def loss(at: Tensor) -> Tensor:
        logits = layers[1](torch.relu(layers[0](rows[at])))[:, 0]
        each = functional.binary_cross_entropy_with_logits(logits, targets[at], reduction="none")
        return (weights[at] * each).sum() / weights[at].sum()

    lowest, best, waited = math.inf, copy.deepcopy(layers), 0
    for _ in range(config.max_passes):
        with torch.enable_grad():
            order = train[torch.randperm(len(train), generator=generator)]
            for begin in range(0, len(order), config.rows_per_step):
                at = order[begin : begin + config.rows_per_step]
                optimiser.zero_grad()
                loss(at).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        with torch.no_grad():
            now = float(loss(held))
        waited += 1
        if now < lowest - _LEAST_GAIN:
            lowest, best, waited = now, copy.deepcopy(layers), 0
        if waited >= config.patience:
            break
    hidden, output = best
    tensors = {
        "hidden_weight": hidden.weight.detach().t().contiguous(),
        "hidden_bias": hidden.bias.detach().clone(),
        "output_weight": output.weight.detach().t().contiguous(),
        "output_bias": output.bias.detach().clone(),
    }
    return _Trained(tensors, waited >= config.patience)


def _layers(n_inputs: int, hidden: int, generator: torch.Generator) -> list[nn.Linear]:
    """Make both layers: weights scaled for ReLU (arXiv 1502.01852), biases 0."""
    layers = [
        nn.Linear(n_inputs, hidden, device="meta").to_empty(device="cpu"),
        nn.Linear(hidden, 1, device="meta").to_empty(device="cpu"),
    ]
    with torch.no_grad():
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return layers
