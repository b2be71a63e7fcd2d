"""Whether a model and its tokenizer are still those whose fingerprint was matched.

Knows cheap signs that something has moved: which tensors stand where, how often they were
written to, a few values of each, adapters, configuration, template, vocabulary. Where a sign has
moved the fingerprint is taken again and decides. Does not know bundles, probes or calls.

Not seen: an edit through `.data` that leaves the few values read here as they were, and an edit of
any kind that leaves those of the fingerprint; hooks, and attributes of modules that are no
tensors. The canary sees what these do to the scores.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safe_decode.bundle.fingerprint import CONFIG_KEYS, Fingerprint, config_value
from safe_decode.errors import FingerprintMismatchError, UnsupportedError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["ModelSeal"]

SAMPLED_VALUES = 8
"""Values of each parameter that are compared at every call, evenly spaced, both ends included."""

_PLAIN = (nn.Parameter, Tensor)
"""No tensors of somebody's own kind, as quantised and sharded ones are."""


@dataclass(frozen=True)
class _State:
    """What must stay as it was, beside the fingerprint, in words of a message.

    Attributes:
        devices: Where parameters are.
        adapters: Of each adapter layer: what is active, merged, disabled, and by what factor.
        buffers: Sampled bytes of buffers that are saved with the model.
    """

    devices: tuple[str, ...]
    adapters: tuple[object, ...]
    buffers: bytes


class ModelSeal:
    """Vouches for one model and tokenizer, call after call.

    Args:
        model: As it was when `fingerprint` was matched.
        tokenizer: Its tokenizer.
        fingerprint: What both must go on to have.

    Raises:
        UnsupportedError: A module is in training mode.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, fingerprint: Fingerprint) -> None:
        self._model, self._tokenizer, self._fingerprint = model, tokenizer, fingerprint
        _require_eval(model)
        self._lock = threading.Lock()
        self._state = _state_of(model)
        self._signs: _Signs | None = _Signs.of(model, tokenizer)

    def require(self) -> None:
        """Check that nothing has changed.

        Raises:
            FingerprintMismatchError: Something has; all that has is named.
            UnsupportedError: A module is in training mode.
        """
        signs = self._signs
        if signs is not None and signs.stand(self._model, self._tokenizer):
            return
        with self._lock:
            self._signs = None  # lets go of what is no longer the model's
            found = Fingerprint.of(self._model, self._tokenizer)
            differing = self._fingerprint.differences(found)
            differing += _state_differences(self._state, _state_of(self._model))
            if differing:
                raise FingerprintMismatchError(
                    f"the model has changed since it was wrapped: {'; '.join(differing)}; take the "
                    "change back, or make a bundle for the changed model and wrap it anew."
                )
            _require_eval(self._model)
            self._signs = _Signs.of(self._model, self._tokenizer)


@dataclass(frozen=True, eq=False)
class _Signs:
    """What is compared at every call.

    Attributes:
        tensors: Of every module and tensor: identity, address, writes. Of adapters: their state.
        views: A few values of each parameter, as views of the parameters themselves.
        values: What they were, one a dtype and device.
        words: Configuration, template, size of the vocabulary.
    """

    tensors: list[object]
    views: list[list[Tensor]]
    values: list[Tensor]
    words: tuple[object, ...]

    @classmethod
    def of(cls, model: CausalLM, tokenizer: Tokenizer) -> _Signs:
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter in model.parameters():
            if type(parameter) in _PLAIN and not parameter.is_meta and parameter.numel():
                group = groups.setdefault((parameter.dtype, parameter.device), [])
                group.append(_few(parameter))
        views = list(groups.values())
        words = copy.deepcopy(_words_of(model, tokenizer))
        return cls(_tensor_signs(model), views, [_bytes(v) for v in views], words)

    def stand(self, model: CausalLM, tokenizer: Tokenizer) -> bool:
        """Say whether all signs are as they were."""
        return (
            self.words == _words_of(model, tokenizer)
            and self.tensors == _tensor_signs(model)
            and all(
                torch.equal(_bytes(views), values)
                for views, values in zip(self.views, self.values, strict=True)
            )
        )


def _tensor_signs(model: CausalLM) -> list[object]:
    # At every call, over hundreds of modules and tensors: `model.modules()` and a function a
    # tensor take several times as long.
    signs: list[object] = []
    stack: list[Any] = [model]
    while stack:
        module = stack.pop()
        parts = module.__dict__
        tensors = list(parts["_parameters"].values())
        if parts["_buffers"]:
            # What is not saved is computed, as rotary tables are, anew where a text is long.
            passing = parts["_non_persistent_buffers_set"]
            tensors += [b for name, b in parts["_buffers"].items() if name not in passing]
        signs += (id(module), parts["training"])
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.is_meta:
                signs.append("meta")  # accelerate puts a new one there after each forward
                continue
            signs += (id(tensor), -1 if tensor.is_inference() else tensor._version)
            if type(tensor) in _PLAIN:
                # The views of _Signs keep the old memory: no other tensor comes to its address.
                signs.append(tensor.data_ptr())
        if hasattr(type(module), "_active_adapter"):
            signs.append(_adapter_state(module))
        stack += [child for child in parts["_modules"].values() if child is not None]
    return signs


def _adapter_state(module: nn.Module) -> tuple[object, ...]:
    layer: Any = module  # a tuner layer of peft
    active = layer._active_adapter
    return (
        active if isinstance(active, str) else tuple(active),
        tuple(layer.merged_adapters),
        bool(layer.disable_adapters),
        str(getattr(layer, "scaling", "")),
    )


def _words_of(model: CausalLM, tokenizer: Tokenizer) -> tuple[object, ...]:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (
        [config_value(text, key) for key in CONFIG_KEYS],
        tuple(getattr(model, "peft_config", None) or ()),
        getattr(tokenizer, "chat_template", None),
        len(tokenizer) if hasattr(tokenizer, "__len__") else len(tokenizer.get_vocab()),
    )


def _few(parameter: Tensor) -> Tensor:
    """Take a few values of a parameter as a view of it, [n <= SAMPLED_VALUES]."""
    values = parameter.detach()
    if not values.is_contiguous():
        while values.ndim > 1:
            values = values[..., 0]
    flat = values.view(-1) if values.is_contiguous() else values
    return flat[:: max(1, (flat.numel() - 1) // (SAMPLED_VALUES - 1))][:SAMPLED_VALUES]


def _bytes(views: list[Tensor]) -> Tensor:
    # As bytes, since NaN is not NaN. One call for all, and on accelerators few kernels.
    with torch.no_grad():
        return torch.cat(views).view(torch.uint8)


def _state_of(model: CausalLM) -> _State:
    saved = (
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )
    few = [_few(buffer).contiguous().cpu() for buffer in saved if buffer.numel()]
    return _State(
        devices=tuple(sorted({str(p.device) for p in model.parameters()})),
        adapters=tuple(
            _adapter_state(module)
            for module in model.modules()
            if hasattr(type(module), "_active_adapter")
        ),
        buffers=b"".join(one.view(torch.uint8).numpy().tobytes() for one in few),
    )


def _state_differences(wanted: _State, got: _State) -> list[str]:
    lines: Mapping[str, str] = {
        "devices": f"parameters are on {', '.join(got.devices)}, were on "
        f"{', '.join(wanted.devices)}",
        "adapters": f"adapters are {_named(got)}, were {_named(wanted)}",
        "buffers": "values of buffers differ",
    }
    return [line for name, line in lines.items() if getattr(wanted, name) != getattr(got, name)]


def _named(state: _State) -> str:
    """Name the states of adapters in words, each once."""
    adapters: Any = state.adapters
    words = dict.fromkeys(
        f"active={active}, merged={merged}, disabled={is_off}, scaling={scaling}"
        for active, merged, is_off, scaling in adapters
    )
    return " | ".join(words) or "none"


def _require_eval(model: CausalLM) -> None:
    name = next((name for name, module in model.named_modules() if module.training), None)
    if name is not None:
        raise UnsupportedError(
            "training=True is refused: dropout draws random numbers and makes scores noise, and "
            f"module {name or 'the model'!r} is in training mode; call model.eval() first."
        )
