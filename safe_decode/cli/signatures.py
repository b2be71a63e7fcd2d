"""`safe-decode sign` and `verify-signature`: who vouches for a bundle.

Knows the options and what is told. Does not know the format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json
from safe_decode.cli.options import JsonOptions, RequiredBundle
from safe_decode.errors import ConfigurationError

__all__ = ["sign", "verify_signature"]


@dataclass(frozen=True, kw_only=True)
class SignOptions(RequiredBundle, JsonOptions):
    """Options of `safe-decode sign`."""

    key: Annotated[
        Path,
        typer.Option(help="Private key that signs, a PEM file on the curve P-256, P-384 or P-521."),
    ]
    password_variable: Annotated[
        str | None,
        typer.Option(
            help="Environment variable that holds the password of the private key. Without it: "
            "the key has no password."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class VerifySignatureOptions(RequiredBundle, JsonOptions):
    """Options of `safe-decode verify-signature`."""

    key: Annotated[
        Path, typer.Option(help="Public key that must have signed the bundle, a PEM file.")
    ]


@command("Tools")
def sign(options: SignOptions) -> None:
    """Check a bundle, and sign every file of its directory with a key of one's own."""
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.bundle.signing import sign_bundle

    bundle = options.named
    loaded = ProbeBundle.load(bundle)
    password = _password(options.password_variable)
    written = sign_bundle(bundle, options.key, password=password)
    if options.as_json:
        print_json({"bundle": loaded.digest, "signature": str(written)})
        return
    console().print(f"signed {bundle} ({loaded.digest[:16]}): wrote {written}", soft_wrap=True)


@command("Tools")
def verify_signature(options: VerifySignatureOptions) -> None:
    """Check that a bundle was signed by a key, and is as it was signed."""
    from safe_decode.bundle.bundle import ProbeBundle

    bundle, key = options.named, options.key
    loaded = ProbeBundle.load(bundle, trusted_key=key)
    if options.as_json:
        print_json({"bundle": loaded.digest, "verified": True, "key": str(key)})
        return
    console().print(
        f"verified: {bundle} ({loaded.digest[:16]}) is as the key {key} signed it.", soft_wrap=True
    )


def _password(variable: str | None) -> bytes | None:
    if variable is None:
        return None
    if variable not in os.environ:
        raise ConfigurationError(
            f"--password-variable={variable!r} names no environment variable; set it."
        )
    return os.environ[variable].encode()
