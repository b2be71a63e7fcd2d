"""What frames ask of a model, answered for a guarded one: pipelines, trainers, wrappers, copies.

Frames take a decoder where they take a model. What they read is forwarded; what would run the
model without its guard, move it away from its bundle or copy half of it is refused in words.

Knows names that frames use. Does not know hooks, prompts or how a call runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NoReturn

import torch

from safe_decode.errors import UnsupportedError
from safe_decode.typing import CausalLM, GenerationSettings, ModelConfig

__all__ = ["ModelFace"]

_FORWARDED = frozenset(
    {
        *("can_generate", "main_input_name", "name_or_path", "framework", "base_model_prefix"),
        *("hf_device_map", "input_modalities", "output_modalities"),
    }
)
"""Facts about a model that frames read and that run nothing."""


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drop one line of transformers: that SafeDecoder is not supported, which it is.

    A pipeline looks for the name of the class in a list of its own and logs an error where it is
    not there; it then goes on, and the list cannot be added to without changing transformers.
    """
    return not record.getMessage().startswith("The model 'SafeDecoder' is not supported for")


logging.getLogger("transformers.pipelines.base").addFilter(_is_no_false_alarm)


class _NotAModule(UnsupportedError, AttributeError):
    """A decoder has no such attribute: it belongs to modules, and using it would skip the guard."""


class ModelFace:
    """Answers for `model` what frames ask, and refuses what would skip the guard.

    Attributes:
        model: The model that is guarded.
    """

    model: CausalLM
    _modules: ClassVar[Mapping[str, object]] = MappingProxyType({})
    """Where accelerate looks for compiled parts: a decoder shows none."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def generation_config(self) -> GenerationSettings:
        """The model's generation configuration, which holds where a call says nothing else."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model stands."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def __getattr__(self, name: str) -> object:
        """Forward facts, and say why the rest of a module is not here.

        Raises:
            AttributeError: There is no such attribute; where modules have it, this is an
                `UnsupportedError` too.
        """
        if name in _FORWARDED and "model" in vars(self):
            return getattr(self.model, name)
        kind = type(self).__name__
        if not name.startswith("__") and hasattr(torch.nn.Module, name):
            raise _NotAModule(
                f"{name} of a {kind} is refused: it is no torch module, and wrappers such as "
                "DataParallel and DistributedDataParallel would run the model in copies that no "
                f"guard reads. Use its generate, one {kind} a process, or its model for work "
                "without the guard."
            )
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refuse a bare forward.

        Raises:
            UnsupportedError: Always: a forward emits nothing, so there is nothing to guard.
        """
        raise UnsupportedError(
            f"calling a {type(self).__name__} is refused: a forward pass alone is not guarded, in "
            "DataParallel and other wrappers neither. Call generate or stream, score finished "
            "responses with score, or call its model for a bare forward."
        )

    def eval(self) -> ModelFace:
        """Return the decoder, whose model is in eval mode already."""
        return self

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelFace:
        """Return the decoder if its model is there already.

        Args:
            device: Where it should be; None: anywhere.
            dtype: What it should compute in; None: anything. It may be given in the first place.

        Raises:
            UnsupportedError: It is elsewhere, or computes in another dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        wanted = None if device is None else torch.device(device)
        is_there = wanted is None or (
            wanted.type == self.device.type and wanted.index in (None, self.device.index)
        )
        if is_there and dtype in (None, self.dtype):
            return self
        asked = ", ".join(str(one) for one in (wanted, dtype) if one is not None)
        raise UnsupportedError(
            f"to({asked}) is refused: the guard reads the model where it was wrapped, on "
            f"{self.device} in {self.dtype}. Move the model first and wrap it there; to a "
            "pipeline, pass device=decoder.device."
        )

    def __copy__(self) -> NoReturn:
        """Refuse a copy, see `__reduce_ex__`."""
        self._refuse_copy("copy.copy")

    def __deepcopy__(self, _memo: object) -> NoReturn:
        """Refuse a copy, see `__reduce_ex__`."""
        self._refuse_copy("copy.deepcopy")

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse pickling, which other processes would be sent a decoder by.

        Raises:
            UnsupportedError: Always.
        """
        self._refuse_copy("pickle")

    def _refuse_copy(self, how: str) -> NoReturn:
        raise UnsupportedError(
            f"{how} of a {type(self).__name__} is refused: it stands on hooks and seals of one "
            "model in one process. For other settings, wrap the same model again; in another "
            "process, load the model and the bundle there, and wrap them."
        )
