"""The files of a bundle, and whether they are what was written.

card.json holds everything readable with digests of the other files and of itself. Each file
is read once, so that what was checked is what is used. Knows names, digests and the schema.
Does not know tensors, so that a bundle can be read without torch, or what the card's entries
mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_decode.errors import BundleCorruptError

__all__ = [
    "CALIBRATION",
    "CARD",
    "FILES",
    "FORMAT",
    "PROBE",
    "SCHEMA",
    "card_digest",
    "checked_content",
    "is_bundle",
    "parse_card",
    "read_card",
    "read_file",
    "tupled",
]

FORMAT = "safe-decode bundle"
SCHEMA = 1
WITH_FURTHER, WITH_EVIDENCE, WITH_KIND, WITH_PAST = 2, 3, 4, 5
_READ_SCHEMAS = (SCHEMA, WITH_FURTHER, WITH_EVIDENCE, WITH_KIND, WITH_PAST)
"""2: with a self-check of its own, or thresholds for reasoning. 3: with the writers and the
lengths of the calibration responses; without them both are said to be unrecorded. 4: with a
probe of another kind than linear. 5: with the prompts it was made from, the day, a statistic of
the kind shrunk or top, or certified in more than one number format."""
CARD, PROBE, CALIBRATION = "card.json", "probe.safetensors", "calibration.safetensors"
FILES = (PROBE, CALIBRATION, CARD)
"""In the order in which they are replaced: the card, which names the others, comes last."""

_MOST_BYTES = {CARD: 64 << 20, PROBE: 1 << 30, CALIBRATION: 1 << 30}
"""Far above what a probe on every channel of the largest models takes."""


def card_digest(card: Mapping[str, Any]) -> str:
    """Digest a card's content, but for the digest in it and the day on which it was made.

    So the same recipe and data yield the same digest on any day.
    """
    rest = {key: value for key, value in card.items() if key not in ("digest", "made")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_bundle(folder: Path) -> bool:
    """Say whether a directory's card is one that this project wrote, of any schema."""
    try:
        card = json.loads(read_file(folder, CARD))
    except (OSError, ValueError, RecursionError, BundleCorruptError):
        return False
    return isinstance(card, dict) and card.get("format") == FORMAT


def read_file(source: Path, name: str) -> bytes:
    """Read a file of a bundle whole.

    Raises:
        BundleCorruptError: It is larger than any such file.
        OSError: There is no such file.
    """
    most = _MOST_BYTES[name]
    with (source / name).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BundleCorruptError(
            f"bundle {source}: {name} is larger than {most} bytes, which no bundle needs; fetch "
            "the bundle again."
        )
    return content


def read_card(source: Path) -> dict[str, Any]:
    """Read and check the card of a bundle. Raises as `parse_card`, and OSError."""
    return parse_card(source, read_file(source, CARD))


def parse_card(source: Path, content: bytes) -> dict[str, Any]:
    """Check the content of a card.

    Raises:
        BundleCorruptError: It is no card, of another schema, or was changed.
        ValueError: It is not JSON, names an entry twice, or holds a number that is not finite.
    """
    card: Any = json.loads(
        content.decode(),
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_without_doubles,
    )
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise BundleCorruptError(
            f"bundle {source}: {CARD} does not say format={FORMAT!r}; pass the directory of a "
            "bundle."
        )
    if card.get("schema") not in _READ_SCHEMAS:
        known = ", ".join(map(str, _READ_SCHEMAS[:-1])) + f" and {_READ_SCHEMAS[-1]}"
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


def checked_content(
    source: Path, name: str, card: Mapping[str, Any], content: bytes | None = None
) -> bytes:
    """Return a file of a bundle, whole.

    Args:
        source: The bundle's directory.
        name: Of the file.
        card: From `read_card`.
        content: Of the file, where it was read already.

    Raises:
        BundleCorruptError: Its digest is not the card's.
        OSError: There is no such file.
    """
    content = read_file(source, name) if content is None else content
    found, wanted = hashlib.sha256(content).hexdigest(), card["files"][name]
    if found != wanted:
        raise BundleCorruptError(
            f"bundle {source}: {name} ({len(content)} bytes) has sha256 {found[:12]}, wanted "
            f"{wanted[:12]}; it is truncated or from another bundle. Fetch the bundle again."
        )
    return content


def tupled(value: object) -> Any:  # noqa: ANN401 - a field of a bundle, of any type
    """Make a tuple of a JSON array; leave everything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{CARD} holds {name}, wanted finite numbers")


def _finite(text: str) -> float:
    value = float(text)  # 1e999 is infinite without being called so
    return value if math.isfinite(value) else _refuse_constant(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{CARD} names {double!r} twice, wanted each entry once")
    return entries
