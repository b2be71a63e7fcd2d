"""Loading the model that a command works on, quietly.

Knows the default. Does not know what the command does.
"""

from __future__ import annotations

from safe_decode.cli.console import working
from safe_decode.loading import Dtype, Loaded

__all__ = ["loaded_model"]


def loaded_model(model: str | None, device: str, dtype: Dtype) -> Loaded:
    """Load a model by name or directory, the embedded aligned one where None.

    Raises:
        ConfigurationError: Nothing to load under that name.
    """
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.loading import load_model

    name = model or artefact("aligned")
    with working("Loading the model"):
        from transformers.utils import logging

        # Standard error is kept for our own progress, and for errors of one line.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        return load_model(name, device=device, dtype=dtype)
