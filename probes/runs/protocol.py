"""The protocol: what is measured and how, fixed before anything is measured.

Knows the file's shape and refuses what it does not know. Does not know how steps are run.

    seed: 0
    tables:
      NAME:
        about: one line
        primary: the one endpoint of the table; all others are secondary, adjusted by Holm
        secondary: [...]
        minutes: on two cores
        steps: [[module, argument, ...], ...]   run by `python -m`, in order
        writes: [file, ...]                     relative to the repository
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from safe_decode.errors import DataError

__all__ = ["Protocol", "TableProtocol", "read_protocol"]

_FIELDS = ("about", "primary", "secondary", "minutes", "steps", "writes")
_OUTSIDE = ("seed", "splits", "budgets", "multiplicity", "public_model", "tables")


@dataclass(frozen=True)
class TableProtocol:
    """One table.

    Attributes:
        about: What it shows.
        primary: Its one primary endpoint.
        secondary: The others.
        minutes: What it takes on two cores.
        steps: Modules with their arguments, in order.
        writes: What is there afterwards.
    """

    about: str
    primary: str
    secondary: tuple[str, ...]
    minutes: int
    steps: tuple[tuple[str, ...], ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """The whole of it.

    Attributes:
        seed: Of every table.
        tables: By name.
    """

    seed: int
    tables: Mapping[str, TableProtocol]


def read_protocol(path: str | os.PathLike[str]) -> Protocol:
    """Read a protocol.

    Raises:
        DataError: Not YAML, a field that is missing, unknown or of another kind.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{os.fspath(path)} is no protocol: {error}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("tables"), dict):
        raise DataError(
            f"{os.fspath(path)} has no tables; see the head of probes/runs/protocol.py."
        )
    unknown = set(found) - set(_OUTSIDE)
    if unknown or not isinstance(found.get("seed"), int):
        raise DataError(
            f"{os.fspath(path)} has unknown fields {sorted(unknown)} or no seed; known are "
            f"{_OUTSIDE}."
        )
    tables = {str(name): _table(str(name), one) for name, one in found["tables"].items()}
    return Protocol(found["seed"], tables)


def _table(name: str, found: object) -> TableProtocol:
    if not isinstance(found, dict) or set(found) != set(_FIELDS):
        given = sorted(found) if isinstance(found, dict) else found
        raise DataError(f"table {name!r} has {given}, wanted {_FIELDS}.")
    steps = found["steps"]
    if not isinstance(steps, list) or not all(isinstance(s, list) and s for s in steps):
        raise DataError(f"steps of table {name!r} must be lists of a module and its arguments.")
    if not isinstance(found["minutes"], int):
        raise DataError(f"minutes={found['minutes']!r} of table {name!r} is no whole number.")
    return TableProtocol(
        about=str(found["about"]),
        primary=str(found["primary"]),
        secondary=tuple(map(str, found["secondary"])),
        minutes=found["minutes"],
        steps=tuple(tuple(map(str, step)) for step in steps),
        writes=tuple(map(str, found["writes"])),
    )
