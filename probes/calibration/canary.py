"""The known exchange that a bundle keeps with its scores, and how far they may differ.

Knows a harmless response, spreads of the statistic and number formats. Does not know thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from probes.data.conversations import Conversation
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.errors import CanaryError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.probe.interface import Probe
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["canary_again", "canary_of"]

# In float32, rounding of other kernels is far below a twentieth of the benign spread, a missing
# hook or another model far above it. bfloat16 keeps 2^-8 of a value, float32 2^-24: on the embedded
# model, padding or steps with a cache move its scores by up to a tenth of the spread.
_SHARE_OF_SPREAD = 0.05
_SHARE_IN_NARROW_FORMATS = 0.25
_SMALLEST_TOLERANCE = 1e-3


def canary_of(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    probe: Probe,
    monitor: MonitorConfig,
) -> CanaryRecord:
    """Record the scores of a harmless exchange, to be compared wherever the bundle is loaded.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        rows: Judged responses; the first harmless one is taken.
        probe: On any device.
        monitor: Whose benign spread says how far a score may differ.
    """
    row = next(row for row in rows if row.response_harmful is False and row.response)
    return CanaryRecord.of(
        model,
        tokenizer,
        probe.to(next(model.parameters()).device),
        prompt=row.prompt,
        response=row.response,
        tolerance=_tolerance(model, monitor),
    )


def canary_again(
    model: CausalLM,
    tokenizer: Tokenizer,
    before: CanaryRecord,
    probe: Probe,
    monitor: MonitorConfig,
) -> CanaryRecord:
    """Record a canary's exchange anew, on its model in other numbers.

    Args:
        model: The same model, loaded in another number format.
        tokenizer: Its tokenizer.
        before: As it was recorded.
        probe: On any device.
        monitor: As for `canary_of`.

    Raises:
        CanaryError: A score differs by more than a benign standard deviation: that is no
            rounding, but another model.
    """
    probe = probe.to(next(model.parameters()).device)
    spread = max(monitor.scale)
    try:
        difference = replace(before, tolerance=spread).run(model, tokenizer, probe)
    except CanaryError as error:
        raise CanaryError(
            f"the model at hand is not the bundle's in other numbers: {error} A benign standard "
            f"deviation is {spread:.3g}; make a bundle for this model with `safe-decode fit`."
        ) from error
    # What this format's rounding moves, its kernels may move as well.
    tolerance = min(max(_tolerance(model, monitor), 2 * difference), spread)
    return CanaryRecord.of(
        model,
        tokenizer,
        probe,
        prompt=before.prompt,
        response=before.response,
        tolerance=max(tolerance, _SMALLEST_TOLERANCE),
    )


def _tolerance(model: CausalLM, monitor: MonitorConfig) -> float:
    widths = [p.element_size() for p in model.parameters()]
    share = _SHARE_OF_SPREAD if min(widths) >= 4 else _SHARE_IN_NARROW_FORMATS
    return max(share * max(monitor.scale), _SMALLEST_TOLERANCE)
