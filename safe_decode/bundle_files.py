"""The files of a bundle, and whether they are what was written.

card.json holds everything readable with digests of the other files and of itself. Knows
names, digests and the schema. Does not know tensors, so that a bundle can be read without
torch, or what the card's entries mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_decode.errors import BundleCorruptError

__all__ = [
    "CALIBRATION",
    "CARD",
    "FORMAT",
    "PROBE",
    "SCHEMA",
    "card_digest",
    "checked_content",
    "read_card",
    "tupled",
]

FORMAT = "safe-decode bundle"
SCHEMA = 1
_READ_SCHEMAS = (1, 2)
"""2: with a self-check of its own, or thresholds for reasoning."""
CARD, PROBE, CALIBRATION = "card.json", "probe.safetensors", "calibration.safetensors"


def card_digest(card: Mapping[str, Any]) -> str:
    """Digest a card's content, but for the digest in it."""
    rest = {key: value for key, value in card.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_card(source: Path) -> dict[str, Any]:
    """Read and check the card of a bundle.

    Raises:
        BundleCorruptError: It is no card, of another schema, or was changed.
        ValueError: It is not JSON, or holds a number that is not finite.
        OSError: There is no such file.
    """
    card: Any = json.loads((source / CARD).read_text("utf-8"), parse_constant=_refuse_constant)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise BundleCorruptError(
            f"bundle {source}: {CARD} does not say format={FORMAT!r}; pass the directory of a "
            "bundle."
        )
    if card.get("schema") not in _READ_SCHEMAS:
        known = " and ".join(map(str, _READ_SCHEMAS))
        raise BundleCorruptError(
            f"bundle {source} has schema {card.get('schema')!r}, this version reads {known}; use "
            "the safe-decode that wrote it, or export the bundle again."
        )
    found = card_digest(card)
    if card.get("digest") != found:
        raise BundleCorruptError(
            f"bundle {source}: {CARD} has digest {found[:12]}, wanted "
            f"{str(card.get('digest'))[:12]}; it was changed by hand, which its certificates do "
            "not cover. Export the bundle again, or pass other texts to SafeDecoder."
        )
    return card


def checked_content(source: Path, name: str, card: Mapping[str, Any]) -> bytes:
    """Read a file of a bundle whole.

    Raises:
        BundleCorruptError: Its digest is not the card's.
        OSError: There is no such file.
    """
    content = (source / name).read_bytes()
    found, wanted = hashlib.sha256(content).hexdigest(), card["files"][name]
    if found != wanted:
        raise BundleCorruptError(
            f"bundle {source}: {name} ({len(content)} bytes) has sha256 {found[:12]}, wanted "
            f"{wanted[:12]}; it is truncated or from another bundle. Fetch the bundle again."
        )
    return content


def tupled(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Make a tuple of a JSON array; leave everything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{CARD} holds {name}, wanted finite numbers")
