"""Keys that sign: elliptic-curve keys in PEM files, on the curves of OpenSSF model signing.

Knows `cryptography`, which is imported where it is used. Does not know what is signed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

__all__ = ["ecdsa_of", "key_digest", "private_key_of", "public_key_of"]

_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def private_key_of(path: Path, password: bytes | None) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        ConfigurationError: It cannot be read, or is of another kind.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the private key {path} cannot be read: {error}; pass a PEM file, and its password "
            "if it has one."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise ConfigurationError(
            f"the private key {path} is of another kind, wanted an elliptic-curve key on one of "
            f"{_CURVES}; make one with `openssl ecparam -name prime256v1 -genkey -noout`."
        )
    return key


def public_key_of(path: Path) -> EllipticCurvePublicKey:
    """Read a public key. Raises as `private_key_of`."""
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the public key {path} cannot be read: {error}; pass the PEM file that "
            "`openssl ec -in private.pem -pubout` writes."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise ConfigurationError(
            f"the public key {path} is of another kind, wanted an elliptic-curve key on one of "
            f"{_CURVES}."
        )
    return key


def _require_cryptography() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigurationError(
            "cryptography is missing; install it with: pip install 'safe-decode[signing]'"
        )


def ecdsa_of(key: EllipticCurvePublicKey) -> ECDSA:
    """Return how a key signs: by the hash that belongs to its curve."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    kinds: dict[int, hashes.HashAlgorithm] = {
        256: hashes.SHA256(),
        384: hashes.SHA384(),
        521: hashes.SHA512(),
    }
    return ec.ECDSA(kinds[key.curve.key_size])


def key_digest(key: EllipticCurvePublicKey) -> str:
    """Digest a public key as the format does."""
    from cryptography.hazmat.primitives import serialization

    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()
