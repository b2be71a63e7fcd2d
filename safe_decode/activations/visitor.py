"""Activations shown as a forward passes them, for streams that keep sums and no values.

Knows sites and how often each was passed. Does not know models, hooks or what is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from safe_decode.activations.pieces import unequal
from safe_decode.activations.site import Site
from safe_decode.errors import BeatError

__all__ = ["Visit", "ActivationVisitor"]

Visit = Callable[[int, Tensor], None]
"""Called with the index of a site and its channels, [batch, seq, n] in the model's dtype."""


class ActivationVisitor:
    """One context's forwards, shown site by site.

    Made by `ActivationTap.visiting`, not by users.

    Args:
        sites: In the order of `sorted_sites`.
        visit: See `Visit`.
    """

    def __init__(self, sites: Sequence[Site], visit: Visit) -> None:
        """Start with nothing shown."""
        self._sites = tuple(sites)
        self._visit = visit
        self._counts = [0] * len(self._sites)
        self.is_open = True
        self.batch = 0

    def hear(self, index: int, hidden: Tensor, channels: Tensor | None) -> None:
        """Show one site's channels; what comes after `close` is not shown."""
        if not self.is_open:
            return
        self._counts[index] += 1
        self._visit(index, hidden if channels is None else hidden.index_select(2, channels))

    def require_one_each(self) -> None:
        """Check that one forward passed every site once since the last check.

        Raises:
            BeatError: None passed, or the sites were passed unequally often.
        """
        counts, self._counts = self._counts, [0] * len(self._sites)
        if min(counts) == max(counts) > 1:
            raise BeatError(f"{counts[0]} forwards passed the tap, wanted one between checks.")
        if any(count != 1 for count in counts):
            raise BeatError(unequal(self._sites, counts))

    def close(self) -> None:
        """Show no more."""
        self.is_open = False
