"""What `torch.compile` leaves on modules, and a module's own `forward`.

Does not know sites, sessions or transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from safe_decode.errors import UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["OwnForward", "compiled_part", "uncompiled"]

_MARK = "_safe_decode_tap"


def compiled_part(model: CausalLM) -> str | None:
    """Name what of a model is compiled: "model", a submodule; None where nothing is.

    Sees `torch.compile(module)`, `module.compile()` and `module.forward = torch.compile(...)`.
    What `generate` compiles by itself is no part of the model.
    """
    if not hasattr(model, "named_modules") or not any(map(_is_compiled, model.modules())):
        return None
    name = next(name for name, module in model.named_modules() if _is_compiled(module))
    return name or "model"


def uncompiled(model: CausalLM) -> CausalLM:
    """Return the module that `torch.compile(model)` wraps, or `model` itself.

    The wrapper's `generate` is that of the module, which runs uncompiled.
    """
    inner: CausalLM = getattr(model, "_orig_mod", model)
    return inner


class OwnForward:
    """A module's own `forward`, while it is installed.

    Args:
        module: Whose.
        make: From the module's present `forward` to the one that stands in for it.
        owner: Whose taps these are; those of one owner may stand in one module.
    """

    def __init__(
        self,
        module: nn.Module,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        owner: object,
    ) -> None:
        self._module, self._make, self._owner = module, make, owner
        self._ours: Callable[..., Any] | None = None
        self._inner: Callable[..., Any] | None = None
        self._before: Callable[..., Any] | None = None

    def install(self) -> None:
        """Put it in place.

        Raises:
            UnsupportedError: A tap of another owner stands there.
        """
        before = vars(self._module).get("forward")
        if getattr(before, _MARK, self._owner) is not self._owner:
            raise UnsupportedError(
                "another decoder's taps are installed on this model; leave its installed() first."
            )
        inner = self._module.forward
        if self._ours is None or self._inner != inner:
            # Kept otherwise: graphs that were traced with it are then good for the next time.
            self._ours, self._inner = self._make(inner), inner
            setattr(self._ours, _MARK, self._owner)
        self._before = before
        self._module.forward = self._ours

    def remove(self) -> None:
        """Put back what was there. What was wrapped around it since keeps it inside."""
        if self._ours is None or vars(self._module).get("forward") is not self._ours:
            return
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return (
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own["_modules"]
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
    )
