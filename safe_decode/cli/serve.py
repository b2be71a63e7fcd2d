"""`safe-decode serve`: the server and its page.

Knows the flags, the first screen and the process: signals, ports, an orderly end. Does not
know endpoints. Every setting can also be given by `--set`, the environment or `--config`; flags
are texts where an empty one would turn into something else on its way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.console import console, working
from safe_decode.cli.generate import Alpha, decoder_of
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from safe_decode.serving.sources import SettingsGiven

__all__ = ["serve"]


def serve(
    model: Annotated[
        str | None,
        typer.Option(help="Name or directory of a causal language model; default embedded."),
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Directory of the bundle; default embedded."),
    ] = None,
    require_signature: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Public key that must have signed the bundle; a PEM file."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 for any free one.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model goes.")] = None,
    dtype: Annotated[str | None, typer.Option(help="In what the model computes.")] = None,
    alpha: Alpha = None,
    population: Annotated[
        str | None, typer.Option(help="Whose certificate it is; default benign responses.")
    ] = None,
    redirect: Annotated[
        str | None, typer.Option(help="What a tripped answer becomes: refuse, rewind or stop.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that is accepted; may be repeated.")
    ] = None,
    audit: Annotated[
        str | None, typer.Option(metavar="PATH", help="Append one line a response here.")
    ] = None,
    expose_scores: Annotated[
        bool | None,
        typer.Option(
            "--expose-scores/--hide-scores",
            help="Show statistics and thresholds to clients; on with the embedded model.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, any other setting.")
    ] = None,
) -> None:
    """Serve a guarded model behind OpenAI's and Anthropic's interfaces, and a page at /."""
    try:
        from safe_decode.serving.sources import gather
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{error.name} is missing; install the server with: pip install 'safe-decode[serving]'"
        ) from error
    flags = {
        "model": model,
        "bundle": bundle,
        "require_signature": require_signature,
        "host": host,
        "port": port,
        "device": device,
        "dtype": dtype,
        "alpha": alpha,
        "population": population,
        "redirect": redirect,
        "api_keys": api_key,
        "audit": audit,
        "expose_scores": expose_scores,
    }
    given = gather(config, flags=flags, assigned=settings or [], environ=os.environ)
    _run(given.for_demo())


def _run(given: SettingsGiven) -> None:
    from safe_decode.engines.transformers.batch.engine import TransformersEngine
    from safe_decode.serving.app import create_app
    from safe_decode.serving.operations.screen import first_screen
    from safe_decode.serving.process import serve_app

    settings = given.settings
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with working("Loading the model"):
        decoder = decoder_of(
            settings.model,
            settings.bundle,
            redirect=settings.redirect,
            alpha=settings.alpha,
            population=settings.population,
            device=settings.device,
            dtype=settings.dtype,
            trusted_key=settings.require_signature,
        )
        engine = TransformersEngine(
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
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(name, text)
    console(stderr=True).print(Panel(table, title=f"safe-decode serves {address}", expand=False))
