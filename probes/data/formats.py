"""Rows of data files as plain mappings, each with the place where it stands.

JSON lines, JSON arrays, CSV, Parquet, and data sets of the Hugging Face hub
(`hf:NAME[:split]`). A row that cannot be parsed is yielded with its error, so that whoever
reads decides whether one bad row stops the rest.

Knows file formats. Does not know what a column means.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_decode.errors import ConfigurationError, DataError

__all__ = ["SourceRow", "is_hub_name", "read_rows"]

_HUB = "hf:"
_PARQUET_ROWS = 1024
_LONGEST_FIELD = 2**24  # a long conversation outgrows the 128 KiB that csv allows by default


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source.

    Attributes:
        place: `file:line`; for Parquet and the hub, `file:row` counted from 1.
        values: By column; None where the row cannot be parsed.
        error: Why it cannot.
        is_text: Whether all values are text, as in CSV, whatever was meant.
    """

    place: str
    values: Mapping[str, Any] | None
    error: str | None = None
    is_text: bool = False


def is_hub_name(source: str | os.PathLike[str]) -> bool:
    """Say whether a source is a data set of the hub rather than a file."""
    return os.fspath(source).startswith(_HUB)


def read_rows(source: str | os.PathLike[str]) -> Iterator[SourceRow]:
    """Read rows one by one; the format follows from the name.

    Args:
        source: A `.jsonl`, `.ndjson`, `.json`, `.csv` or `.parquet` file, or `hf:NAME[:split]`.

    Raises:
        DataError: The source cannot be opened, or is not of the format its name says.
        ConfigurationError: No format goes by that name, or its library is not installed.
    """
    if is_hub_name(source):
        return _hub_rows(os.fspath(source))
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path} is no file; pass a data file, or hf:NAME[:split].")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigurationError(
            f"{path} ends in {path.suffix!r}, wanted one of {', '.join(_READERS)}; rename or "
            "convert it."
        )
    return reader(path)


def _json_lines(path: Path) -> Iterator[SourceRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield _object(place, json.loads(line.decode("utf-8")))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield SourceRow(place, None, f"not JSON in UTF-8: {error}")


def _json_array(path: Path) -> Iterator[SourceRow]:
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}; mend the file.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, wanted an array of objects.")
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path}:{number}", row)


def _object(place: str, row: object) -> SourceRow:
    if not isinstance(row, dict):
        return SourceRow(place, None, f"the row is a {type(row).__name__}, wanted a JSON object")
    return SourceRow(place, row)


def _csv_rows(path: Path) -> Iterator[SourceRow]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            line = 1
            while True:
                # A quoted text may span lines: the place is the line on which the row begins.
                line = max(reader.line_num + 1, line)
                try:
                    values = next(reader)
                except StopIteration:
                    return
                yield _csv_row(f"{path}:{line}", values)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not CSV in UTF-8: {error}; mend the file.") from error
    finally:
        csv.field_size_limit(before)


def _csv_row(place: str, values: Mapping[Any, Any]) -> SourceRow:
    if None in values or None in values.values():
        return SourceRow(place, None, "the row has another number of fields than the header")
    return SourceRow(place, values, is_text=True)


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing("pyarrow") from error
    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{path}:{number}", values)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not Parquet: {error}; mend the file.") from error


def _hub_rows(source: str) -> Iterator[SourceRow]:
    name, _, split = source.removeprefix(_HUB).partition(":")
    if not name:
        raise ConfigurationError(f"source={source!r} names no data set; pass hf:NAME[:split].")
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets") from error
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the library and the network raise
        raise DataError(
            f"{source} cannot be loaded: {error} Check name, split and access, or pass a file."
        ) from error
    for number, values in enumerate(loaded, start=1):
        yield SourceRow(f"{source}:{number}", values)


def _missing(library: str) -> ConfigurationError:
    return ConfigurationError(
        f"reading this source needs {library}, which is not installed; install "
        "`safe-decode[data]`, or convert the source to JSON lines."
    )


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
