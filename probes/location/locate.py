"""Locate safety-critical units: stream a model's activations into importance scores.

Variances are taken over the positions whose next token is a response token: from the
last template token on to the last token but one. Neither the beginning-of-sequence
token nor padding nor the prompt's own tokens count.

Knows which modules are scored and how their weights lie. The arithmetic is in
`importance`, the categories are in `units`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.activations.teacher_forcing import (
    TOKENS_PER_BATCH,
    PaddedBatch,
    encode_response,
    visit_activations,
)
from probes.data.conversations import Conversation
from probes.location.checkpoint import StreamKept
from probes.location.importance import ChannelMoments, Variant, score_units
from probes.location.units import Ranking, Ratios, UnitSet, assign
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, SiteKind
from safe_decode.errors import ConfigurationError, DataError, UnsupportedError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["LocateConfig", "all_unit_sites", "channel_moments", "locate"]

_KINDS: tuple[SiteKind, ...] = ("attn", "mlp")


@dataclass(frozen=True, kw_only=True)
class LocateConfig:
    """The choices that the paper leaves open, and its ratios.

    Attributes:
        variant: See `importance.Variant`.
        ranking: See `units.Ranking`.
        ratios: Shares of the categories.
        min_refusals: Distinct refusals wanted for I_S; a templated refusal repeated a
            thousand times has hardly any variance to score.
        tokens_per_batch: Padded tokens run at once.
    """

    variant: Variant = "flap"
    ranking: Ranking = "joint"
    ratios: Ratios = field(default_factory=Ratios)
    min_refusals: int = 50
    tokens_per_batch: int = TOKENS_PER_BATCH

    def __post_init__(self) -> None:
        if self.min_refusals < 1 or self.tokens_per_batch < 1:
            raise ConfigurationError(
                f"min_refusals={self.min_refusals} and tokens_per_batch={self.tokens_per_batch} "
                "must be at least 1."
            )


def locate(
    model: CausalLM,
    tokenizer: Tokenizer,
    refusals: Sequence[Conversation],
    benign: Sequence[Conversation],
    config: LocateConfig | None = None,
    *,
    kept: Path | None = None,
) -> UnitSet:
    """Score and sort every attention head and MLP neuron of a model.

    Args:
        model: The aligned model, in eval mode.
        tokenizer: Its tokenizer.
        refusals: Harmful requests with the model's own refusals, for I_S.
        benign: Benign requests with the model's own answers, for I_U.
        config: See `LocateConfig`.
        kept: Directory in which both passes keep how far they are, so that a location that
            was ended goes on from there.

    Raises:
        DataError: Too few distinct refusals, or no benign response.
        UnsupportedError: An output or down projection cannot be read, for instance
            because the experts are fused into one parameter.
    """
    config = config or LocateConfig()
    distinct = len({row.response for row in refusals})
    if distinct < config.min_refusals:
        raise DataError(
            f"refusals holds {distinct} distinct responses, wanted at least "
            f"{config.min_refusals}; sample more of the model's own refusals."
        )
    budget = config.tokens_per_batch
    places = [None if kept is None else kept / f"{name}.npz" for name in ("safety", "utility")]
    safety, utility = (
        channel_moments(model, tokenizer, rows, tokens_per_batch=budget, kept=place)
        for rows, place in zip((refusals, benign), places, strict=True)
    )
    head_dim = anatomy_of(model).head_dim
    scores = score_units(safety, utility, head_dim=head_dim, variant=config.variant)
    provenance = {
        "variant": config.variant,
        "refusals": len(refusals),
        "distinct_refusals": distinct,
        "benign": len(benign),
        "safety_positions": safety[0].positions,
        "utility_positions": utility[0].positions,
    }
    return assign(scores, config.ratios, ranking=config.ranking, provenance=provenance)


def channel_moments(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    kept: str | os.PathLike[str] | None = None,
) -> list[ChannelMoments]:
    """Stream responses through the model and take the moments of every unit channel.

    Memory does not grow with the responses.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        conversations: With responses.
        tokens_per_batch: Padded tokens run at once.
        kept: File to which the moments are written now and then, so that a pass that was
            ended goes on from there; see `StreamKept`.

    Raises:
        DataError: There are fewer than two positions to take a variance of, or `kept` is of
            another pass.
        UnsupportedError: As in `locate`.
    """
    sites = all_unit_sites(model)
    widths = [len(site.channels) for site in sites]
    encoded = [encode_response(tokenizer, row) for row in conversations]
    stream = StreamKept.of(model, encoded, widths=widths, path=kept)

    def visit(batch: PaddedBatch, site: int, activation: Tensor) -> None:
        followed = _followed(batch, activation.device)
        stream.moments[site].update(activation[:, -followed.shape[1] :], followed)

    for part in stream.to_do(encoded):
        visit_activations(
            model, sites, part, visit, description="locating", tokens_per_batch=tokens_per_batch
        )
        stream.keep(len(part))
    anatomy = anatomy_of(model)
    return [
        ChannelMoments(
            site.layer,
            "attn" if site.kind == "attn" else "mlp",
            moments.variance().numpy(),
            _column_norm_sq(anatomy.module(site.layer, site.kind)),
            moments.count,
            moments.mean().numpy(),
        )
        for site, moments in zip(sites, stream.moments, strict=True)
    ]


def _followed(batch: PaddedBatch, device: torch.device) -> Tensor:
    """[batch, max T + 1] bool: those that a response token follows, the last score left out."""
    counts = torch.tensor(batch.n_scores)[:, None]
    width = int(counts.max())
    places = torch.arange(width)[None]
    return ((places >= width - counts) & (places < width - 1)).to(device)


def all_unit_sites(model: CausalLM) -> tuple[Site, ...]:
    """Name every channel that belongs to a unit, layer by layer.

    Raises:
        UnsupportedError: The model has no attention heads, or of several sizes, or a projection
            cannot be read.
    """
    anatomy = anatomy_of(model)
    if anatomy.head_dim == 0:
        raise UnsupportedError(
            f"units of {type(model).__name__} cannot be located: its blocks have no attention "
            "heads, or heads of several sizes; fit a probe at chosen sites instead."
        )
    return tuple(
        Site(layer, kind, tuple(range(anatomy.width(layer, kind))))
        for layer in range(len(anatomy.blocks))
        for kind in _KINDS
    )


def _column_norm_sq(module: nn.Module) -> NDArray[np.float64]:
    """Return the squared norm of the weights that read each input channel, [W].

    A linear layer stores [out, in]; the Conv1D of GPT-2 stores [in, out].
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise UnsupportedError(
            f"the weight of {type(module).__name__} cannot be read as a matrix; locate on the "
            "model before it is quantised."
        )
    outputs = 1 if type(module).__name__ == "Conv1D" else 0
    norms: NDArray[np.float64] = weight.detach().double().square().sum(outputs).cpu().numpy()
    return norms
