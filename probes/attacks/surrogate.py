"""T2: a probe of the attacker's own, fitted on the attacked model's activations.

The attacker has the model but not the probe: reads whole residual layers, fits a probe on
labelled responses of his own, and searches a suffix against that. Whether it passes the
deployed guard is a matter of transfer.

Knows responses and residual sites. Does not know the deployed probe, its units or threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from probes.activations.harvest import harvest
from probes.attacks.objective import DetectorModel
from probes.calibration.statistic import maxima, smoothed_paths
from probes.data.conversations import Conversation
from probes.fitting.interface import FitSettings
from probes.fitting.linear import FitConfig
from probes.fitting.registry import fitter_for
from probes.metrics.detection import threshold_at
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, sorted_sites
from safe_decode.errors import DataError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["fit_surrogate", "residual_sites"]

_WINDOW = 4
_FALSE_ALARMS = 0.01
_SCALE_FLOOR = 1e-6


def residual_sites(model: CausalLM) -> tuple[Site, ...]:
    """Name every channel of every block's output, from the middle of the model on."""
    anatomy = anatomy_of(model)
    channels = tuple(range(anatomy.d_model))
    middle = len(anatomy.blocks) // 2
    return sorted_sites(
        Site(layer, "resid", channels) for layer in range(middle, len(anatomy.blocks))
    )


def fit_surrogate(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    *,
    fit: FitSettings | None = None,
) -> DetectorModel:
    """Fit a probe, a smoother and a threshold to labelled responses.

    Args:
        model: Whose activations are read.
        tokenizer: Its tokenizer.
        rows: The attacker's own; rows that are not judged are left out.
        fit: How the probe is fitted.

    Raises:
        DataError: One of the labels is missing.
    """
    judged = [row for row in rows if row.response_harmful is not None]
    labels = np.asarray([bool(row.response_harmful) for row in judged])
    if len(judged) < 2 or len(set(labels.tolist())) < 2:
        raise DataError("a surrogate needs harmful and harmless responses; give both.")
    features = harvest(model, tokenizer, judged, residual_sites(model))
    fitted = fitter_for(fit or FitConfig()).fit(features, labels.tolist())
    logits = [fitted.probe(torch.from_numpy(values)) for values in features.responses]
    plain = MonitorConfig(2 / (_WINDOW + 1), fitted.benign_mean, (0.0,), (1.0,), 0.0)
    peaks = maxima(smoothed_paths(logits, plain))[~labels]
    scale = max(float(peaks.std()), _SCALE_FLOOR)
    monitor = MonitorConfig(
        plain.smoothing, fitted.benign_mean, (float(peaks.mean()),), (scale,), 0.0
    )
    threshold = threshold_at((peaks - peaks.mean()) / scale, _FALSE_ALARMS)
    return DetectorModel(fitted.probe.to(model.device), monitor, threshold)
