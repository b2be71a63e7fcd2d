"""`safe-decode serve`: the server and its page.

Knows the flags, the first screen and the process: signals, ports, an orderly end. Does not
know endpoints. Every setting can also be given by `--set`, the environment or `--config`; flags
are texts where an empty one would turn into something else on its way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console
from safe_decode.cli.loading import decoder_of
from safe_decode.cli.options import Alpha, AuditFile, ClientKeys, ConfigFile, FurtherSettings
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import ConfigurationError
from safe_decode.loading import LoadSettings

if TYPE_CHECKING:
    from safe_decode.serving.sources import SettingsGiven

__all__ = ["serve"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `safe-decode serve`; None leaves a setting to file, environment or default."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Directory of a causal language model, its name on the hub, or a name of the "
            "catalogue. Without it: the embedded model."
        ),
    ] = None
    bundle: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            help="Directory or address of the bundle, or a name of the catalogue. Without it: that "
            "of the model.",
        ),
    ] = None
    require_signature: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Public key that must have signed the bundle, a PEM file."
        ),
    ] = None
    config: ConfigFile = None
    host: Annotated[str | None, typer.Option(help="Address that the server listens on.")] = None
    port: Annotated[
        int | None, typer.Option(help="Port that the server listens on. 0: any free port.")
    ] = None
    device: Annotated[
        str | None,
        typer.Option(help="Device that the model runs on, as torch names it: cpu, cuda, cuda:1."),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the model's weights and activations: float32, bfloat16, "
            "float16, or auto, the one that its checkpoint is kept in."
        ),
    ] = None
    gguf_file: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GGUF file in the directory of --model that holds the weights. Without it: a "
            "plain checkpoint.",
        ),
    ] = None
    gguf: Annotated[
        str | None,
        typer.Option(
            help="Form of the weights of a GGUF file: dequantised into plain numbers when they are "
            "loaded, or packed as they are in the file."
        ),
    ] = None
    alpha: Alpha = None
    population: Annotated[
        str | None,
        typer.Option(
            help="Population whose certificate is used. Without it: benign, which stands for "
            "benign responses."
        ),
    ] = None
    redirect: Annotated[
        str | None,
        typer.Option(
            help="What happens to an answer once the guard trips: refuse, rewind or stop."
        ),
    ] = None
    api_key: ClientKeys = None
    audit: AuditFile = None
    expose_scores: Annotated[
        bool | None,
        typer.Option(
            "--expose-scores/--hide-scores",
            help="Show statistics and thresholds to clients. Without it: shown with the embedded "
            "model alone.",
        ),
    ] = None
    settings: FurtherSettings = None


_FLAGS = (
    *("model", "bundle", "require_signature", "host", "port", "device", "dtype", "alpha"),
    *("gguf_file", "gguf", "population", "redirect", "audit", "expose_scores"),
)
"""Options that are settings of the same name."""


@command("Serve")
def serve(options: ServeOptions) -> None:
    """Serve a guarded model behind OpenAI's and Anthropic's interfaces, and a page at /."""
    try:
        from safe_decode.serving.sources import gather
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{error.name} is missing; install the server with: pip install 'safe-decode[serving]'"
        ) from error
    flags = {name: getattr(options, name) for name in _FLAGS} | {"api_keys": options.api_key}
    assigned = options.settings or []
    given = gather(options.config, flags=flags, assigned=assigned, environ=os.environ)
    _run(given.for_demo())


def _run(given: SettingsGiven) -> None:
    from safe_decode.engines.registry import engine_named
    from safe_decode.serving.app import create_app
    from safe_decode.serving.operations.screen import first_screen
    from safe_decode.serving.process import serve_app

    settings = given.settings
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    decoder = decoder_of(
        settings.model,
        settings.bundle,
        redirect=settings.redirect,
        alpha=settings.alpha,
        population=settings.population,
        how=LoadSettings(
            device=settings.device,
            dtype=settings.dtype,
            gguf_file=settings.gguf_file,
            gguf=settings.gguf,
        ),
        trusted_key=settings.require_signature,
    )
    engine = engine_named("transformers")(
        decoder,
        holdback_tokens=settings.holdback_tokens,
        tells_scores=settings.expose_scores,
    )
    app = create_app(engine, settings)
    # Refused before anything listens: what reads the model is not what was certified.
    engine.check()
    try:
        serve_app(app, settings, lambda address: _show(address, first_screen(given, engine.facts)))
    finally:
        engine.close()


def _show(address: str, rows: Sequence[tuple[str, str]]) -> None:
    table = WordTable(("", ""), rows, title=f"safe-decode serves {address}")
    print_table(table, console(stderr=True))
