"""Who vouches for a bundle: a signature over every file of its directory, by a key of one's own.

The format is that of OpenSSF model signing v1.0 with elliptic-curve keys: `model.sig` is a
Sigstore bundle around a DSSE envelope, whose in-toto statement lists each file with its sha256.
Tools of that standard check what is signed here, and what they sign is checked here. Nothing
is asked of the network, and no key is trusted but the one that is passed.

All files of the directory are covered, below it too, but for the signature and what git keeps
there. A file that is not covered is refused, although it would not be read.

Knows files and the format. Does not know what the files mean, or kinds of keys. Needs the extra
`signing`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_decode.bundle.signing_keys import ecdsa_of, key_digest, private_key_of, public_key_of
from safe_decode.errors import SignatureError
from safe_decode.whole_files import write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

__all__ = ["SIGNATURE", "is_signed", "require_signed", "sign_bundle"]

SIGNATURE = "model.sig"
_IGNORED = (".git", ".gitattributes", ".github", ".gitignore")
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_MOST_BYTES = 16 << 20


def is_signed(source: Path) -> bool:
    """Say whether there is a signature, whoever made it."""
    return (source / SIGNATURE).is_file()


def sign_bundle(source: Path, private_key: Path, *, password: bytes | None = None) -> Path:
    """Sign every file of a directory; an earlier signature is replaced.

    Args:
        source: The bundle's directory.
        private_key: PEM file of an elliptic-curve key: P-256, P-384 or P-521.
        password: Of the key file, where it has one.

    Returns:
        The file of the signature.

    Raises:
        ConfigurationError: The key cannot be used.
        SignatureError: The directory cannot be read or written.
    """
    key = private_key_of(private_key, password)
    try:
        payload = json.dumps(_statement(source.resolve().name, _digests(source))).encode()
        record = {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": key_digest(key.public_key())},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": _base64(payload),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [
                    {"sig": _base64(key.sign(_signed(payload), ecdsa_of(key.public_key())))}
                ],
            },
        }
        write_whole(source / SIGNATURE, json.dumps(record))
    except OSError as error:
        raise SignatureError(f"bundle {source} cannot be signed: {error}.") from error
    return source / SIGNATURE


def require_signed(
    source: Path, trusted_key: str | Path, contents: Mapping[str, bytes] | None = None
) -> str:
    """Check that a key signed a directory as it is.

    Args:
        source: The bundle's directory.
        trusted_key: PEM file of the public key.
        contents: Of files that were read already, by name: what is used is what is checked.

    Returns:
        The key's digest.

    Raises:
        ConfigurationError: The key cannot be used.
        SignatureError: There is no signature, it is another key's, it is damaged, or a file
            was changed, is missing or is not covered.
    """
    key = public_key_of(Path(trusted_key))
    if not is_signed(source):
        raise SignatureError(
            f"bundle {source} is unsigned, wanted a signature by the key {trusted_key}; sign it "
            "with `safe-decode sign`, or fetch the signed bundle."
        )
    payload = _verified_payload(source, key, trusted_key)
    try:
        wanted = _listed(json.loads(payload))
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise SignatureError(
            f"bundle {source}: what {SIGNATURE} signs is no list of files ({error}); sign the "
            "bundle again."
        ) from error
    try:
        found = _digests(source)
    except OSError as error:
        raise SignatureError(f"bundle {source} cannot be read: {error}.") from error
    found |= {
        name: hashlib.sha256(content).hexdigest() for name, content in (contents or {}).items()
    }
    _require_same(source, wanted, found)
    return key_digest(key)


def _require_same(source: Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    problems = {
        "is missing": sorted(wanted.keys() - found.keys()),
        "was changed": sorted(
            name for name in wanted.keys() & found.keys() if wanted[name] != found[name]
        ),
        "is not covered": sorted(found.keys() - wanted.keys()),
    }
    told = [f"{name} {what}" for what, names in problems.items() for name in names]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        raise SignatureError(
            f"bundle {source} is not as it was signed: {', '.join(told[:5])}{more}; fetch the "
            "bundle again, or look at the change and sign it anew."
        )


def _verified_payload(source: Path, key: EllipticCurvePublicKey, name: str | Path) -> bytes:
    from cryptography.exceptions import InvalidSignature

    try:
        content = (source / SIGNATURE).read_bytes()
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        record = json.loads(content)
        envelope = record["dsseEnvelope"]
        (one,) = envelope["signatures"]
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise ValueError(f"payloadType is {envelope['payloadType']!r}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(one["sig"], validate=True)
        hint = record["verificationMaterial"].get("publicKey", {}).get("hint")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SignatureError(
            f"bundle {source}: {SIGNATURE} cannot be read ({error}); it is damaged or was not made "
            "with a key of one's own. Fetch the bundle again."
        ) from error
    if hint and hint != key_digest(key):
        raise SignatureError(
            f"bundle {source} is signed by the key {str(hint)[:16]}, wanted {key_digest(key)[:16]} "
            f"({name}); pass the key of whoever you trust, or fetch their bundle."
        )
    try:
        key.verify(signature, _signed(payload), ecdsa_of(key))
    except InvalidSignature as error:
        raise SignatureError(
            f"bundle {source}: {SIGNATURE} does not hold for the key {name}: it was changed, or "
            "another key made it. Fetch the bundle again."
        ) from error
    return payload


def _digests(source: Path) -> dict[str, str]:
    """Digest every file that a signature covers, by its path with slashes."""

    def refuse(error: OSError) -> None:
        raise error

    found = {}
    for folder, folders, files in os.walk(source, onerror=refuse):
        here = Path(folder)
        if here == source:
            folders[:] = [name for name in folders if name not in _IGNORED]
        for name in (*files, *(one for one in folders if (here / one).is_symlink())):
            path = (here / name).relative_to(source).as_posix()
            if path == SIGNATURE or path in _IGNORED:
                continue
            # A link to a file is what it leads to; a link to a directory fails to open.
            with (here / name).open("rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _statement(name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    ordered = dict(sorted(digests.items()))
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(ordered)}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE, *_IGNORED],
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest}
                for path, digest in ordered.items()
            ],
        },
    }


def _listed(statement: Mapping[str, Any]) -> dict[str, str]:
    """Read the files of a statement, and check that it is one of this kind."""
    for name, wanted in (("_type", _STATEMENT_TYPE), ("predicateType", _PREDICATE_TYPE)):
        if statement[name] != wanted:
            raise ValueError(f"{name} is {statement[name]!r}, wanted {wanted!r}")
    found: dict[str, str] = {}
    for one in statement["predicate"]["resources"]:
        if one["algorithm"] != "sha256" or one["name"] in found:
            raise ValueError(f"{one['name']!r} is listed twice or not by its sha256")
        found[str(one["name"])] = str(one["digest"])
    if statement["subject"][0]["digest"]["sha256"] != _root(found):
        raise ValueError("its files do not yield its digest")
    return found


def _root(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests.values()))).hexdigest()


def _signed(payload: bytes) -> bytes:
    """Return what is signed: DSSE's encoding of a payload and its type."""
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
