"""Located units as one self-contained HTML page: shares, pictures, where they come from.

Knows the template and what stands in it. Does not know how units were found. The template
escapes every value; the page asks for nothing from outside and forbids itself to.
"""

from __future__ import annotations

import base64
import json
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.location.units import CATEGORIES, UnitSet
from probes.reports.unit_plots import category_counts, draw_importance, draw_shares

if TYPE_CHECKING:
    from jinja2 import Template
    from numpy.typing import NDArray

__all__ = ["locate_page"]

_LONGEST_LIST = 12  # of provenance; the file itself holds the rest


def locate_page(units: UnitSet) -> str:
    """Draw the page, a whole HTML document.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    counts = category_counts(units)
    rows = [_row(str(layer), here) for layer, here in enumerate(counts)]
    return _template().render(
        categories=CATEGORIES,
        rows=[*rows, _row("all", counts.sum(axis=0))],
        counts=units.counts(),
        n_units=len(units),
        pictures=_pictures(units),
        tried=units.provenance.get("search", {}).get("tried", ()),
        provenance=json.dumps(_shortened(dict(units.provenance)), indent=2, sort_keys=True),
    )


def _row(name: str, counts: NDArray[Any]) -> dict[str, Any]:
    both = counts.sum(axis=0)
    shares = [float(count) / max(int(both.sum()), 1) for count in both]
    heads, neurons = counts.tolist()
    return {"name": name, "shares": shares, "heads": heads, "neurons": neurons}


def _pictures(units: UnitSet) -> list[dict[str, str]]:
    drawn = (
        ("Share of each layer's units by category", draw_shares),
        ("Importance for safety against importance for utility", draw_importance),
    )
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for title, draw in drawn:
            path = Path(scratch) / "picture.png"
            draw(units, path)
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            found.append({"title": title, "data": data})
    return found


def _shortened(value: object) -> object:
    if isinstance(value, dict):
        return {name: _shortened(part) for name, part in value.items() if name != "tried"}
    if isinstance(value, list | tuple) and len(value) > _LONGEST_LIST:
        return [*map(_shortened, value[:_LONGEST_LIST]), f"... {len(value)} in all"]
    return [*map(_shortened, value)] if isinstance(value, list | tuple) else value


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("probes.reports").joinpath("templates/location.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))
