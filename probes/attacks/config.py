"""What is attacked with: threats, arms, budgets and seeds, in one frozen place.

Knows defaults and what twice a budget is. Does not know how anything is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from probes.attacks.black_box import BlackBoxConfig
from probes.attacks.gcg import SuffixConfig
from probes.attacks.objective import Weights
from probes.attacks.results import AttackArm, Threat
from probes.attacks.soft_prompt import SoftConfig
from safe_decode.errors import ConfigurationError

__all__ = ["ARMS", "AttackConfig"]

ARMS: Mapping[Threat, tuple[AttackArm, ...]] = {
    "T1": ("guarded", "bare"),
    "T2": ("guarded",),
    "T3": ("guarded", "bare", "random"),
    "T4": ("guarded", "bare"),
}
"""T2 and T3 aim at the same bare model, so they share that arm."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """What is run and with what budget.

    Attributes:
        threats: See the package.
        arms: Arms to leave in; those a threat does not have are passed over.
        black_box: Of T1.
        suffix: Of T2 and T3.
        soft: Of T4.
        weights: Of the loss.
        target_tokens: Tokens of the target whose likelihood is raised, and over which the
            statistic is kept down.
        redirect_weight: Of the same target behind the opener, where the guard rewinds; 0
            leaves the redirect out of account.
        max_new_tokens: Cap of an answer; None: the certified one.
        samples: Continuations drawn for each candidate.
        temperature: Of the draws.
        seed: Of searches and draws.
        keeps_prompts: Whether records hold the prompts that were found.
    """

    threats: tuple[Threat, ...] = ("T1", "T2", "T3", "T4")
    arms: tuple[AttackArm, ...] = ("guarded", "bare", "random")
    black_box: BlackBoxConfig = field(default_factory=BlackBoxConfig)
    suffix: SuffixConfig = field(default_factory=SuffixConfig)
    soft: SoftConfig = field(default_factory=SoftConfig)
    weights: Weights = field(default_factory=Weights)
    target_tokens: int = 48
    redirect_weight: float = 0.5
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    keeps_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.threats or self.target_tokens < 1 or self.redirect_weight < 0:
            raise ConfigurationError(
                f"threats={self.threats}, target_tokens={self.target_tokens}, redirect_weight="
                f"{self.redirect_weight}: wanted a threat, at least 1 and at least 0."
            )

    def doubled(self) -> AttackConfig:
        """Return the same attacks with twice the budget of every search and query."""
        twice = replace(self.black_box, queries=2 * self.black_box.queries)
        return replace(
            self, black_box=twice, suffix=self.suffix.doubled(), soft=self.soft.doubled()
        )
