"""Loading what a command works on, quietly: a model, a bundle, or both with the guard on.

Knows the embedded defaults. Does not know options or what a command does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safe_decode.cli.console import working
from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError
from safe_decode.loading import Loaded, LoadSettings

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = [
    "bundle_of",
    "decoder_of",
    "layers_of",
    "loaded_bundle",
    "loaded_model",
    "silence_transformers",
]


def loaded_model(model: str | None, how: LoadSettings) -> Loaded:
    """Load a model by name or directory, the embedded aligned one where None.

    Raises:
        ConfigurationError: Nothing to load under that name, or a model without a chat template,
            which every command needs; told before its weights are read.
    """
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.loading import load_model

    name = model or artefact("aligned")
    with working("Loading the model"):
        silence_transformers()
        return load_model(
            name,
            device=how.device,
            dtype=how.dtype,
            gguf_file=how.gguf_file,
            gguf=how.gguf,
            needs_template=True,
        )


def layers_of(model: str | None) -> int | None:
    """Count a model's layers from its configuration, which is read without the weights.

    Args:
        model: Name or directory; None: the embedded model.

    Returns:
        The number of decoder blocks; None where the configuration cannot be read or does not say,
        which loading the model then tells.
    """
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.loading import sizes_of

    silence_transformers()
    try:
        return sizes_of(model or artefact("aligned")).layers
    except ConfigurationError:
        return None


def bundle_of(model: str | None, bundle: str | None) -> str | None:
    """Name the bundle of a command: the one that is named, or that the catalogue has for a model.

    Raises:
        ConfigurationError: The catalogue cannot be read.
    """
    from safe_decode.catalogue import catalogue

    if bundle is not None or model is None or model not in catalogue():
        return bundle
    return model


def loaded_bundle(bundle: str | None, *, trusted_key: Path | None = None) -> ProbeBundle:
    """Load a bundle by directory, address or name, the embedded one where None.

    Raises:
        BundleError: The bundle is damaged, or is not signed by the trusted key.
    """
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.fetching.bundle_places import load_bundle

    return load_bundle(bundle or artefact("bundle"), trusted_key=trusted_key)


def decoder_of(
    model: str | None,
    bundle: str | None,
    *,
    redirect: Redirect,
    alpha: float | None,
    population: str = "benign",
    how: LoadSettings,
    trusted_key: Path | None = None,
) -> SafeDecoder:
    """Load a model and a bundle, the embedded ones where None, and put the guard on.

    A model of the catalogue has its own bundle.

    Raises:
        ConfigurationError: A model without its bundle, or nothing to load.
        BundleError: The bundle is damaged, was made for another model, is not signed by the
            trusted key, or has no certificate of this alpha and population.
    """
    bundle = bundle_of(model, bundle)
    if model is not None and bundle is None:
        raise ConfigurationError(
            f"--model={model!r} was given without --bundle; pass the bundle made for that model, "
            "the embedded one fits the embedded model alone."
        )
    # The bundle and its signature first: a bad one is told before seconds are spent on the model.
    probes = loaded_bundle(bundle, trusted_key=trusted_key)
    probes.certificate(alpha, population)  # an alpha that is not certified, as early
    from safe_decode.bundle.measured import require_certified
    from safe_decode.checkpoint import SIZES, look_at
    from safe_decode.loading import plain_dtype

    if model is not None:
        sizes = look_at(model, how.gguf_file).sizes()
        if sizes is not None:
            probes.fingerprint.require_sizes(dict(zip(SIZES, sizes, strict=True)))
        dtype = plain_dtype(model, how)
        if dtype is not None:
            require_certified(probes.dtypes, dtype)
    loaded = loaded_model(model, how)
    from safe_decode.engines.transformers.decoder import SafeDecoder

    return SafeDecoder(
        loaded.model,
        loaded.tokenizer,
        probes,
        redirect=redirect,
        alpha=alpha,
        population=population,
    )


def silence_transformers() -> None:
    """Keep standard error for our own progress, and for errors of one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
