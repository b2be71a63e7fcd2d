"""What the documentation site has beside the pages of `docs/`; mkdocs calls it while it builds.

CHANGELOG.md, CONTRIBUTING.md and SECURITY.md stand at the repository's root, where readers look
for them. The site shows them as pages of its own, with their links turned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["SHOWN", "as_page", "on_files"]

ROOT = Path(__file__).resolve().parents[2]

SHOWN = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Page of the site -> file at the root."""


def as_page(text: str) -> str:
    """Turn links that start at the repository's root into links that start at `docs/`."""
    return text.replace("](docs/", "](")


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - mkdocs is not always installed
    """Add the pages; mkdocs passes its files and its configuration."""
    from mkdocs.structure.files import File

    for page, source in SHOWN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=as_page(text)))
    return files
