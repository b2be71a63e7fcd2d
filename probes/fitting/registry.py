"""The fitter of each kind of probe.

Knows names and where each fitter is. Imports none of them until it is asked for, so that
command lines can name the kinds at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.fitting.interface import Ability, FitSettings, Fitter

__all__ = [
    "FITTERS",
    "fitter_class",
    "fitter_for",
    "require_abilities",
    "settings_from",
    "settings_record",
]

FITTERS: Mapping[str, str] = {
    "linear": "probes.fitting.linear:LinearProbeFitter",
    "mlp": "probes.fitting.mlp:MLPProbeFitter",
}
"""Module and class by kind, as `module:Class`."""
_MEANING = {
    "streamed": "fitting without stored activations",
    "penalty": "a grid of C",
    "heads": "heads by category",
}


def fitter_class(kind: object) -> type[Fitter]:
    """Return the fitter's class of a kind of probe.

    Raises:
        ConfigurationError: There is no such kind; those that there are, are named.
    """
    if not isinstance(kind, str) or kind not in FITTERS:
        raise ConfigurationError(
            f"probe={kind!r} is no kind that can be fitted; pass one of {sorted(FITTERS)}."
        )
    module, _, name = FITTERS[kind].partition(":")
    found: type[Fitter] = getattr(import_module(module), name)
    return found


def fitter_for(settings: FitSettings) -> Fitter:
    """Return a fitter with these settings. Raises as `fitter_class`."""
    return fitter_class(settings.kind)(settings)


def require_abilities(fits: Iterable[FitSettings], needed: Iterable[Ability]) -> None:
    """Check, before anything is read or fitted, that every way of fitting can do what is asked.

    Args:
        fits: Ways of fitting to try.
        needed: What will be asked of each.

    Raises:
        ConfigurationError: One cannot; the kinds that can are named.
    """
    wanted = set(needed)
    for settings in fits:
        for ability in sorted(wanted - fitter_class(settings.kind).abilities):
            able = [kind for kind in FITTERS if ability in fitter_class(kind).abilities]
            raise ConfigurationError(
                f"probes of the kind {settings.kind!r} do not support {_MEANING[ability]}; leave "
                f"it out, or fit a probe of {able}."
            )


def settings_record(settings: FitSettings) -> dict[str, Any]:
    """Return settings as JSON values, for a bundle's provenance."""
    record = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {"probe": settings.kind, **record}


def settings_from(record: Mapping[str, Any]) -> FitSettings:
    """Read settings from a bundle's provenance.

    Args:
        record: From `settings_record`; records without a kind are of linear probes, and entries
            that this version does not know are left out.

    Raises:
        ConfigurationError: The kind is unknown, or a value is of no use.
    """
    fitter = fitter_class(record.get("probe", "linear"))
    settings = type(fitter().config)
    known = {field.name for field in fields(settings)}
    found: FitSettings = settings(**{k: v for k, v in record.items() if k in known})
    return found
