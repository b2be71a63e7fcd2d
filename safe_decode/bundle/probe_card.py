"""How a probe of any kind stands in a card, and which tensors belong to it.

A linear probe has no entry of its own: cards were written before there were other kinds, and
their digests hold. Any other kind is named in `probe`, with the names and shapes of its tensors.

Knows the entry and the registry of kinds. Does not know torch, so that NumPy reads it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from safe_decode.errors import ConfigurationError
from safe_decode.probe.layout import ProbeLayout
from safe_decode.probe.registry import DEFAULT_KIND, layout_of

if TYPE_CHECKING:
    from safe_decode.probe.interface import Probe

__all__ = ["layout_in", "probe_record", "probe_tensors_in"]

_ENTRY = "probe"


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


_Array = TypeVar("_Array", bound=_Shaped)


def probe_record(probe: Probe) -> dict[str, Any]:
    """Return what a card says of a probe's kind; empty for a linear one."""
    if probe.kind == DEFAULT_KIND:
        return {}
    shapes = {name: list(tensor.shape) for name, tensor in probe.tensors().items()}
    return {_ENTRY: {"kind": probe.kind, "tensors": shapes}}


def layout_in(record: Mapping[str, Any]) -> ProbeLayout:
    """Return the layout of the probe that a card, or a part of one, holds.

    Raises:
        ConfigurationError: This version knows no such kind.
    """
    return layout_of(record[_ENTRY]["kind"] if _ENTRY in record else DEFAULT_KIND)


def probe_tensors_in(
    record: Mapping[str, Any], tensors: Mapping[str, _Array], *, prefix: str = ""
) -> dict[str, _Array]:
    """Pick the tensors of a probe out of a file's.

    Args:
        record: The card, or the part of it that holds the probe.
        tensors: Of torch or NumPy, by name.
        prefix: Stands before each name in the file.

    Raises:
        KeyError: A tensor is missing.
        ConfigurationError: The kind is unknown, or names and shapes are not those recorded.
    """
    layout = layout_in(record)
    found = {name: tensors[prefix + name] for name in layout.shapes}
    if _ENTRY in record:
        shapes = {name: list(one.shape) for name, one in found.items()}
        recorded = record[_ENTRY]["tensors"]
        if recorded != shapes:
            raise ConfigurationError(
                f"the card records the tensors {recorded} of a probe of the kind "
                f"{layout.kind!r}, the file holds {shapes}; export the bundle again."
            )
    return found
