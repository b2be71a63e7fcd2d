"""Statistics to try, before offset, scale and start are known.

Knows their kinds and sizes. Does not know logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safe_decode.errors import ConfigurationError
from safe_decode.monitor.config import MonitorConfig, StatisticKind

__all__ = ["STATISTICS", "StatisticChoice", "statistics_of"]


@dataclass(frozen=True, slots=True)
class StatisticChoice:
    """A statistic to try, before offset, scale and start are known.

    Attributes:
        kind: See `StatisticKind`.
        window: Logits of the mean or of a window, that the moving average matches, or that the
            prior counts for; without meaning for `cusum`.
        memory: Logits that the moving average of a bank matches.
        drift: What a sum forgives at each step, in standard deviations of harmless logits.
        hits: Values in a row above the threshold.
        best: Windows that have to agree, for `top`.
        even: Spend false alarms evenly over positions; see `probes.fitting.boundary`.
    """

    kind: StatisticKind = "ema"
    window: int = 1
    drift: float = 0.0
    hits: int = 1
    best: int = 1
    even: bool = False
    memory: int = 64

    def __str__(self) -> str:
        """Name the choice in tables."""
        name = f"cusum-{self.drift:g}" if self.kind == "cusum" else f"{self.kind}-{self.window}"
        if self.kind == "top":
            name = f"top-{self.best}x{self.window}"
        if self.kind == "bank":
            name = f"bank-{self.window}+{self.memory}"
        name += " even" if self.even else ""
        return name if self.hits == 1 else f"{name}x{self.hits}"

    @property
    def levels(self) -> tuple[StatisticChoice, ...]:
        """The statistic of each level of a head."""
        if self.kind != "bank":
            return (self,)
        mean, average = StatisticChoice("shrunk", self.window), StatisticChoice("ema", self.memory)
        return mean, average

    def monitor(
        self,
        start: tuple[float, ...],
        offset: tuple[float, ...],
        scale: tuple[float, ...],
        sd: float,
    ) -> MonitorConfig:
        """Set up a monitor with the low mark at 0; `sd` is the spread of harmless logits."""
        memory = {"ema": self.window, "bank": self.memory}.get(self.kind, 1)
        return MonitorConfig(
            2 / (memory + 1),
            start,
            offset,
            scale,
            0.0,
            kind=self.kind,
            window=self.window if self.kind in ("mean", "shrunk", "top", "bank") else 1,
            drift=self.drift * sd if self.kind == "cusum" else 0.0,
            hits=self.hits,
            best=self.best if self.kind == "top" else 1,
        )


STATISTICS: Mapping[str, tuple[StatisticChoice, ...]] = {
    "ema": tuple(StatisticChoice("ema", window) for window in (1, 2, 4, 8, 16)),
    "mean": tuple(StatisticChoice("mean", window) for window in (4, 8, 16)),
    "cusum": tuple(StatisticChoice("cusum", drift=drift) for drift in (0.5, 1.0, 2.0)),
    "shrunk": tuple(StatisticChoice("shrunk", window) for window in (8, 16, 32, 128)),
    "top": tuple(
        StatisticChoice("top", window, best=best) for window, best in ((16, 2), (16, 4), (32, 2))
    ),
    "bank": tuple(StatisticChoice("bank", 16, memory=memory) for memory in (32, 64)),
    "even": (
        StatisticChoice("ema", 16, even=True),
        StatisticChoice("shrunk", 16, even=True),
        StatisticChoice("shrunk", 128, even=True),
        StatisticChoice("top", 16, best=4, even=True),
    ),
    "hysteresis": tuple(
        StatisticChoice("ema", window, hits=hits) for window, hits in ((1, 2), (1, 3), (4, 2))
    ),
}


def statistics_of(names: Sequence[str] | None) -> tuple[StatisticChoice, ...]:
    """Name the statistics to try.

    Args:
        names: Keys of `STATISTICS`; None for all.

    Raises:
        ConfigurationError: There is no such statistic.
    """
    if unknown := [name for name in names or () if name not in STATISTICS]:
        raise ConfigurationError(
            f"statistic={unknown[0]!r} is not one of {tuple(STATISTICS)}; pass one of these."
        )
    return tuple(choice for name in names or STATISTICS for choice in STATISTICS[name])
