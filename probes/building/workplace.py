"""Where a build keeps finished work, so that one that was ended goes on.

A directory of one recipe, one data set and one model. A build of something else is refused there
rather than mixed in. Nothing that somebody else put there is touched.

Knows files and what they were made of. Does not know what the work is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safe_decode.errors import ConfigurationError, DataError
from safe_decode.whole_files import write_whole

__all__ = ["Workplace", "require_disk"]

_NOTE = "build.json"


@dataclass(frozen=True)
class Workplace:
    """A directory for finished work.

    Attributes:
        folder: Where.
    """

    folder: Path

    def claim(self, made_of: Mapping[str, object]) -> None:
        """Begin, or go on, with a build of exactly this.

        Raises:
            ConfigurationError: The directory holds a build of something else, or files of
                somebody else, or cannot be written.
        """
        told = json.dumps(made_of, sort_keys=True)
        identity = hashlib.sha256(told.encode()).hexdigest()
        note = self.folder / _NOTE
        if note.is_file():
            found = json.loads(note.read_text(encoding="utf-8"))
            if found.get("identity") != identity:
                changed = sorted(
                    key for key in made_of if _plain(made_of[key]) != found["made_of"].get(key)
                )
                raise ConfigurationError(
                    f"work={self.folder} holds a build with another "
                    f"{', '.join(changed) or 'form'}; pass another --work, or delete it."
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigurationError(
                f"work={self.folder} holds files that are of no build; pass another --work."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps({"identity": identity, "made_of": made_of}, indent=1))
        except OSError as error:
            raise ConfigurationError(
                f"work={self.folder} cannot be written: {error.strerror}; pass another --work."
            ) from error

    def path(self, name: str) -> Path:
        """Name a file or folder in it."""
        return self.folder / name


def require_disk(folder: Path, wanted_bytes: int) -> None:
    """Refuse, before any work, what would fill the disk.

    Raises:
        DataError: Less is free than wanted.
    """
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < wanted_bytes:
        raise DataError(
            f"{there} has {free / 1e9:.2f} GB free, and the activations want up to "
            f"{wanted_bytes / 1e9:.2f} GB; free some, pass --work on another disk, or use fewer "
            "rows or features."
        )


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))
