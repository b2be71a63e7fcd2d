"""Files that are written whole or not at all, and never remove what somebody else wrote.

A file is written beside its place, flushed to the disk and renamed over it: a reader sees the
old content or the new one. Several files of a directory are replaced one after the other, and
put back if one of them fails; other files of the directory stay as they are.

Knows the disk. Does not know what is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["remove_empty", "replace_files", "whole_file", "write_whole"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lend a path beside the target; what is written there takes its place at the end.

    A link is followed, and the permissions of a file that was there are kept. What is no
    regular file, such as /dev/stdout, is written to directly.

    Raises:
        OSError: The disk refuses; the old content stays.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    part = _beside(target)
    try:
        yield part
        if target.exists():
            shutil.copymode(target, part)
        _flush(part)
        part.replace(target)
        _flush(target.parent)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file whole; text as UTF-8. Raises as `whole_file`."""
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path) as part:
        part.write_bytes(data)


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a directory, in order; all other files there stay.

    Everything is written before the first file is replaced. If a replacement fails, those
    that were done are undone.

    Raises:
        OSError: The disk refuses; the directory holds what it held.
    """
    parts = {name: _beside(folder / name) for name in contents}
    kept: dict[str, Path | None] = {}
    try:
        for name, content in contents.items():
            parts[name].write_bytes(content)
            _flush(parts[name])
        try:
            for name, part in parts.items():
                kept[name] = _kept(folder / name)
                part.replace(folder / name)
        except BaseException:
            _put_back(folder, kept)
            raise
        _flush(folder)
    finally:
        for left in (*parts.values(), *filter(None, kept.values())):
            left.unlink(missing_ok=True)


def remove_empty(folder: Path) -> bool:
    """Remove a directory that holds nothing; say whether it is gone."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _beside(target: Path) -> Path:
    # The suffix stays at the end: some writers choose a format by it.
    return target.with_name(f".{target.stem}.{secrets.token_hex(6)}.part{target.suffix}")


def _kept(path: Path) -> Path | None:
    """Give a file a second name, under which it outlives its replacement."""
    if not path.exists():
        return None
    second = _beside(path)
    try:
        os.link(path, second)
    except OSError:  # a file system without hard links
        shutil.copy2(path, second)
    return second


def _put_back(folder: Path, kept: Mapping[str, Path | None]) -> None:
    for name, old in kept.items():
        if old is None:
            (folder / name).unlink(missing_ok=True)
        else:
            old.replace(folder / name)


def _flush(path: Path) -> None:
    """Force a file or a directory's entries to the disk, where the system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems refuse it for directories
            os.fsync(handle)
    finally:
        os.close(handle)
