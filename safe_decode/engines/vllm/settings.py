"""What the operator sets for the guard of an engine: the bundle, and how it is used.

Read from the environment, since vLLM's own processes inherit it and since it is known before the
engine's configuration exists. The names are those of `safe-decode serve`. Knows names, values and
the bundle. Does not know vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.measured import MeasuredFormat, require_certified
from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError, FingerprintMismatchError, UnsupportedError
from safe_decode.policy.policy import Policy
from safe_decode.policy.redirect import REDIRECTS

__all__ = ["EngineSettings", "settings_in_force"]


@dataclass(frozen=True, eq=False)
class EngineSettings:
    """The operator's settings.

    Attributes:
        bundle: What guards the engine.
        alpha: Level of the certificate whose threshold is used.
        population: Whose certificate that is.
        redirect: What a tripped row emits.
    """

    bundle: ProbeBundle
    alpha: float
    population: str
    redirect: Redirect

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> EngineSettings:
        """Read the settings.

        Args:
            environ: With SAFE_DECODE_BUNDLE, and perhaps SAFE_DECODE_ALPHA,
                SAFE_DECODE_POPULATION, SAFE_DECODE_REDIRECT and SAFE_DECODE_REQUIRE_SIGNATURE.

        Raises:
            ConfigurationError: A value that cannot be read.
            UnsupportedError: A bundle or a redirect that the engine does not serve.
            BundleError: The bundle cannot be read.
            CertificateError: The level is not certified.
        """
        path = environ["SAFE_DECODE_BUNDLE"]
        bundle = ProbeBundle.load(path, trusted_key=environ.get("SAFE_DECODE_REQUIRE_SIGNATURE"))
        alpha = _alpha(environ.get("SAFE_DECODE_ALPHA"), bundle.default_alpha)
        population = environ.get("SAFE_DECODE_POPULATION", "benign")
        redirect = environ.get("SAFE_DECODE_REDIRECT", "refuse")
        _require_servable(bundle, path)
        if environ.get("SAFE_DECODE_HOLDBACK_TOKENS", "0") != "0":
            raise UnsupportedError(
                f"SAFE_DECODE_HOLDBACK_TOKENS={environ['SAFE_DECODE_HOLDBACK_TOKENS']} is refused "
                "in vLLM: the engine streams by itself and nothing is held back; unset it, or "
                "serve with `safe-decode serve`."
            )
        for dtype in bundle.dtypes:
            bundle.certificate(alpha, population, dtype)
        if redirect not in get_args(Redirect):
            raise ConfigurationError(
                f"SAFE_DECODE_REDIRECT={redirect!r} is not one of {', '.join(get_args(Redirect))}; "
                "set one of these."
            )
        known: Redirect = redirect  # type: ignore[assignment]  # checked above
        if REDIRECTS[known].resumes:
            raise UnsupportedError(
                f"SAFE_DECODE_REDIRECT={redirect} is refused in vLLM: an engine cannot take tokens "
                "back; set refuse, stop or flag, or serve with `safe-decode serve`."
            )
        return cls(bundle, alpha, population, known)

    def measured_in(self, dtype: torch.dtype) -> MeasuredFormat:
        """Find what the bundle has measured in the numbers of an engine, which has one dtype.

        Raises:
            FingerprintMismatchError: Nothing; what was measured is named.
        """
        name = str(dtype).removeprefix("torch.")
        found = next((one for one in self.bundle.measured if one.dtype == name), None)
        if found is not None:
            return found
        require_certified(self.bundle.dtypes, name)
        raise FingerprintMismatchError(
            f"dtype={name} is not certified alone: the bundle holds certificates for "
            f"{', '.join(self.bundle.dtypes)}, and an engine of vLLM computes in one dtype; "
            f"certify it with `safe-decode calibrate --dtype {name}`."
        )

    @property
    def policy(self) -> Policy:
        """The operator's policy. Nothing is held back: the engine streams by itself."""
        return Policy(self.redirect, holdback_tokens=0)


def settings_in_force() -> EngineSettings:
    """Read the settings of this process; a bundle that was read already is not read again."""
    names = (
        *("BUNDLE", "ALPHA", "POPULATION", "REDIRECT", "REQUIRE_SIGNATURE"),
        "HOLDBACK_TOKENS",
    )
    given = ((name, os.environ.get(f"SAFE_DECODE_{name}")) for name in names)
    return _read(tuple((f"SAFE_DECODE_{name}", value) for name, value in given if value))


@lru_cache(maxsize=1)
def _read(given: tuple[tuple[str, str], ...]) -> EngineSettings:
    return EngineSettings.read(dict(given))


def _alpha(text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(
            f"SAFE_DECODE_ALPHA={text!r} is not a number; set a certified level such as 0.01."
        ) from None


def _require_servable(bundle: ProbeBundle, path: str) -> None:
    if bundle.reasoning is not None:
        raise UnsupportedError(
            f"SAFE_DECODE_BUNDLE={path} is refused in vLLM: it has thresholds for reasoning, and "
            "spans are not followed in the engine; use a bundle without them."
        )
    without = [one.dtype for one in bundle.measured if one.canary is None]
    if without:
        raise UnsupportedError(
            f"SAFE_DECODE_BUNDLE={path} has no canary for {', '.join(without)}, so nothing would "
            "show that the engine reads what was certified; make the bundle anew."
        )
