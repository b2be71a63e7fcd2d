"""The errors of safe-decode, one tree.

Every error is a `SafeDecodeError`. A message names the argument or thing, the
value got, the value wanted and the remedy.

    SafeDecodeError
      ConfigurationError        an argument or combination of arguments is wrong
        UnsupportedError        this configuration would skip the guard; refused by name
      PromptError               the prompt is empty, too long, or has no chat template
      BundleError               a bundle cannot be read or does not fit
        BundleCorruptError      truncated, foreign schema, NaN in the weights
        FingerprintMismatchError  made for another model, tokenizer, template or dtype
        SignatureError          unsigned, signed by another key, or changed since
        CertificateError        alpha not certified, or a certificate does not recompute
      GuardError                something failed while generating; the row ends closed
        BeatError               a content token has no fresh score, or more than one
        NonFiniteError          NaN or Inf in an activation, a logit or a statistic
        ForcedTokenError        a forced token id did not arrive
        CanaryError             the known prompt does not yield the known scores
      DataError                 a data file or record cannot be used
"""

from __future__ import annotations

__all__ = [
    "BeatError",
    "BundleCorruptError",
    "BundleError",
    "CanaryError",
    "CertificateError",
    "ConfigurationError",
    "DataError",
    "FingerprintMismatchError",
    "FetchError",
    "ForcedTokenError",
    "GuardError",
    "NonFiniteError",
    "PromptError",
    "SafeDecodeError",
    "SignatureError",
    "UnsupportedError",
    "as_guard_error",
]


class SafeDecodeError(Exception):
    """Root of every error raised on purpose by safe-decode."""


class ConfigurationError(SafeDecodeError, ValueError):
    """An argument, or a combination of arguments, is wrong."""


class UnsupportedError(ConfigurationError):
    """The configuration would skip the guard, so it is refused before the first token."""


class PromptError(SafeDecodeError, ValueError):
    """The prompt is empty, longer than the context, or cannot be put into a chat template."""


class BundleError(SafeDecodeError):
    """A bundle cannot be read, written or used with this model."""


class BundleCorruptError(BundleError):
    """The bundle is truncated, of a foreign schema, or holds non-finite weights."""


class FingerprintMismatchError(BundleError):
    """The bundle was made for another model, tokenizer, template or dtype."""


class SignatureError(BundleError):
    """The bundle is not signed by the trusted key, or not as it is."""


class CertificateError(BundleError):
    """An alpha is not certified, or a certificate does not recompute from its maxima."""


class GuardError(SafeDecodeError, RuntimeError):
    """Something failed while generating; the affected rows end closed."""


class BeatError(GuardError):
    """A content token has no fresh score, or more than one."""


class NonFiniteError(GuardError):
    """An activation, logit or statistic is NaN or infinite."""


class ForcedTokenError(GuardError):
    """A forced token id did not arrive: another processor ran after the guard's."""


class CanaryError(GuardError):
    """The canary prompt does not yield the scores stored in the bundle."""


class FetchError(SafeDecodeError):
    """A model could not be fetched, or what was fetched is not what was asked for."""


class DataError(SafeDecodeError, ValueError):
    """A data file, or a record in it, cannot be used."""


def as_guard_error(error: Exception) -> GuardError:
    """Make one tree of what may fail while judging."""
    if isinstance(error, GuardError):
        return error
    wrapped = GuardError(f"the guard failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
