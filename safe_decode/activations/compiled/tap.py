"""Taps that stand in the forwards of a model, where graphs are traced with them.

Knows a model's sites as modules, the hooks that hear them eagerly, and registers. Does not know
listeners or sessions.

Dynamo keeps compiled graphs by code, not by module, and does not look whether a module has
hooks: a model with hooks gets the graph of its twin without. It does look whether a module has
a `forward` of its own. So where graphs may be compiled, taps stand in `forward`, and coming and
going they make Dynamo trace anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safe_decode.activations.compiled.buffers import ActivationBuffer, ActivationBuffers
from safe_decode.activations.compiled.forward_patch import OwnForward
from safe_decode.activations.site import Site
from safe_decode.typing import CausalLM

__all__ = ["CompiledTap", "TappedModule"]

_Forward = Callable[..., Any]


@dataclass(frozen=True)
class TappedModule:
    """A module to stand in.

    Attributes:
        module: Whose forward.
        hook: What hears it where it runs eagerly, as torch calls it: with module and arguments;
            with the output too at a resid site; with keyword arguments for the batch.
        site: What is read there; None: only how many rows there are.
    """

    module: nn.Module
    hook: Callable[..., None]
    site: Site | None


class CompiledTap:
    """The taps of one model, to be built in as often as wanted.

    Args:
        model: Whose modules.
        tapped: What is read, in the order of `sorted_sites`, with what says the batch first.

    Attributes:
        registers: What compiled graphs leave.
    """

    def __init__(self, model: CausalLM, tapped: Sequence[TappedModule]) -> None:
        sites = [(one.site, one.module) for one in tapped if one.site is not None]
        self.registers = ActivationBuffers(
            [site for site, _ in sites],
            [_device_of(module, model) for _, module in sites],
        )
        registers = iter(self.registers.by_site)
        self._forwards = [
            OwnForward(one.module, self._maker(one, registers), self) for one in tapped
        ]

    def install(self) -> None:
        """Stand in the model's forwards.

        Raises:
            UnsupportedError: Another tap stands there.
        """
        try:
            for forward in self._forwards:
                forward.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was."""
        # Two may stand in one module: the last to come goes first.
        for forward in reversed(self._forwards):
            forward.remove()
        self.registers.discard()

    def _maker(
        self, tapped: TappedModule, registers: Iterator[ActivationBuffer]
    ) -> Callable[[_Forward], _Forward]:
        if tapped.site is None:
            return _reads_batch(tapped.hook, self.registers)
        if tapped.site.kind == "resid":
            return _reads_output(tapped.hook, next(registers))
        return _reads_input(tapped.hook, next(registers), self.registers)


def _reads_input(
    hook: Callable[..., None], register: ActivationBuffer, registers: ActivationBuffers
) -> Callable[[_Forward], _Forward]:
    def make(inner: _Forward) -> _Forward:
        def forward(*args: Tensor, **kwargs: object) -> object:
            if torch.compiler.is_dynamo_compiling():
                register.leave(args[0], registers.batch)
            else:
                hook(None, args)
            return inner(*args, **kwargs)

        return forward

    return make


def _reads_output(
    hook: Callable[..., None], register: ActivationBuffer
) -> Callable[[_Forward], _Forward]:
    def make(inner: _Forward) -> _Forward:
        def forward(*args: object, **kwargs: object) -> object:
            output: Any = inner(*args, **kwargs)
            if torch.compiler.is_dynamo_compiling():
                register.leave(output if isinstance(output, Tensor) else output[0], 0)
            else:
                hook(None, args, output)
            return output

        return forward

    return make


def _reads_batch(
    hook: Callable[..., None], registers: ActivationBuffers
) -> Callable[[_Forward], _Forward]:
    def make(inner: _Forward) -> _Forward:
        def forward(*args: Tensor, **kwargs: Tensor) -> object:
            if torch.compiler.is_dynamo_compiling():
                registers.batch = (args[0] if args else kwargs["hidden_states"]).shape[0]
            else:
                hook(None, args, kwargs)
            return inner(*args, **kwargs)

        return forward

    return make


def _device_of(module: nn.Module, model: CausalLM) -> torch.device:
    """Find where a module computes; an offloaded one shows no device of its own."""
    for parameter in (*module.parameters(), *model.parameters()):
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")
