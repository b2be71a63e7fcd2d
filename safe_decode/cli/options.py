"""Options that several commands share, each written once.

Knows their names, types, defaults and help, and how a group of them is loaded. Does not know
what a command does. The workbench's commands use them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.loading import decoder_of, loaded_bundle, loaded_model
from safe_decode.decision import Redirect
from safe_decode.errors import ConfigurationError
from safe_decode.loading import Dtype, GgufForm, Loaded, LoadSettings

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = [
    "Alpha",
    "AsJson",
    "BundleOptions",
    "BundlePath",
    "CertifiedOptions",
    "Device",
    "GuardOptions",
    "JsonOptions",
    "MaxNewTokens",
    "ModelName",
    "ModelOptions",
    "NamedBundle",
    "RequiredBundle",
]

ModelName = Annotated[
    str | None,
    typer.Option(
        help="Directory of a causal language model, its name on the hub, or a name of the "
        "catalogue. Without it: the embedded model."
    ),
]
Device = Annotated[
    str, typer.Option(help="Device that the model runs on, as torch names it: cpu, cuda, cuda:1.")
]
BundlePath = Annotated[
    str | None,
    typer.Option(
        metavar="BUNDLE",
        help="Directory or address of the bundle, or a name of the catalogue. Without it: that of "
        "the model.",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="Certified false-alarm rate whose threshold is used. Without it: the bundle's default."
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest answer, in tokens. Without it: the cap that the certificate states."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file of settings.")]
ClientKeys = Annotated[
    list[str] | None,
    typer.Option(help="Key that a client may use. May be given several times."),
]
AuditFile = Annotated[
    str | None,  # as text: an empty one is refused, and as a path it would be the present folder
    typer.Option(metavar="PATH", help="Append one line for each response to this file."),
]
FurtherSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as NAME=VALUE. May be given several times."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text and tables.")
]


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """How results are printed."""

    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is loaded, and where."""

    model: ModelName = None
    device: Device = "cpu"
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Number format of the model's weights and activations. auto: the one that its "
            "checkpoint is kept in."
        ),
    ] = "auto"
    gguf_file: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GGUF file in the directory of --model that holds the weights. Without it: a "
            "plain checkpoint.",
        ),
    ] = None
    gguf: Annotated[
        GgufForm,
        typer.Option(
            help="Form of the weights of a GGUF file: dequantised into plain numbers when they are "
            "loaded, or packed as they are in the file. Each has certificates of its own."
        ),
    ] = "dequantised"

    @property
    def how(self) -> LoadSettings:
        """How the model is loaded."""
        return LoadSettings(
            device=self.device, dtype=self.dtype, gguf_file=self.gguf_file, gguf=self.gguf
        )

    def load_model(self) -> Loaded:
        """Load the model.

        Raises:
            ConfigurationError: Nothing to load under that name.
        """
        return loaded_model(self.model, self.how)


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """Which bundle is loaded."""

    bundle: BundlePath = None

    def load_bundle(self) -> ProbeBundle:
        """Load the bundle.

        Raises:
            BundleError: It is damaged.
        """
        return loaded_bundle(self.bundle)


@dataclass(frozen=True, kw_only=True)
class NamedBundle(BundleOptions):
    """The one bundle that a command is about: an argument, or the option of the same meaning."""

    path: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE",
            help="Directory, address or name of the bundle, as with --bundle. Without either: the "
            "embedded bundle.",
        ),
    ] = None

    @property
    def place(self) -> str | None:
        """What was named; None: the embedded bundle.

        Raises:
            ConfigurationError: It was named twice, and differently.
        """
        if self.path is not None and self.bundle is not None and self.path != self.bundle:
            raise ConfigurationError(
                f"two bundles are named, {self.path} and --bundle {self.bundle}; name one."
            )
        return self.bundle if self.path is None else self.path

    def load_bundle(self) -> ProbeBundle:
        """Load the bundle.

        Raises:
            BundleError: It is damaged.
            ConfigurationError: Two were named.
        """
        return loaded_bundle(self.place)


@dataclass(frozen=True, kw_only=True)
class RequiredBundle(NamedBundle):
    """The same, where no bundle is the embedded one's."""

    path: Annotated[
        str | None,
        typer.Argument(metavar="BUNDLE", help="Directory of the bundle, as with --bundle."),
    ] = None
    bundle: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Directory of the bundle.")
    ] = None

    @property
    def named(self) -> Path:
        """The directory that was named.

        Raises:
            ConfigurationError: None was, or two were.
        """
        if self.place is None:
            raise ConfigurationError("no bundle is named; pass its directory.")
        return Path(self.place)


@dataclass(frozen=True, kw_only=True)
class GuardOptions(ModelOptions, BundleOptions):
    """Which model is guarded, with which bundle, at which false-alarm rate."""

    alpha: Alpha = None

    def load_decoder(self, redirect: Redirect) -> SafeDecoder:
        """Load model and bundle, and put the guard on, certified on benign responses.

        Raises:
            ConfigurationError: A model without its bundle, or nothing to load.
            BundleError: The bundle is damaged or was made for another model.
        """
        return self._decoder(redirect, "benign")

    def _decoder(self, redirect: Redirect, population: str) -> SafeDecoder:
        return decoder_of(
            self.model,
            self.bundle,
            redirect=redirect,
            alpha=self.alpha,
            population=population,
            how=self.how,
        )


@dataclass(frozen=True, kw_only=True)
class CertifiedOptions(GuardOptions):
    """A guarded model, whose certificate it follows, and how long its answers may be."""

    population: Annotated[
        str,
        typer.Option(
            help="Population whose certificate is used; `safe-decode inspect` lists them."
        ),
    ] = "benign"
    max_new_tokens: MaxNewTokens = None

    def load_decoder(self, redirect: Redirect) -> SafeDecoder:
        """Load model and bundle, and put the guard on, certified on the population.

        Raises:
            ConfigurationError: A model without its bundle, or nothing to load.
            BundleError: The bundle is damaged, was made for another model, or has no certificate
                of the population.
        """
        return self._decoder(redirect, self.population)
