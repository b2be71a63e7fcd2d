"""What arrives at sites, one piece at a time, and whether the pieces make whole forwards.

Knows sites and tensors. Does not know models, hooks or sessions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from safe_decode.activations.site import Site
from safe_decode.errors import BeatError

__all__ = ["Piece", "by_forward", "site_name", "unequal"]

Piece = tuple[int, Tensor, int]
"""What arrived at one site: its index, a copy of its channels, positions that passed."""


def site_name(site: Site) -> str:
    """Name a site for a reader: "mlp of layer 3"."""
    return f"{site.kind} of layer {site.layer}"


def by_forward(sites: Sequence[Site], heard: Sequence[Piece]) -> list[list[Tensor]]:
    """Sort pieces into forwards, each in the order of the sites.

    Raises:
        BeatError: A site fired less often than another, or none did.
    """
    by_site: list[list[Tensor]] = [[] for _ in sites]
    for index, hidden, _ in heard:
        by_site[index].append(hidden)
    counts = [len(of_site) for of_site in by_site]
    if not heard or any(count != counts[0] for count in counts):
        raise BeatError(unequal(sites, counts))
    return [list(forward) for forward in zip(*by_site, strict=True)]


def unequal(sites: Sequence[Site], counts: Sequence[int]) -> str:
    """Say which sites fired less often than others, `counts` times each."""
    most = max(counts)
    if most == 0:
        return (
            "no forward passed the tap since the last take, wanted at least one; was the model "
            "called in another context, compiled, or were its hooks removed?"
        )
    short = [f"{site_name(s)} ({c})" for s, c in zip(sites, counts, strict=True) if c != most]
    return (
        f"{', '.join(short)} fired less often than the other sites ({most}) since the last take, "
        "wanted once a forward each; was a hook removed or did a forward fail?"
    )
