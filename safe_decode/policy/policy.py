"""What is to happen to a row: its redirect, its hold-back, and what counts as a trip.

Knows the choices and their limits. Does not know thresholds' origin, models or text.
Without a self-check, every alarm is a trip, and a trip is a latch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from torch import Tensor

from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError
from safe_decode.policy.redirect import REDIRECTS, RedirectRule

__all__ = ["MAX_TRIES", "OnError", "Policy", "RequestPolicy"]

OnError = Literal["close", "allow"]
"""close: a row whose guard fails is redirected. allow: it goes on unguarded, and its trace
says so."""

MAX_TRIES = 2
"""Continuations a rewound row may have before the canned text. Each try resamples under the
probe, which selects for what the probe misses, so there are few."""


@dataclass(frozen=True)
class Policy:
    """The decisions that hold for the rows of one call.

    Attributes:
        redirect: What a tripped row emits.
        holdback_tokens: k; a token is released when it and the next k are judged.
        on_error: What happens to a row whose guard fails.
        max_tries: Continuations before the canned text, in 1..2; used by rewind only.

    Raises:
        ConfigurationError: A value outside its choices.
    """

    redirect: Redirect = "rewind"
    holdback_tokens: int = 0
    on_error: OnError = "close"
    max_tries: int = MAX_TRIES

    def __post_init__(self) -> None:
        if self.redirect not in REDIRECTS:
            raise ConfigurationError(
                f"redirect={self.redirect!r} is not one of {tuple(REDIRECTS)}; pass one."
            )
        if self.on_error not in get_args(OnError):
            raise ConfigurationError(
                f"on_error={self.on_error!r} is not one of {get_args(OnError)}; pass one."
            )
        if self.holdback_tokens < 0:
            raise ConfigurationError(
                f"holdback_tokens={self.holdback_tokens} is negative; pass 0 or more tokens."
            )
        if not 1 <= self.max_tries <= MAX_TRIES:
            raise ConfigurationError(
                f"max_tries={self.max_tries} is outside 1..{MAX_TRIES}; pass one of these."
            )

    @property
    def rule(self) -> RedirectRule:
        """What its redirect does."""
        return REDIRECTS[self.redirect]

    @property
    def protects(self) -> bool:
        """Say whether a trip changes what the reader gets."""
        return self.rule.protects

    @property
    def unseen_tokens(self) -> int:
        """Count the tokens that are to be judged behind a response which others end."""
        return self.holdback_tokens if self.protects else 0

    def trips(self, alarm: Tensor, finite: Tensor) -> Tensor:
        """Turn alarms into trips.

        Args:
            alarm: [batch] bool.
            finite: [batch] bool, False where the row's numbers are NaN or Inf: a row that
                cannot be judged is treated as a trip, unless errors are allowed.

        Returns:
            [batch] bool. In flag mode too: the caller records these and parks nothing.
        """
        # On booleans, a >= b is a | ~b: one operation on the path of every token.
        return alarm >= finite if self.on_error == "close" else alarm & finite


@dataclass(frozen=True)
class RequestPolicy:
    """What one request may choose for its row. None: as the decoder has it.

    It comes from a request's metadata, set by whoever runs the service, never from its text.

    Attributes:
        alpha: A certified false-alarm level.
        redirect: What a tripped row emits.
        holdback_tokens: k.
        refusal: Canned text of this row.
        is_structured: The answer is JSON, a tool call or the like: a trip stops it, since
            words spliced into it would be read as data. flag stays flag.

    Raises:
        ConfigurationError: A value outside its choices.
    """

    alpha: float | None = None
    redirect: Redirect | None = None
    holdback_tokens: int | None = None
    refusal: str | None = None
    is_structured: bool = False

    def __post_init__(self) -> None:
        self.applied_to(Policy())
        if self.refusal is not None and not self.refusal.strip():
            raise ConfigurationError(
                f"refusal={self.refusal!r} is empty; pass a text that readers get."
            )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> RequestPolicy:
        """Read a policy from a request's metadata.

        Args:
            metadata: Names and values of this class's attributes, each optional.

        Raises:
            ConfigurationError: A name that is none of them, or a value of another type.
        """
        kinds: dict[str, tuple[type, ...]] = {
            "alpha": (float,),
            "redirect": (str,),
            "holdback_tokens": (int,),
            "refusal": (str,),
            "is_structured": (bool,),
        }
        unknown = sorted(set(metadata) - set(kinds))
        if unknown:
            raise ConfigurationError(
                f"policy has {', '.join(map(repr, unknown))}, wanted some of "
                f"{', '.join(field.name for field in fields(cls))}; leave others out."
            )
        for name, value in metadata.items():
            if value is not None and type(value) not in kinds[name]:
                wanted = " or ".join(kind.__name__ for kind in kinds[name])
                raise ConfigurationError(
                    f"{name}={value!r} of the policy is a {type(value).__name__}, wanted {wanted}."
                )
        given = {name: value for name, value in metadata.items() if value is not None}
        return cls(**given)  # type: ignore[arg-type]  # types are checked above

    def applied_to(self, policy: Policy) -> Policy:
        """Return a decoder's policy with this request's choices in it."""
        redirect = policy.redirect if self.redirect is None else self.redirect
        if self.is_structured:
            redirect = REDIRECTS[redirect].if_structured
        k = policy.holdback_tokens if self.holdback_tokens is None else self.holdback_tokens
        return replace(policy, redirect=redirect, holdback_tokens=k)
