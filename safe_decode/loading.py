"""Loading a model and its tokenizer by name or path.

Knows how a name becomes a model on a device, in which numbers, and in which order: what can be
told without the weights is told before them. Does not know prompts, bundles or generation.
Imports transformers only when a model is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safe_decode.checkpoint import SIZES, ModelFiles, look_at
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "Dtype",
    "GgufForm",
    "Loaded",
    "LoadSettings",
    "ModelSizes",
    "load_model",
    "plain_dtype",
    "sizes_of",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""auto: the checkpoint's own, which `from_pretrained` takes too where nothing else is said."""
GgufForm = Literal["dequantised", "packed"]
"""dequantised: unpacked into plain weights; runs everywhere. packed: the file's blocks stay as they
are and are unpacked in each product, by a kernel that transformers fetches for the device."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode with its tokenizer, as transformers yields them."""

    model: CausalLM
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model; None where its configuration does not say.

    Attributes:
        width: Channels of the residual stream.
        layers: Decoder blocks.
        context: Positions.
    """

    width: int | None
    layers: int | None
    context: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a model is loaded.

    Attributes:
        device: Where the model goes, as torch spells it.
        dtype: In what it computes.
        gguf_file: File of the directory that holds the weights; None: a plain checkpoint.
        gguf: In which form the weights of a GGUF file are kept.
    """

    device: str = "cpu"
    dtype: Dtype = "auto"
    gguf_file: str | None = None
    gguf: GgufForm = "dequantised"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("dtype", self.dtype, get_args(Dtype)),
            ("gguf", self.gguf, get_args(GgufForm)),
        ):
            if value not in choices:
                raise ConfigurationError(f"{name}={value!r} is not one of {choices}; pass one.")
        if self.gguf == "packed" and self.gguf_file is None:
            raise ConfigurationError(
                "gguf='packed' needs gguf_file, the file whose blocks stay packed; pass it."
            )


def load_model(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: Dtype = "auto",
    gguf_file: str | None = None,
    gguf: GgufForm = "dequantised",
    needs_template: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer by name or path.

    Args:
        name: A directory in the Hugging Face format, that of a peft adapter, which stays live on
            its base, or a name that transformers resolves.
        device: As in `LoadSettings`.
        dtype: As in `LoadSettings`.
        gguf_file: As in `LoadSettings`.
        gguf: As in `LoadSettings`.
        needs_template: Refuse a tokenizer without a chat template, before the weights are read.

    Raises:
        ConfigurationError: An unknown dtype, form or device, nothing to load under that name, no
            chat template where one is needed, or a package that the format needs is missing.
    """
    how = LoadSettings(device=device, dtype=dtype, gguf_file=gguf_file, gguf=gguf)
    found = look_at(name, gguf_file)
    import torch
    from transformers import AutoModelForCausalLM

    with _as_configuration_error(name, how):
        _require_packable(found.model, how)
        target = torch.device(device)
        torch.empty(0, device=target)  # a device that is not there, before the weights
        tokenizer = _tokenizer(found, how)
        if needs_template and not getattr(tokenizer, "chat_template", None):
            raise _without_template(name)
        model: CausalLM = AutoModelForCausalLM.from_pretrained(
            found.model,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            **_weights_options(found, how),
        )
    if getattr(model, "quantization_method", None) is None:
        model = model.to(target)
    return Loaded(model.eval(), tokenizer)


def sizes_of(
    name: str | Path, how: LoadSettings | None = None, *, needs_template: bool = False
) -> ModelSizes:
    """Read a model's sizes from its small files, without its weights.

    Args:
        name: As in `load_model`.
        how: How it will be loaded.
        needs_template: As in `load_model`.

    Raises:
        ConfigurationError: As `load_model`, of what can be told without weights.
    """
    how = how or LoadSettings()
    found = look_at(name, how.gguf_file)
    if needs_template and found.is_local_without_template():
        raise _without_template(name)
    if (sizes := found.sizes()) is not None:
        return ModelSizes(*sizes)
    from transformers import AutoConfig

    file = {} if how.gguf_file is None else {"gguf_file": how.gguf_file}
    with _as_configuration_error(name, how):
        config = AutoConfig.from_pretrained(found.config, **file).get_text_config()
        if needs_template and not getattr(_tokenizer(found, how), "chat_template", None):
            raise _without_template(name)
    values = (getattr(config, key, None) for key in SIZES)
    return ModelSizes(*(value if isinstance(value, int) else None for value in values))


def plain_dtype(name: str | Path, how: LoadSettings) -> str | None:
    """Tell in which dtype a plain checkpoint will be loaded, from its configuration alone.

    Args:
        name: As in `load_model`.
        how: How it will be loaded.

    Returns:
        A name such as "bfloat16"; None where the weights decide: those of adapters, of quantised
        models, and where the configuration does not say.

    Raises:
        ConfigurationError: As `load_model`, of what can be told without weights.
    """
    found = look_at(name, how.gguf_file)
    if found.is_adapter or found.quantisation is not None:
        return None
    from transformers import AutoConfig

    with _as_configuration_error(name, how):
        config = AutoConfig.from_pretrained(found.config)
    if getattr(config, "quantization_config", None) is not None:
        return None
    if how.dtype != "auto":
        return how.dtype
    own = getattr(config, "dtype", None)
    return None if own is None else str(own).removeprefix("torch.")


def _tokenizer(found: ModelFiles, how: LoadSettings) -> Tokenizer:
    from transformers import AutoConfig, AutoTokenizer

    file = {} if how.gguf_file is None else {"gguf_file": how.gguf_file}
    options: dict[str, Any] = {}
    if not found.has_tokenizer:
        options |= file
    elif file or found.tokenizer != found.config:
        # These directories have no configuration, which a tokenizer's class may hang on.
        options["config"] = AutoConfig.from_pretrained(found.config, **file)
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(found.tokenizer, **options)
    return tokenizer


def _weights_options(found: ModelFiles, how: LoadSettings) -> dict[str, Any]:
    if found.quantisation is None:
        return {}  # or named on a hub: then its method puts the weights where it wants
    # Quantised weights are put where they stay: moving them afterwards is refused by some methods.
    options: dict[str, Any] = {"device_map": {"": how.device}}
    if how.gguf_file is not None:
        options["gguf_file"] = how.gguf_file
        with contextlib.suppress(ImportError):  # before it, GGUF files were always dequantised
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=how.gguf == "dequantised")
    return options


def _require_packable(name: str, how: LoadSettings) -> None:
    """Refuse, before the weights are read, what transformers would dequantise after all."""
    if how.gguf == "dequantised" or how.gguf_file is None:
        return
    why = ""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
        from transformers.integrations.gguf.kernels import get_gguf_kernel
        from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata
    except ImportError:
        why = "this version of transformers keeps no file packed"
    else:
        path = str(Path(name) / how.gguf_file)
        kind = read_gguf_metadata(path)[0]["general.architecture"]
        if kind not in GGUF_ARCHS:
            why = f"transformers keeps {', '.join(sorted(GGUF_ARCHS))} packed, and this is {kind}"
        elif not GgufHeader.from_file(path).has_quantized_weights:
            why = "the file holds plain numbers"
        elif not get_gguf_kernel():
            why = "transformers finds no kernel for this machine (in the package `kernels`)"
    if why:
        raise ConfigurationError(
            f"gguf='packed' is not possible for {how.gguf_file!r}: {why}; pass gguf='dequantised' "
            "(--gguf dequantised)."
        )


def _without_template(name: str | Path) -> ConfigurationError:
    return ConfigurationError(
        f"model={str(name)!r} has no chat template: it is a base model, or its template was left "
        "out, and a turn of the assistant cannot be told from the rest; pass the model's chat or "
        "instruct version, or put its template into chat_template.jinja beside the tokenizer."
    )


@contextlib.contextmanager
def _as_configuration_error(name: str | Path, how: LoadSettings) -> Iterator[None]:
    """Turn what transformers and torch raise on bad names into one clear error."""
    try:
        yield
    except ConfigurationError:
        raise
    except ImportError as error:  # of a package that a format needs
        cause = str(error).strip().splitlines()[:1]
        extra = "" if how.gguf_file is None else " with: pip install 'safe-decode[gguf]'"
        raise ConfigurationError(
            f"model={str(name)!r} needs a package that is not installed: {''.join(cause)} Install "
            f"it{extra}, or pass the model in another format."
        ) from error
    # AssertionError: what torch raises for "cuda" in a build without CUDA.
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().splitlines()[:1]
        raise ConfigurationError(
            f"model={str(name)!r} cannot be loaded on device={how.device!r}: {''.join(cause)} Pass "
            "a directory or name of a causal language model, and a device that is there."
        ) from error
