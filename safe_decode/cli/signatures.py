"""`safe-decode sign` and `verify-signature`: who vouches for a bundle.

Knows the options and what is told. Does not know the format.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safe_decode.cli.console import console, print_json
from safe_decode.errors import ConfigurationError

__all__ = ["sign", "verify_signature"]

Bundle = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def sign(
    bundle: Bundle,
    key: Annotated[
        Path, typer.Option(help="Private key, a PEM file on the curve P-256, P-384 or P-521.")
    ],
    password_variable: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key's password.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle, and sign every file of its directory with a key of one's own."""
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.bundle.signing import sign_bundle

    loaded = ProbeBundle.load(bundle)
    written = sign_bundle(bundle, key, password=_password(password_variable))
    if as_json:
        print_json({"bundle": loaded.digest, "signature": str(written)})
        return
    console().print(f"signed {bundle} ({loaded.digest[:16]}): wrote {written}", soft_wrap=True)


def verify_signature(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="Public key of whoever is trusted, a PEM file.")],
    as_json: AsJson = False,
) -> None:
    """Check that a bundle was signed by a key, and is as it was signed."""
    from safe_decode.bundle.bundle import ProbeBundle

    loaded = ProbeBundle.load(bundle, trusted_key=key)
    if as_json:
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
