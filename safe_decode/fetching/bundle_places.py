"""A bundle by the name of a catalogue, by an address that fsspec reads, or by its directory.

Knows names and stores. Does not know what a bundle holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.catalogue import cache_folder, catalogue, is_address
from safe_decode.errors import BundleError

__all__ = ["bundle_folder", "load_bundle"]

_LARGEST = 1 << 30
"""Bytes of a bundle that is fetched, at most: what lies under an address may be anything."""


def load_bundle(
    name: str | os.PathLike[str], *, trusted_key: str | Path | None = None
) -> ProbeBundle:
    """Load a bundle.

    Args:
        name: Its directory, an address such as s3://guards/qwen, or a name of the catalogue.
        trusted_key: As in `ProbeBundle.load`.

    Raises:
        BundleError: There is no bundle, or it is damaged.
        ConfigurationError: The catalogue cannot be read.
    """
    return ProbeBundle.load(bundle_folder(name), trusted_key=trusted_key)


def bundle_folder(name: str | os.PathLike[str]) -> Path:
    """Find the directory of a bundle; what an address names is fetched anew, into the cache.

    Raises:
        BundleError: The address cannot be read.
        ConfigurationError: The catalogue cannot be read.
    """
    told = os.fspath(name)
    if is_address(told):
        return _fetched(told)
    if not os.path.isdir(told) and "/" not in told and (entry := catalogue().get(told)):
        return _fetched(entry.bundle) if is_address(entry.bundle) else Path(entry.bundle)
    return Path(told)


def _fetched(address: str) -> Path:
    import fsspec

    places = cache_folder() / "bundles"
    places.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=places) as work:
        try:
            store, path = fsspec.core.url_to_fs(address)
            found = [one for one in store.ls(path, detail=True) if one["type"] == "file"]
            size = sum(int(one["size"] or 0) for one in found)
            if size > _LARGEST:
                raise BundleError(
                    f"bundle={address!r} holds {size:,} bytes, and a bundle has at most "
                    f"{_LARGEST:,}; pass the address of a bundle."
                )
            new = Path(work) / "new"
            new.mkdir()
            for one in found:
                store.get_file(one["name"], str(new / Path(one["name"]).name))
        except BundleError:
            raise
        except Exception as error:
            # Every store of fsspec has errors of its own, and some want a package.
            raise BundleError(
                f"bundle={address!r} cannot be read: {error or type(error).__name__}; pass the "
                "directory, the address or the name of a bundle."
            ) from error
        # By its content: whoever loads an older one at this moment keeps it.
        target = places / _sum_of(new)
        if not target.is_dir():
            with contextlib.suppress(OSError):
                os.replace(new, target)
        if not target.is_dir():
            raise BundleError(f"bundle={address!r} cannot be kept in {places}; make room there.")
    return target


def _sum_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]
