"""Activations at sites, read by forward hooks. The only room that hooks.

Knows when a forward passes a site and counts it. Does not know tokens, rows that
have ended, probes or decisions.

Hooks belong to a tap and are installed once however many sessions listen; which
session a forward belongs to is a matter of the calling context (`contextvars`), so
two threads, or two tasks, on one model do not see each other, and no lock is held
while the model runs. A forward outside `listening()`, or inside `internal()`, writes
nothing. Limit: eager execution; a compiled graph skips hooks that came after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safe_decode.anatomy import Anatomy, anatomy_of
from safe_decode.errors import BeatError, ConfigurationError, UnsupportedError
from safe_decode.sites import Site, sorted_sites

__all__ = ["ActivationTap", "Beats", "internal"]

_NOBODY: Mapping[ActivationTap, Beats] = MappingProxyType({})
# One variable for all taps: a ContextVar per tap would outlive the tap in every context.
_listeners: ContextVar[Mapping[ActivationTap, Beats]] = ContextVar(
    "safe_decode_listeners", default=_NOBODY
)


@contextmanager
def internal() -> Iterator[None]:
    """Let the forwards of this context pass every tap unseen.

    For forwards that serve the guard itself, such as a self-check. A `listening()`
    entered inside hears again, and only its own tap.
    """
    token = _listeners.set(_NOBODY)
    try:
        yield
    finally:
        _listeners.reset(token)


class Beats:
    """What one session has heard since its last `take`.

    Not for two threads at once: a session is driven by one context.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        """Start with nothing heard; made by `ActivationTap.listening`, not by users."""
        self._sites = tuple(sites)
        self._heard: list[list[Tensor]] = [[] for _ in self._sites]
        self._keep: int | None = 1
        self._open = True
        self._batch = 0
        self._seen = 0

    @property
    def forwards(self) -> int:
        """Complete forwards since the last `take`: every site has fired."""
        return min(len(pieces) for pieces in self._heard)

    @property
    def positions(self) -> int:
        """Positions that passed since the last `take`, kept or not, as the last site saw them."""
        return self._seen

    def keep_last(self, n_positions: int | None) -> None:
        """Say how many trailing positions are kept, from the next forward on.

        The number holds until it is changed. Over several forwards before one `take`
        (a chunked prefill) it counts positions of all of them together.

        Args:
            n_positions: At least 1, or None for every position. 1 at the start.

        Raises:
            ConfigurationError: `n_positions` is below 1.
        """
        if n_positions is not None and n_positions < 1:
            raise ConfigurationError(
                f"n_positions={n_positions} keeps nothing; pass at least 1, or None for all."
            )
        self._keep = n_positions

    def take(self) -> Tensor:
        """Return the features heard since the last take, and forget them.

        Returns:
            [batch, positions, F] float32 on the device of the first site, a fresh tensor
            without gradient. Positions in order, F in the order of `sorted_sites`.

        Raises:
            BeatError: No forward passed, or the sites fired unequally often. What was
                heard is forgotten.
        """
        heard, self._heard = self._heard, [[] for _ in self._sites]
        self._seen = 0
        n_forwards = len(heard[0])
        if n_forwards == 0 or any(len(pieces) != n_forwards for pieces in heard):
            raise BeatError(_unequal(self._sites, [len(pieces) for pieces in heard]))
        if n_forwards == 1:
            return self._joined([pieces[0] for pieces in heard])
        steps = [self._joined([pieces[i] for pieces in heard]) for i in range(n_forwards)]
        try:
            features = torch.cat(steps, dim=1)
        except RuntimeError as error:
            shapes = [tuple(step.shape) for step in steps]
            raise BeatError(
                f"forwards since the last take have shapes {shapes}, wanted one batch size; "
                "take after each forward, or listen in a context of its own."
            ) from error
        return features if self._keep is None else features[:, -self._keep :]

    def discard(self) -> None:
        """Forget what was heard since the last take, complete or not."""
        self._heard = [[] for _ in self._sites]
        self._seen = 0

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        device = pieces[0].device
        if any(piece.device != device for piece in pieces):
            pieces = [piece.to(device) for piece in pieces]
        try:
            return torch.cat(pieces, dim=-1).float()
        except RuntimeError as error:
            shapes = {_name(s): tuple(p.shape) for s, p in zip(self._sites, pieces, strict=True)}
            raise BeatError(
                f"sites of one forward differ in batch or positions: {shapes}; wanted one "
                "[batch, positions] for all."
            ) from error

    def _hear(self, index: int, piece: Tensor, seen: int) -> None:
        self._heard[index].append(piece)
        if index == len(self._heard) - 1:
            self._seen += seen

    def _close(self) -> None:
        self._open = False
        self.discard()


class ActivationTap:
    """Reads the activations of one model at fixed sites.

    Args:
        model: A decoder-only causal language model, run eagerly.
        sites: Where to read. Order does not matter; features come in the order of
            `sorted_sites`, see the attribute `sites`.

    Raises:
        ConfigurationError: No sites, two on one activation, a layer or channel outside
            the model.
        UnsupportedError: The family is unknown, the activation cannot be read (fused
            experts), or the model is compiled.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Find the modules to hook; nothing is hooked yet."""
        self.sites = sorted_sites(sites)
        _refuse_compiled(model)
        anatomy = anatomy_of(model)
        self._modules = tuple(_module_of(anatomy, site) for site in self.sites)
        flattened = anatomy.flattens_mlp and any(site.kind == "mlp" for site in self.sites)
        self._batch_source = anatomy.blocks[0].block if flattened else None
        self._handles: list[RemovableHandle] = []
        self._installs = 0
        self._lock = threading.Lock()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks on the model, once however often this is entered.

        Threads may enter and leave freely; the hooks go with the last to leave,
        whether it leaves by return, exception or cancellation.
        """
        with self._lock:
            if self._installs == 0:
                self._install()
            self._installs += 1
        try:
            yield
        finally:
            with self._lock:
                self._installs -= 1
                if self._installs == 0:
                    self._remove()

    @contextmanager
    def listening(self) -> Iterator[Beats]:
        """Hear the forwards of the calling context, and of no other.

        Entered again in the same context, the inner one hears and the outer does not.
        """
        beats = Beats(self.sites)
        with self.installed():
            token = _listeners.set(MappingProxyType({**_listeners.get(), self: beats}))
            try:
                yield beats
            finally:
                # A generator may be closed in another context than it was entered in; the
                # closed beats then stay behind there, deaf and empty.
                beats._close()
                with suppress(ValueError):
                    _listeners.reset(token)

    def _install(self) -> None:
        try:
            if self._batch_source is not None:
                self._handles.append(
                    self._batch_source.register_forward_pre_hook(self._batch_hook, with_kwargs=True)
                )
            for index, (site, module) in enumerate(zip(self.sites, self._modules, strict=True)):
                hook = self._site_hook(index, site)
                if site.kind == "resid":
                    self._handles.append(module.register_forward_hook(hook))
                else:
                    self._handles.append(module.register_forward_pre_hook(_without_output(hook)))
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _batch_hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:  # noqa: ANN401
        beats = _listeners.get().get(self)
        if beats is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            beats._batch = hidden.shape[0]

    def _site_hook(self, index: int, site: Site) -> Callable[[nn.Module, Any, Any], None]:
        channels = torch.tensor(site.channels)

        def hook(_module: nn.Module, _args: object, activation: Any) -> None:  # noqa: ANN401
            nonlocal channels
            beats = _listeners.get().get(self)
            if beats is None or not beats._open:
                return
            hidden = activation if isinstance(activation, Tensor) else _first(activation, site)
            if hidden.ndim == 2 and beats._batch:
                hidden = hidden.view(beats._batch, -1, hidden.shape[-1])
            elif hidden.ndim != 3:
                raise BeatError(
                    f"{_name(site)} has shape {tuple(hidden.shape)}, wanted [batch, seq, width]."
                )
            if hidden.requires_grad:
                hidden = hidden.detach()
            if channels.device != hidden.device:
                channels = channels.to(hidden.device)
            seen, keep = hidden.shape[1], beats._keep
            if keep is not None and keep < seen:
                hidden = hidden[:, -keep:]
            # A copy, not a view: a view would keep the whole activation alive until the take
            # and change with any later in-place operation of the model.
            beats._hear(index, hidden.index_select(2, channels), seen)

        return hook


def _without_output(
    hook: Callable[[nn.Module, Any, Any], None],
) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: hook(module, args, args)


def _first(activation: Any, site: Site) -> Tensor:  # noqa: ANN401 - whatever a block returns
    if isinstance(activation, tuple) and activation and isinstance(activation[0], Tensor):
        return activation[0]
    raise BeatError(
        f"{_name(site)} yields {type(activation).__name__}, wanted a tensor or a tuple that "
        "starts with one."
    )


def _module_of(anatomy: Anatomy, site: Site) -> nn.Module:
    module, width = anatomy.module(site.layer, site.kind), anatomy.width(site.layer, site.kind)
    if site.channels[-1] >= width:
        raise ConfigurationError(
            f"channel {site.channels[-1]} of {_name(site)} is outside this model's "
            f"0..{width - 1}; pass channels the probe was fitted on."
        )
    return module


def _refuse_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedError(
            f"model={type(model).__name__} is compiled and would skip the hooks; pass the model "
            "without torch.compile."
        )


def _name(site: Site) -> str:
    return f"{site.kind} of layer {site.layer}"


def _unequal(sites: Sequence[Site], counts: Sequence[int]) -> str:
    most = max(counts)
    if most == 0:
        return (
            "no forward passed the tap since the last take, wanted at least one; was the model "
            "called in another context, compiled, or were its hooks removed?"
        )
    short = [f"{_name(s)} ({c})" for s, c in zip(sites, counts, strict=True) if c != most]
    return (
        f"{', '.join(short)} fired less often than the other sites ({most}) since the last take, "
        "wanted once a forward each; was a hook removed or did a forward fail?"
    )
