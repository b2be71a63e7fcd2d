"""A bundle scored without torch: probe and monitor in NumPy.

For other engines, for services that receive activations, and as the reference that ONNX
graphs are held to. The arithmetic is that of `monitor.monitor`, in float32; what is computed is
defined in `monitor.config`.

Knows a bundle's files and arrays. Does not know models, tokens or redirects; where
activations come from is its user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from safe_decode.activations.site import Site, n_features
from safe_decode.bundle.certificate_card import certificates_of
from safe_decode.bundle.files import CALIBRATION, CARD, PROBE, checked_content, read_card, tupled
from safe_decode.bundle.number_format import number_format
from safe_decode.bundle.plausible import require_plausible_rules
from safe_decode.bundle.probe_card import layout_in, probe_tensors_in
from safe_decode.certificate_choice import certificate_of
from safe_decode.errors import (
    BundleCorruptError,
    BundleError,
    CertificateError,
    ConfigurationError,
)
from safe_decode.monitor.config import MonitorConfig
from safe_decode.monitor.numpy_monitor import NumpyMonitorState, start_state, step_state
from safe_decode.probe.layout import ProbeLayout

__all__ = ["NumpyBundle", "NumpyMonitorState", "Scored", "start_state", "step_state"]

Floats = NDArray[np.float32]

_UNREADABLE = (
    OSError,
    SafetensorError,
    CertificateError,
    ConfigurationError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class Scored(NamedTuple):
    """What a response came to.

    Attributes:
        logits: [T + 1, K] float32.
        smoothed: [T + 1] float32.
        statistic: The running maximum at the end.
        alarm_step: First score whose statistic exceeds the threshold, or None.
    """

    logits: Floats
    smoothed: Floats
    statistic: float
    alarm_step: int | None


@dataclass(frozen=True, eq=False)
class NumpyBundle:
    """What scoring needs of a bundle.

    Attributes:
        sites: Where the features are read, in the order of the columns.
        layout: Names, shapes and arithmetic of the probe's kind.
        tensors: Of the probe, float32, by name.
        heads: K names.
        monitor: Logits to a statistic.
        threshold: Of the chosen certificate.
        digest: Of the bundle.
    """

    sites: tuple[Site, ...]
    layout: ProbeLayout
    tensors: Mapping[str, Floats]
    heads: tuple[str, ...]
    monitor: MonitorConfig
    threshold: float
    digest: str

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        alpha: float | None = None,
        population: str = "benign",
        dtype: str | None = None,
        tokens: int | None = None,
    ) -> NumpyBundle:
        """Read a bundle; digests are checked, and thresholds recomputed from their maxima.

        Args:
            path: Directory of the bundle.
            alpha: A certified level; None for the default.
            population: Whose responses the threshold speaks of.
            dtype: Number format of the model that the features come from; None: the one that
                the bundle was made in.
            tokens: Of an answer at most, see `certificate_of`; None: the largest cap.

        Raises:
            BundleError: There is no bundle.
            BundleCorruptError: Truncated, foreign, or changed since it was written.
            CertificateError: This level is not certified.
        """
        source = Path(path)
        if not (source / CARD).is_file():
            raise BundleError(f"path={source} holds no {CARD}; pass the directory of a bundle.")
        try:
            card = read_card(source)
            if "reasoning" in card:
                raise ConfigurationError(
                    "it has thresholds for reasoning, which need token ids; score it with torch"
                )
            tensors = load(checked_content(source, PROBE, card))
            arrays = load(checked_content(source, CALIBRATION, card))
            sites = tuple(Site(s["layer"], s["kind"], tuple(s["channels"])) for s in card["sites"])
            heads = tuple(card["heads"])
            monitor = MonitorConfig(**{k: tupled(v) for k, v in card["monitor"].items()})
            made_in = card["fingerprint"]
            made = number_format(made_in["dtype"], made_in["quantisation"])
            certificates = certificates_of(card["certificates"], arrays, made)
            require_plausible_rules(monitor, certificates)
            for certificate in certificates:
                certificate.verify()
            layout, own = layout_in(card), probe_tensors_in(card, tensors)
            _require_tensors(layout, own, n_features(sites), len(heads))
        except _UNREADABLE as error:
            raise BundleCorruptError(
                f"bundle {source} is corrupt: {error} (fetch or export the bundle again)."
            ) from error
        wanted = card["default_alpha"] if alpha is None else alpha
        found = certificate_of(certificates, wanted, population, dtype or made, tokens)
        return cls(sites, layout, own, heads, monitor, found.threshold, card["digest"])

    @property
    def n_features(self) -> int:
        """Channels that the probe reads, F."""
        return n_features(self.sites)

    def logits(self, features: NDArray[Any]) -> Floats:
        """Map features [..., F] to logits [..., K], float32.

        Raises:
            ConfigurationError: F is another than the probe's.
        """
        if features.shape[-1] != self.n_features:
            raise ConfigurationError(
                f"features have {features.shape[-1]} channels, the probe reads "
                f"{self.n_features}; pass those of its sites, in their order."
            )
        return self.layout.logits(self.tensors, features)

    def start(self, batch: int) -> NumpyMonitorState:
        """Begin rows."""
        return start_state(self.monitor, batch)

    def step(self, state: NumpyMonitorState, features: NDArray[Any]) -> NumpyMonitorState:
        """Consume the features of one score a row, [batch, F]."""
        return step_state(self.monitor, self.threshold, state, self.logits(features))

    def score(self, features: NDArray[Any]) -> Scored:
        """Score one finished response.

        Args:
            features: [T + 1, F], s_0 first.
        """
        logits = self.logits(features)
        state = self.start(1)
        smoothed, alarm = [], None
        for number, row in enumerate(logits):
            state = step_state(self.monitor, self.threshold, state, row[None])
            smoothed.append(float(state.smoothed[0]))
            if alarm is None and bool(state.alarm[0]):
                alarm = number
        return Scored(logits, np.asarray(smoothed, np.float32), float(state.statistic[0]), alarm)


def _require_tensors(
    layout: ProbeLayout, tensors: Mapping[str, Floats], channels: int, heads: int
) -> None:
    shapes = {name: one.shape for name, one in tensors.items()}
    layout.require_shapes(shapes, n_features=channels, n_heads=heads)
    for name, one in tensors.items():
        if one.dtype != np.float32 or not np.isfinite(one).all():
            raise ConfigurationError(
                f"{name} is {one.dtype} or holds NaN or infinite values, wanted finite float32"
            )
