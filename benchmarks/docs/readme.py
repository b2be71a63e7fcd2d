"""Fills the generated blocks of README and docs: `python -m benchmarks.docs.readme [NAME ...]`.

Knows the markers, the results as JSON lines and how an example is run. Does not know what a
figure means. A block stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`, in the README
or in any page below `docs/`, and NAME says what fills it:

    capabilities   the table of what is supported and what is refused
    cli            every command with its options
    decisions      the index of the decision records
    location       what reading at located units buys, from the studies of located units
    request-fields what becomes of each field of a request to the server
    machines       what each table was measured on
    real-demo      what `make real` shows
    settings-...   the settings of server and proxy
    summary        six results, for the README; summary-site: the same, for the site
    output-...     the real output of the last code block above it, python or sh
    anything else  a table of `benchmarks/results/NAME.jsonl`: a row a line, keys as columns;
                   a line {"card": {...}} says what it was measured on; rows of study, measure
                   and value stand together, a row a study; `layouts` says what is shown how
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.docs.layouts import LAYOUTS, Layout, card_lines, laid_out
from benchmarks.docs.markdown import cell
from safe_decode.whole_files import write_whole

__all__ = ["block_names", "content_of", "fill", "main", "pages", "standing_in", "table_of"]

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
UNMEASURED = "*Not measured yet.*"

_WRITTEN = {
    "capabilities": "safe_decode.engines.transformers.capabilities:as_markdown",
    "cli": "benchmarks.docs.commands:as_markdown",
    "decisions": "benchmarks.docs.decisions:as_markdown",
    "location": "benchmarks.docs.located_units:location",
    "machines": "benchmarks.docs.machines:as_markdown",
    "real-demo": "benchmarks.docs.real_demo:as_markdown",
    "request-fields": "benchmarks.docs.request_fields:as_markdown",
    "settings-proxy": "benchmarks.docs.settings:proxy",
    "settings-server": "benchmarks.docs.settings:server",
    "summary": "benchmarks.docs.summary:for_readme",
    "summary-site": "benchmarks.docs.summary:for_site",
}
"""Blocks that are no file of results: `module:function`; nothing returned means not measured."""

_BLOCK = re.compile(
    r"(?P<begin><!-- begin:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end:(?P=name) -->)",
    re.DOTALL,
)
_CODE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

Content = Callable[[str, str], str]
"""From a block's name and the text above it to what stands in it."""


def pages() -> list[Path]:
    """List the README, and the pages of the site that have blocks."""
    found = sorted(DOCS.rglob("*.md"))
    return [README, *(page for page in found if block_names(page.read_text(encoding="utf-8")))]


def block_names(text: str) -> list[str]:
    """List the blocks of a text, in order."""
    return [match["name"] for match in _BLOCK.finditer(text)]


def fill(text: str, content: Content) -> str:
    """Fill every block of a text.

    Args:
        text: Markdown with markers.
        content: What stands in a block.

    Returns:
        The text with its blocks replaced; the rest is untouched.
    """

    def block(match: re.Match[str]) -> str:
        body = content(match["name"], text[: match.start()]).rstrip("\n")
        return f"{match['begin']}{body}\n{match['end']}"

    return _BLOCK.sub(block, text)


def content_of(name: str, above: str) -> str:
    """Make what stands in the block `name`, see the module's docstring."""
    if name in _WRITTEN:
        module, _, function = _WRITTEN[name].partition(":")
        written: str = getattr(importlib.import_module(module), function)()
        return written or UNMEASURED
    if name.startswith("output-"):
        return _output_of(above)
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return UNMEASURED
    lines = path.read_text(encoding="utf-8").splitlines()
    return table_of(lines, LAYOUTS.get(name, Layout()))


def table_of(lines: Sequence[str], layout: Layout = Layout()) -> str:  # noqa: B008 - frozen
    """Draw JSON lines as Markdown tables; without a layout, the keys of the first row are columns.

    Args:
        lines: Rows, and cards of what they were measured on.
        layout: What is shown how.

    Raises:
        ValueError: A row has other keys than the first, or there is none.
    """
    records = [json.loads(line) for line in lines if line.strip()]
    rows = [record for record in records if set(record) != {"card"}]
    found = [record["card"] for record in records if set(record) == {"card"}]
    if not rows:
        raise ValueError("results hold no row; write one JSON object a line.")
    if set(rows[0]) == {"study", "measure", "value"}:
        rows = _by_study(rows)
    wanted = set(layout.columns or rows[0])
    for number, row in enumerate(rows, 1):
        if not layout.columns and set(row) != wanted:
            raise ValueError(f"row {number} has {sorted(row)}, wanted {sorted(wanted)}.")
    cards = [lines for card in found if (lines := card_lines(card))]
    return "\n\n".join([laid_out(rows, layout), *cards])


def _by_study(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set the measures of a study side by side, a row a study."""
    studies: dict[str, dict[str, Any]] = {}
    for row in rows:
        studies.setdefault(row["study"], {})[row["measure"]] = row["value"]
    return [
        {
            "study": name,
            "measured": "; ".join(
                f"{measure} {cell(value)}"
                for measure, value in measures.items()
                if measure != "missed"
            ),
            "targets missed": measures.get("missed") or "none",
        }
        for name, measures in studies.items()
    ]


def standing_in(text: str, name: str) -> str:
    """Return what stands in a block now."""
    return next(match["body"] for match in _BLOCK.finditer(text) if match["name"] == name)


def main(only: Sequence[str] = ()) -> None:
    """Fill the README and the pages in place.

    Args:
        only: Blocks to fill; empty for all.
    """
    for page in pages():
        text = page.read_text(encoding="utf-8")

        def content(name: str, above: str, text: str = text) -> str:
            return content_of(name, above) if not only or name in only else standing_in(text, name)

        write_whole(page, fill(text, content))


def _output_of(above: str) -> str:
    blocks = _CODE.findall(above)
    if not blocks:
        raise ValueError("an output block needs a python or sh code block above it.")
    language, code = blocks[-1]
    command = [sys.executable, "-c", code] if language == "python" else ["sh", "-ec", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"the example fails:\n{code}\n{done.stderr}")
    return f"```text\n{done.stdout.rstrip()}\n```"


if __name__ == "__main__":
    main(sys.argv[1:])
