"""Activations at sites, read by forward hooks. No other runtime module installs hooks.

Knows when a forward passes a site and counts it. Does not know tokens, rows that
have ended, probes or decisions.

Hooks belong to a tap and are installed once however many sessions listen; which
session a forward belongs to is told by the calling context (`contextvars`), so
two threads, or two tasks, on one model do not see each other, and no lock is held
while the model runs. A forward outside `listening()`, or inside `unwatched()`, writes
nothing.

A compiled graph skips hooks that came after it and runs no Python of ours. Inside `built_in()`
taps stand where graphs are traced with them, and leave activations in registers: one set a
tap, so sessions take turns, and a compiled forward of the user's own during a session, marked
internal or not, closes that session's rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from safe_decode.activations.architecture import Architecture, anatomy_of
from safe_decode.activations.compiled.forward_patch import compiled_part
from safe_decode.activations.compiled.tap import CompiledTap, TappedModule
from safe_decode.activations.hooks import HookFactory, Listener
from safe_decode.activations.pieces import site_name
from safe_decode.activations.recorder import ForwardRecorder
from safe_decode.activations.site import Site, sorted_sites
from safe_decode.activations.visitor import ActivationVisitor, Visit
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["ActivationTap", "ForwardRecorder", "unwatched"]

_NOBODY: Mapping[ActivationTap, Listener] = MappingProxyType({})
# One variable for all taps: a ContextVar per tap would outlive the tap in every context.
_listeners: ContextVar[Mapping[ActivationTap, Listener]] = ContextVar(
    "safe_decode_listeners", default=_NOBODY
)


@contextmanager
def unwatched() -> Iterator[None]:
    """Let the forwards of this context pass every tap unseen.

    For forwards that serve the guard itself, such as a self-check. A `listening()`
    entered inside hears again, and only its own tap.
    """
    token = _listeners.set(_NOBODY)
    try:
        yield
    finally:
        _listeners.reset(token)


class ActivationTap:
    """Reads the activations of one model at fixed sites.

    Args:
        model: A decoder-only causal language model; compiled only inside `built_in()`.
        sites: Where to read. Order does not matter; features come in the order of
            `sorted_sites`, see the attribute `sites`.

    Raises:
        ConfigurationError: No sites, two on one activation, a layer or channel outside
            the model.
        UnsupportedError: The family is unknown, or the activation cannot be read (fused
            experts).
    """

    def __init__(self, model: CausalLM, sites: Sequence[Site]) -> None:
        """Find the modules to hook; nothing is hooked yet."""
        self.sites = sorted_sites(sites)
        anatomy = anatomy_of(model)
        self._model = model
        self._modules = tuple(_module_of(anatomy, site) for site in self.sites)
        flattened = anatomy.flattens_mlp and any(site.kind == "mlp" for site in self.sites)
        self._batch_source = anatomy.blocks[0].block if flattened else None
        self._widths = tuple(anatomy.width(site.layer, site.kind) for site in self.sites)
        self._handles: list[RemovableHandle] = []
        self._hooks: list[TappedModule] = []  # made once: they hold channels where they are read
        self._installs = 0
        self._lock = threading.Lock()
        self._spare: CompiledTap | None = None  # made once, so that graphs traced with it stay good
        self._built_in: CompiledTap | None = None

    @property
    def is_built_in(self) -> bool:
        """Say whether the taps stand where compiled graphs read them."""
        return self._built_in is not None

    @contextmanager
    def built_in(self) -> Iterator[None]:
        """Stand in the model's forwards, so that compiled graphs read the sites.

        Graphs that were compiled before are traced anew at their next call, here and after.

        Raises:
            UnsupportedError: Someone listens, or a tap is built in already.
        """
        with self._lock:
            if self._installs or self._built_in is not None:
                raise UnsupportedError(
                    "taps cannot be installed twice or while a call is running; enter installed() "
                    "once, before the first call."
                )
            self._spare = self._spare or CompiledTap(self._model, self._tapped())
            self._spare.install()
            self._built_in = self._spare
        try:
            yield
        finally:
            with self._lock:
                self._built_in.remove()
                self._built_in = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks on the model, once however often this is entered.

        Threads may enter and leave freely; the hooks go with the last to leave,
        whether it leaves by return, exception or cancellation. Built-in taps need none.
        """
        with self._lock:
            if self._installs == 0 and self._built_in is None:
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
    def visiting(self, visit: Visit) -> Iterator[ActivationVisitor]:
        """Show each site's activation of the calling context's forwards to `visit`, uncopied.

        For streams over finished text, where nothing of a forward is wanted afterwards.

        Args:
            visit: Called with the index of a site in `sites` and its channels, [batch, seq, n]
                in the model's dtype, as the forward passes it: a view that must not be changed
                or kept.

        Raises:
            UnsupportedError: The taps are built in, or the model is compiled.
        """
        if self._built_in is not None:
            raise UnsupportedError(
                "built-in taps read after a forward, not within it; visit outside built_in()."
            )
        visits = ActivationVisitor(self.sites, visit)
        with self._hooked(), self._heard_by(visits):
            yield visits

    @contextmanager
    def listening(self) -> Iterator[ForwardRecorder]:
        """Hear the forwards of the calling context, and of no other.

        Entered again in the same context, the inner one hears and the outer does not.

        Raises:
            UnsupportedError: The model is compiled and the taps are not built in; or they are,
                and someone else listens.
        """
        registers = None if self._built_in is None else self._built_in.registers
        beats = ForwardRecorder(self.sites, registers)
        hooked = self._hooked() if registers is None else registers.reading()
        with hooked, self._heard_by(beats):
            yield beats

    @contextmanager
    def _heard_by(self, listener: ForwardRecorder | ActivationVisitor) -> Iterator[None]:
        token = _listeners.set(MappingProxyType({**_listeners.get(), self: listener}))
        try:
            yield
        finally:
            # A generator may be closed in another context than it was entered in; the closed
            # listener then stays behind there and records nothing more.
            listener.close()
            with suppress(ValueError):
                _listeners.reset(token)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        part = compiled_part(self._model)
        if part is not None:
            raise UnsupportedError(
                f"{part} of {type(self._model).__name__} is compiled and would skip the hooks; "
                "listen inside built_in(), or pass the model without torch.compile."
            )
        with self.installed():
            yield

    def _tapped(self) -> list[TappedModule]:
        if not self._hooks:
            self._hooks = self._made()
        return self._hooks

    def _made(self) -> list[TappedModule]:
        tapped = [
            TappedModule(module, self._hook(index, site), site)
            for index, (site, module) in enumerate(zip(self.sites, self._modules, strict=True))
        ]
        if self._batch_source is not None:
            tapped.insert(0, TappedModule(self._batch_source, self._batch_hook, None))
        return tapped

    def _install(self) -> None:
        try:
            for tapped in self._tapped():
                module, hook, site = tapped.module, tapped.hook, tapped.site
                self._handles.append(
                    module.register_forward_hook(hook)
                    if site is not None and site.kind == "resid"
                    else module.register_forward_pre_hook(hook, with_kwargs=site is None)
                )
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _batch_hook(
        self,
        _module: nn.Module | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        beats = _listeners.get().get(self)
        if beats is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            beats.batch = hidden.shape[0]

    def _hook(self, index: int, site: Site) -> Callable[..., None]:
        factory = HookFactory(self, _listeners.get)
        make = factory.output if site.kind == "resid" else factory.input
        return make(index, site, self._widths[index])


def _module_of(anatomy: Architecture, site: Site) -> nn.Module:
    module, width = anatomy.module(site.layer, site.kind), anatomy.width(site.layer, site.kind)
    if site.channels[-1] >= width:
        raise ConfigurationError(
            f"channel {site.channels[-1]} of {site_name(site)} is outside this model's "
            f"0..{width - 1}; pass channels the probe was fitted on."
        )
    return module
