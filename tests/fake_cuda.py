"""A CUDA device that is none: tensors with real values that say when the host reads them.

`fake_cuda()` yields a `World`. Inside, `device="cuda"` is taken by tensors that compute on the
CPU, report `cuda:0`, and count what would make the host wait on a real device: reading a value,
an operation whose shape depends on values, a copy that does not say `non_blocking`. A
non-blocking copy to the host holds noise until the host has waited for the device, be it by an
event of its own or by any later read: whoever reads too early finds out.

Events whose copies have arrived meanwhile are waited for without a wait, as on a device. Made of
`__torch_dispatch__` (values, copies) and a `TorchFunctionMode` (what takes `device=`, and
`tolist`, which subclasses are refused).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda:0")
_aten = torch.ops.aten
_READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


@dataclass
class World:
    """What happened on the device.

    Attributes:
        waits: Where the host waited, in order: "guard" or "loop", kind, and file:line.
        n_operations: Operations that were queued for the device.
    """

    waits: list[tuple[str, str, str]] = field(default_factory=list)
    n_operations: int = 0
    _underway: list[Callable[[], None]] = field(default_factory=list)

    def wait(self, kind: str) -> None:
        """Wait for the device: all that is underway arrives."""
        self.waits.append((*_who(), kind))
        self.arrive()

    def arrive(self) -> None:
        """Let copies arrive."""
        underway, self._underway = self._underway, []
        for deliver in underway:
            deliver()

    def send(self, deliver: Callable[[], None]) -> None:
        """Queue a copy to the host."""
        self._underway.append(deliver)

    def by(self, who: str, since: int = 0) -> Counter[str]:
        """Count waits of "guard" or "loop" by place, from a number of waits on."""
        return Counter(f"{place} ({kind})" for w, place, kind in self.waits[since:] if w == who)


def _who() -> tuple[str, str]:
    """Say whose code asked: the innermost frame of the guard or of transformers."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for part, who in (("/safe_decode/", "guard"), ("/transformers/", "loop")):
            if part in name and "/torch/" not in name.rpartition(part)[2]:
                # The engine of the guard lies in a folder of that name too.
                who = "guard" if "/safe_decode/" in name else who
                return who, f"{name.rpartition(part)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "test", "?"


class DeviceTensor(Tensor):
    """Reports `cuda:0`; its values lie in `inner`, on the CPU."""

    inner: Tensor
    world: World
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, world: World) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.inner, made.world = inner, world
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        world = next(a.world for a in _leaves((args, kwargs)) if isinstance(a, DeviceTensor))
        name = func._schema.name
        world.n_operations += 1
        if name == "aten::_to_copy":
            return _converted(world, args[0], kwargs)
        if name == "aten::copy_":
            return _copied(world, *args)
        if name in _READS:
            world.wait(name)
        if name in _INDEXING:
            _index_tensors(world, args[1])
        else:
            _require_one_device(func, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        wrappers = {id(a.inner): a for a in _leaves(args) if isinstance(a, DeviceTensor)}
        with torch.no_grad():
            found = func(*_inner(args), **_inner(kwargs))

        def wrapped(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            known = wrappers.get(id(value))
            return DeviceTensor(value, world) if known is None else known

        return tree_map(wrapped, found)


def _leaves(tree: object) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _inner(tree: Any) -> Any:
    return tree_map(lambda a: a.inner if isinstance(a, DeviceTensor) else a, tree)


def _index_tensors(world: World, indices: Any) -> None:
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            world.wait("boolean index")
        elif isinstance(index, Tensor) and not isinstance(index, DeviceTensor):
            world.wait("index from the host")


def _require_one_device(func: object, tree: object) -> None:
    for leaf in _leaves(tree):
        if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) and leaf.ndim:
            raise RuntimeError(f"{func} mixes cuda:0 and cpu: {list(leaf.shape)} {leaf.dtype}")


def _converted(world: World, value: DeviceTensor, kwargs: dict[str, Any]) -> Tensor:
    device = kwargs.pop("device", None)
    non_blocking = kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    inner = _aten._to_copy(value.inner, **kwargs)
    if device is None or torch.device(device).type == "cuda":
        return DeviceTensor(inner, world)
    if not non_blocking:
        world.wait("copy to the host")
        return inner
    arriving = _noise(inner)
    world.send(lambda: arriving.copy_(inner))
    return arriving


def _copied(world: World, to: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(to, DeviceTensor):
        if not isinstance(value, DeviceTensor) and value.ndim and not non_blocking:
            world.wait("copy to the device")
        to.inner.copy_(_inner(value))
    elif non_blocking:
        arrived = value.inner.clone()
        to.copy_(_noise(to))
        world.send(lambda: to.copy_(arrived))
    else:
        world.wait("copy to the host")
        to.copy_(value.inner)
    return to


def _noise(like: Tensor) -> Tensor:
    """Values that nobody would take for an answer."""
    if like.dtype == torch.bool:
        return torch.ones_like(like)
    return torch.full_like(like, 77 if not like.is_floating_point() else torch.nan)


_GUARDED: dict[str, Callable[..., Any]] = {
    "__invert__": _aten.bitwise_not,
    "nonzero": _aten.nonzero,
    "copy_": _aten.copy_,
    "contiguous": lambda value: value if value.is_contiguous() else _aten.clone(value),
    "item": _aten._local_scalar_dense,
    "__bool__": lambda value: bool(_aten._local_scalar_dense(value)),
    "__int__": lambda value: int(_aten._local_scalar_dense(value)),
    "__float__": lambda value: float(_aten._local_scalar_dense(value)),
    "__index__": lambda value: int(_aten._local_scalar_dense(value)),
}
"""Methods in which torch asks for a guard of the device, which a build without CUDA has not."""


_WHOLE = {"scaled_dot_product_attention", "where"}
"""Functions that ask for kernels, or make tensors, of the device by themselves."""


def _is_cuda(device: object) -> bool:
    if device is None or isinstance(device, (int, bool, torch.dtype)):
        return False
    return torch.device(device).type == "cuda"  # type: ignore[arg-type]


class _Frontend(TorchFunctionMode):
    """Takes what names the device, and what subclasses of tensors are refused."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if name == "tolist" and isinstance(args[0], DeviceTensor):
            self.world.wait("tolist")
            return args[0].inner.tolist()
        if name == "__setitem__" and isinstance(args[0], DeviceTensor):
            args[0].inner[self._index(args[1])] = _inner(args[2])
            return None
        if name == "__getitem__" and isinstance(args[0], DeviceTensor):
            # As in `_GUARDED`.
            return DeviceTensor(args[0].inner[self._index(args[1])], self.world)
        if name == "numpy" and isinstance(args[0], DeviceTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], Tensor):
            return self._moved(func, name, args, kwargs)
        if name in _GUARDED and isinstance(args[0], DeviceTensor):
            return _GUARDED[name](*args, **kwargs)
        if name in _WHOLE and any(isinstance(a, DeviceTensor) for a in _leaves((args, kwargs))):
            self.world.n_operations += 1
            return DeviceTensor(func(*_inner(args), **_inner(kwargs)), self.world)
        device = kwargs.get("device")
        if name == "new_tensor" and isinstance(args[0], DeviceTensor):
            return self._made(torch.tensor, args[1:], {"dtype": args[0].dtype, **kwargs}, True)
        if _is_cuda(device) and not any(isinstance(a, DeviceTensor) for a in _leaves(args)):
            is_data = name in ("tensor", "as_tensor", "asarray")
            return self._made(func, args, kwargs, is_data)
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any], is_data: bool) -> Tensor:
        kwargs.pop("device", None)
        made = func(*args, **kwargs)
        if is_data:
            self.world.wait("numbers to the device")
        self.world.n_operations += 1
        return DeviceTensor(made, self.world)

    def _index(self, index: Any) -> Any:
        """Read an index as torch does: lists and masks of it make the host wait."""
        for place in index if isinstance(index, tuple) else (index,):
            is_mask = isinstance(place, Tensor) and place.dtype == torch.bool
            if is_mask or isinstance(place, list):
                self.world.wait("boolean index" if is_mask else "index from the host")
        self.world.n_operations += 1
        return _inner(index)

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        value = args[0]
        asked = [*args[1:], *kwargs.values()] if name == "to" else [name]
        asked = [a.device if isinstance(a, Tensor) else a for a in asked]
        wants = [torch.device(a) for a in asked if isinstance(a, (str, torch.device))]
        if not wants or (wants[0].type == "cpu" and not isinstance(value, DeviceTensor)):
            return func(*args, **kwargs)
        dtypes = [a for a in asked if isinstance(a, torch.dtype)]
        dtype = dtypes[0] if dtypes else value.dtype
        is_asynchronous = bool(kwargs.get("non_blocking", False)) or True in args[1:]
        if wants[0].type == "cpu":
            how = {"device": "cpu", "dtype": dtype, "non_blocking": is_asynchronous}
            return _converted(self.world, value, how)
        if isinstance(value, DeviceTensor):
            inner = value.inner.to(dtype, copy=kwargs.get("copy", False))
            return value if inner is value.inner else DeviceTensor(inner, self.world)
        if not is_asynchronous:
            self.world.wait("copy to the device")
        self.world.n_operations += 1
        return DeviceTensor(value.to(dtype, copy=True), self.world)


class _Event:
    """As `torch.cuda.Event`: arrives with the copies queued before it."""

    def __init__(self, world: World, **_: object) -> None:
        self._world, self._has_arrived = world, True

    def record(self, *_: object) -> None:
        self._has_arrived = False

        def arrive() -> None:
            self._has_arrived = True

        self._world.send(arrive)

    def query(self) -> bool:
        return self._has_arrived

    def synchronize(self) -> None:
        if not self._has_arrived:
            self._world.wait("event")


def on_device(model: nn.Module, world: World) -> Any:
    """Move a model's weights there, in place."""
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, value in named.items():
                if value is None:
                    continue
                moved: Tensor = DeviceTensor(value.detach(), world)
                if named is module._parameters:
                    moved = nn.Parameter(moved, requires_grad=False)
                named[name] = moved
    return model


@contextmanager
def fake_cuda() -> Iterator[World]:
    """Have a device."""
    world = World()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.Event", lambda **named: _Event(world, **named)))
        # Draws are made on the CPU.
        own = {"get_rng_state": lambda *_: torch.get_rng_state()}
        own["set_rng_state"] = lambda state, *_: torch.set_rng_state(state)
        stack.enter_context(mock.patch.multiple("torch.cuda", **own))
        stack.enter_context(_Frontend(world))
        yield world
