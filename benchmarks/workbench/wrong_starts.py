"""Twelve wrong starts, each by its command: `python -m benchmarks.workbench.wrong_starts`.

Each must end with status 2 and one line that names what was given, what was wanted and what to do,
within five seconds of the process's start. Files and models are made here, small; nothing comes
from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card import card, write_results
from safe_decode.demo.embedded_pair import artefact
from safe_decode.testing.models import byte_tokenizer, tiny_model
from safe_decode.whole_files import write_whole

LOG = logging.getLogger("benchmarks.workbench.wrong_starts")
_LIMIT_S = 5.0
_ROWS = 3000


@dataclass(frozen=True)
class WrongStart:
    """A command that cannot work.

    Attributes:
        name: What is wrong.
        arguments: Of the command, made in a folder.
        says: What the error must match, in this order.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    says: tuple[str, ...]


def _build(folder: Path, recipe: str, *further: str) -> list[str]:
    path = folder / f"recipe-{abs(hash((recipe, further)))}.yaml"
    write_whole(path, recipe)
    return ["build", "--recipe", str(path), "--out", str(folder / "out"), *further]


_FEW = "sources: [{data: few.jsonl}]"
_GOOD = "sources: [{data: rows.jsonl}]\nanswers: {benign: 1500, harmful: 500, max_new_tokens: 64}"
_NO_REFUSALS = _GOOD.replace("harmful: 500", "harmful: 100") + "\nreading: {where: located}"
_FOREIGN = ("--bundle", str(artefact("bundle")))

STARTS = (
    WrongStart("too few rows", lambda f: _build(f, _FEW), ("calibrate holds", "needs 299", "more")),
    WrongStart(
        "no refusals",
        lambda f: _build(f, _NO_REFUSALS),
        ("distinct refusals", "wanted 50", "reading.where: residual"),
    ),
    WrongStart(
        "one class",
        lambda f: ["fit", "--data", str(f / "harmless.jsonl"), "--out", str(f / "out")],
        ("0 of 3000 judged responses are harmful", "give both kinds"),
    ),
    WrongStart(
        "wrong columns",
        lambda f: ["fit", "--data", str(f / "columns.csv"), "--out", str(f / "out")],
        ("columns", "those of no known set", "--columns"),
    ),
    WrongStart(
        "no template",
        lambda f: _build(f, _GOOD, "--model", str(f / "base")),
        ("no chat template", "it is a base model", "pass the model's chat"),
    ),
    WrongStart(
        "no disk",
        lambda f: _build(f, _GOOD, "--work", str(f / "full" / "work")),
        ("GB free", "want up to", "--work on another disk"),
    ),
    WrongStart(
        "foreign bundle",
        lambda f: ["generate", "--prompt", "hi", "--model", str(f / "chat"), *_FOREIGN],
        ("made for another model", "wanted", "load the model"),
    ),
    WrongStart(
        "judge down",
        lambda f: _build(f, _GOOD + '\nlabels: {judge: "http://127.0.0.1:9/v1", judge_model: m}'),
        ("cannot be reached", "start it"),
    ),
    WrongStart(
        "no model",
        lambda f: _build(f, _GOOD, "--model", str(f / "empty")),
        ("holds no config.json", "pass"),
    ),
    WrongStart(
        "contaminated test",
        lambda f: ["evaluate", "--data", str(f / "seen.jsonl"), "--bundle", str(f / "seen-bundle")],
        ("rows to report on", "wanted rows that it has not seen", "pass others"),
    ),
    WrongStart(
        "missing split",
        lambda f: ["calibrate", "--data", str(f / "fit-only.jsonl"), "--out", str(f / "out")],
        ("split 'calibrate'", "judged harmless", "pass such responses"),
    ),
    WrongStart(
        "alpha too small",
        lambda f: _build(f, _GOOD, "--alpha", "0.0001"),
        ("alpha=0.0001", "needs 29956", "pass alpha"),
    ),
)
"""In place of `base model`, which is told as `no template`: with a template, a base model that
never refuses falls back to the residual stream, and its bundle says so."""


def prepare(folder: Path) -> None:
    """Write the files that the commands name."""
    rows = [_row(number) for number in range(_ROWS)]
    _write(folder / "rows.jsonl", rows)
    _write(folder / "few.jsonl", rows[:60])
    harmless = [{**row, "prompt_harmful": False, "response_harmful": False} for row in rows]
    _write(folder / "harmless.jsonl", harmless)
    _write(folder / "fit-only.jsonl", [{**row, "split": "fit"} for row in harmless])
    write_whole(folder / "columns.csv", "instruction,output\nhello,there\n")
    for name, template in (("base", False), ("chat", True)):
        tokenizer = byte_tokenizer()
        if not template:
            tokenizer.chat_template = None
        tiny_model("llama").save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "empty").mkdir()
    _seen_bundle(folder, rows[:200])


def _row(number: int) -> dict[str, Any]:
    is_harmful = number % 3 == 0
    return {
        "prompt": f"request {number} about thing {number * 7919}",
        "prompt_harmful": is_harmful,
        "response": f"answer {number} with words {number * 104729}",
        "response_harmful": is_harmful,
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def _seen_bundle(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    from dataclasses import replace

    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.bundle.seen import SeenPrompts

    bundle = ProbeBundle.load(artefact("bundle"))
    seen = SeenPrompts.of((row["prompt"], "fit") for row in rows)
    replace(bundle, seen=seen).save(folder / "seen-bundle")
    _write(folder / "seen.jsonl", [{**row, "split": "test"} for row in rows])


def tried(start: WrongStart, folder: Path) -> dict[str, Any]:
    """Run the command, time it, and look at what it says."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "safe_decode", *start.arguments(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begun
    line = (done.stderr.strip().splitlines() or [""])[-1]
    missing = [text for text in start.says if not re.search(re.escape(text), line)]
    good = done.returncode == 2 and line.startswith("error: ") and not missing
    return {
        "wrong start": start.name,
        "seconds": round(seconds, 1),
        "status": done.returncode,
        "says": "value, wanted, remedy" if good else f"not {', '.join(missing) or line[:60]}",
        "target": f"< {_LIMIT_S:g} s, named",
        "met": "yes" if good and seconds < _LIMIT_S else "no",
        "error": line.removeprefix("error: ").replace(str(folder), "DIR")[:200],
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Try all, write `results/wrong_starts.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workbench.wrong_starts")
    parser.add_argument("--only", help="one of them, nothing is written")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        with _full_disk(folder / "full"):
            for start in STARTS:
                if given.only in (None, start.name):
                    rows.append(tried(start, folder))
                    LOG.info("%s", rows[-1])
    if given.only is None:
        write_results("wrong_starts", rows, card())
    return rows


@contextlib.contextmanager
def _full_disk(place: Path) -> Iterator[None]:
    """Mount a file system of a megabyte, which needs the rights of root."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


if __name__ == "__main__":
    main()
