"""Which activations are read: options that name units or whole layers, and the sites they mean.

Knows the options and files of units. Does not know how activations are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.loading import layers_of
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM

if TYPE_CHECKING:
    from safe_decode.activations.site import Site

__all__ = ["FEATURE_COUNTS", "SiteOptions", "residual_layers", "residual_sites", "site_sets_of"]

_NOTHING = "nothing to read; pass --units from `locate`, --telling 1024, or --residual all."
FEATURE_COUNTS = (64, 256)
"""How many features are tried where the options name none."""


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """Which activations are read."""

    units: Annotated[
        Path | None,
        typer.Option(help="File of located units, written by `safe-decode locate`."),
    ] = None
    features: Annotated[
        list[int] | None,
        typer.Option(
            help="Features to read at the most critical units. May be given several times; each "
            "number is tried. Without it: 64 and 256."
        ),
    ] = None
    telling: Annotated[
        list[int] | None,
        typer.Option(
            help="Channels of attention heads and MLP neurons to read that tell most about harm, "
            "found on the split fit. May be given several times; each number is tried."
        ),
    ] = None
    residual: Annotated[
        str | None,
        typer.Option(
            help="Layers whose whole residual stream is read: all, or numbers such as 2,4,5."
        ),
    ] = None

    @property
    def names_no_sites(self) -> bool:
        """Whether what is read is left to the command."""
        return self.units is None and self.residual is None and not self.telling

    def require_layers(self, model: str | None) -> None:
        """Check the file of units and the layers that are named, before the model is loaded.

        Args:
            model: Its name or directory, whose configuration says how many layers it has.

        Raises:
            ConfigurationError: A layer is outside the model.
            DataError: The units cannot be read.
        """
        if self.units is None and self.residual is None:
            return
        n_layers = layers_of(model)
        if self.residual is not None:
            residual_layers(self.residual, n_layers)
        if self.units is not None:
            from probes.location.units import UnitSet

            last = int(UnitSet.load(self.units).layer.max(initial=0))
            if n_layers is not None and last >= n_layers:
                raise ConfigurationError(
                    f"--units={self.units} holds units of layer {last}, outside this model's "
                    f"0..{n_layers - 1}; pass units that were located in this model."
                )

    def require_some(self) -> None:
        """Refuse to read nothing.

        Raises:
            ConfigurationError: Neither units nor channels nor layers are named.
        """
        if self.names_no_sites:
            raise ConfigurationError(_NOTHING)


def site_sets_of(
    model: CausalLM,
    units: Path | None,
    features: Sequence[int] | None,
    residual: str | None,
) -> dict[str, tuple[Site, ...]]:
    """Name the sets of sites that the options ask for, those aside that data has to tell.

    Raises:
        ConfigurationError: They ask for a layer that is not there.
    """
    found: dict[str, tuple[Site, ...]] = {}
    if units is not None:
        from probes.location.units import UnitSet, sites_of

        located = UnitSet.load(units)
        for count in features or FEATURE_COUNTS:
            found[f"units-{count}"] = sites_of(located.most_critical(count))
    if residual is not None:
        found[f"residual-{residual}"] = residual_sites(model, residual)
    return found


def residual_sites(model: CausalLM, spec: str) -> tuple[Site, ...]:
    """Read whole residual layers: `all`, or numbers with commas."""
    from safe_decode.activations.architecture import anatomy_of
    from safe_decode.activations.site import Site, sorted_sites

    anatomy = anatomy_of(model)
    layers = residual_layers(spec, len(anatomy.blocks))
    width = tuple(range(anatomy.d_model))
    return sorted_sites(Site(layer, "resid", width) for layer in layers)


def residual_layers(spec: str, n_layers: int | None) -> set[int]:
    """Read which layers `--residual` names.

    Args:
        spec: `all`, or numbers with commas.
        n_layers: Of the model; None: not known yet, so nothing is outside and `all` is empty.

    Raises:
        ConfigurationError: It is neither, or names a layer outside the model.
    """
    if spec == "all":
        return set(range(n_layers or 0))
    try:
        layers = {int(part) for part in spec.split(",")}
    except ValueError as error:
        raise ConfigurationError(
            f"--residual={spec!r} is neither all nor layers such as 2,4,5."
        ) from error
    if min(layers) < 0 or (n_layers is not None and max(layers) >= n_layers):
        last = "" if n_layers is None else n_layers - 1
        raise ConfigurationError(
            f"--residual={spec!r} names a layer outside this model's 0..{last}."
        )
    return layers
