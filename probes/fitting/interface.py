"""What the workbench asks of a way of fitting, whatever the kind of probe.

Knows settings, fitted probes and what a fitter may be asked for beyond `fit`. Does not know how
a kind is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from probes.activations.features import BeforeOnset, ResponseFeatures
from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError
from safe_decode.probe.interface import Probe

__all__ = [
    "Ability",
    "FitSettings",
    "FittedProbe",
    "Fitter",
    "Stream",
    "mean_logit",
    "require_positive",
]

Ability = Literal["streamed", "penalty", "heads"]
"""streamed: fits pass after pass over activations that are computed anew.
penalty: has a strength of the penalty, `c`, that a grid can be searched for.
heads: joins fitted probes into one probe of several heads."""

Stream = Callable[[], Iterator[Sequence[tuple[int, NDArray[Any]]]]]
"""Called once a pass: yields batches of (response, [T + 1, F] activations), each response once,
in any order."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What every way of fitting is told; a kind's own settings inherit from it.

    Attributes:
        kind: Of the probe that is fitted; see `safe_decode.probe.registry`.
        before_onset: See `BeforeOnset`.
        tokens_per_response: At most so many positions of a segment, evenly spaced, are used where
            single positions are fitted; neighbours carry almost the same information.
    """

    kind: ClassVar[str]
    before_onset: BeforeOnset = "negative"
    tokens_per_response: int = 24

    @property
    def label(self) -> str:
        """Name these settings in tables."""
        return self.kind

    @property
    def has_penalty(self) -> bool:
        """Whether these settings have a penalty of strength `c` that a grid can be tried for."""
        return False


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A probe and what fitting found out.

    Attributes:
        probe: One head, `harm`, or several that were joined.
        benign_mean: [K] mean logit over the positions of harmless responses, each response
            of equal weight; where a monitor's smoother starts.
        config: How it was fitted.
        dead_features: Features without spread; their weights are 0.
        converged: Whether the optimiser stopped by itself.
    """

    probe: Probe
    benign_mean: tuple[float, ...]
    config: FitSettings
    dead_features: int
    converged: bool


class Fitter(Protocol):
    """Fits probes of one kind; after `fit`, it holds nothing of the data.

    A fitter inherits from this Protocol, is built from its settings alone, and names in
    `abilities` what it does beyond `fit`; the other methods refuse.

    Attributes:
        abilities: What it can be asked for.
        config: How to fit.
    """

    abilities: ClassVar[frozenset[Ability]]
    config: Any

    def __init__(self, config: Any = None) -> None:  # noqa: ANN401 - each kind has its settings
        ...

    @classmethod
    def ways(cls, methods: Sequence[str] | None, c: float | None) -> tuple[FitSettings, ...]:
        """Name the settings to try where nothing more is known.

        Args:
            methods: Ways of fitting by name; None for all.
            c: Inverse strength of the penalty; None for the default.

        Raises:
            ConfigurationError: This kind has no such way, or no such penalty.
        """
        ...

    def fit(
        self,
        features: ResponseFeatures,
        harmful: Sequence[bool],
        *,
        groups: Sequence[str] | None = None,
    ) -> FittedProbe:
        """Fit a probe of the one head `harm` that tells harmful from harmless positions.

        Args:
            features: Of responses; float16 storage is read as float32.
            harmful: One label a response.
            groups: Of each response, for fitters that hold some out; responses of one group stay
                together. None: each response is a group of its own.

        Raises:
            ConfigurationError: Labels or onsets do not fit the responses.
            DataError: All labels are equal, or every feature is dead.
            NonFiniteError: An activation is NaN or infinite.
        """
        ...

    def fit_streamed(
        self,
        stream: Stream,  # noqa: ARG002
        sites: Sequence[Site],  # noqa: ARG002
        n_scores: Sequence[int],  # noqa: ARG002
        onset_tokens: Sequence[int | None],  # noqa: ARG002
        harmful: Sequence[bool],  # noqa: ARG002
    ) -> FittedProbe:
        """Fit as `fit` does, without holding the activations; the ability `streamed`.

        Args:
            stream: See `Stream`.
            sites: Whose features it yields.
            n_scores: T + 1 of each response.
            onset_tokens: Onset of each, or None.
            harmful: One label a response.

        Raises:
            ConfigurationError: This kind does not fit so; otherwise as `fit`.
        """
        raise _unable(self.config, "streamed")

    def joined(self, sites: Sequence[Site], parts: Mapping[str, Probe]) -> Probe:  # noqa: ARG002
        """Join probes of one head each into one probe; the ability `heads`.

        Args:
            sites: The union of the sites that the parts read.
            parts: Probes of this kind by the name of their head in the result.

        Raises:
            ConfigurationError: This kind does not join probes.
        """
        raise _unable(self.config, "heads")


def mean_logit(probe: Probe, responses: Sequence[NDArray[Any]]) -> tuple[float, ...]:
    """Return the mean logit of each head over positions, [K], each response of equal weight."""
    # Copied: what is memory-mapped cannot be lent to torch.
    values = (torch.from_numpy(np.array(one, dtype=np.float32)) for one in responses)
    means = torch.stack([probe(one).double().mean(dim=0) for one in values])
    return tuple(means.mean(dim=0).tolist())


def require_positive(settings: FitSettings, names: Sequence[str]) -> None:
    """Check that settings are above 0.

    Raises:
        ConfigurationError: One is not; it is named.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise ConfigurationError(f"{name}={getattr(settings, name)} must be above 0.")


def _unable(settings: FitSettings, ability: Ability) -> ConfigurationError:
    return ConfigurationError(
        f"probes of the kind {settings.kind!r} do not support {ability!r}; fit them on stored "
        "activations, one head each."
    )
