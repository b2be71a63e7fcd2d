"""What every picture needs: matplotlib, or an error that says how to get it, and a file.

Knows files. Does not know what is drawn.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from safe_decode.errors import ConfigurationError
from safe_decode.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["require_plots", "save_figure"]


_DOTS_PER_INCH = 150


def require_plots() -> None:
    """Check, before any work, that something can be drawn.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(
            "plots need matplotlib, which is not installed; run `pip install 'safe-decode[plots]'`."
        )


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, drawn without a display.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    try:
        with whole_file(path) as part:
            figure.savefig(part, format="png", dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise ConfigurationError(
            f"{os.fspath(path)} cannot be written: {error.strerror}; pass a directory that exists."
        ) from error
