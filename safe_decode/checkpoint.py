"""What lies under a model's name, looked at before its weights are loaded.

A directory that is no checkpoint, lacks its weights, or needs a package that is not installed is
refused in a second, not after minutes. What is only named, not a directory, is left to
transformers, which may fetch it.

Knows file names, adapters, GGUF files and quantisation methods. Does not know weights, bundles or
generation. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safe_decode.errors import ConfigurationError

__all__ = ["SIZES", "ModelFiles", "look_at"]

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
)
_PACKAGES: Mapping[str, tuple[str, str]] = {
    "torchao": ("torchao", "pip install torchao"),
    "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes"),
    "gptq": ("gptqmodel", "pip install gptqmodel"),
    "awq": ("gptqmodel", "pip install gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "pip install compressed-tensors"),
    "quanto": ("optimum.quanto", "pip install optimum-quanto"),
    "hqq": ("hqq", "pip install hqq"),
}
"""Methods of quantisation, the module that each needs, and how it is installed."""
_SHOWN = 5
SIZES = ("hidden_size", "num_hidden_layers", "max_position_embeddings")
"""Entries of a configuration: width of the residual stream, decoder blocks, positions."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model lie.

    Attributes:
        model: What transformers loads: the adapter's directory where there is one.
        tokenizer: Where the tokenizer lies: with the adapter, or else with its base.
        config: Where the configuration of the model itself lies: with the base.
        quantisation: Method by which the weights are stored; None: plain, or not known.
        is_adapter: Whether an adapter stays live on its base.
        has_tokenizer: Whether files of a tokenizer are there, beside a GGUF file that holds one
            too; theirs has the chat template as its authors wrote it.
    """

    model: str
    tokenizer: str
    config: str
    quantisation: str | None = None
    is_adapter: bool = False
    has_tokenizer: bool = True

    def is_local_without_template(self) -> bool:
        """Say whether the tokenizer lies in a directory in which no chat template is."""
        place = Path(self.tokenizer)
        if self.quantisation == "gguf" or not place.is_dir():
            return False  # a GGUF file may hold one, and a hub cannot be looked at
        named = [*place.glob("chat_template*"), *place.glob("additional_chat_templates")]
        config = place / "tokenizer_config.json"
        return not named and not (config.is_file() and _json(config).get("chat_template"))

    def sizes(self) -> tuple[int, int, int] | None:
        """Read width, layers and positions as a plain configuration spells them.

        Returns:
            None where there is none, or where it has other words for them: transformers knows.
        """
        path = Path(self.config) / _CONFIG
        if self.quantisation == "gguf" or not path.is_file():
            return None
        known = _json(path)
        values = [value for name in SIZES if isinstance(value := known.get(name), int)]
        if len(values) < len(SIZES):
            return None
        width, layers, positions = values
        return width, layers, positions


def look_at(name: str | Path, gguf_file: str | None = None) -> ModelFiles:
    """Look at a model's directory.

    Args:
        name: A directory, a name of the catalogue, or one that transformers resolves.
        gguf_file: File of the directory that holds the weights; None: a plain checkpoint.

    Raises:
        ConfigurationError: The model of that name was not fetched yet, the directory holds no
            model or lacks its weights, or a package that its format needs is not installed.
    """
    from safe_decode.catalogue import fetched_model

    source = Path(name)
    if not source.is_dir() and (fetched := fetched_model(str(name))) is not None:
        source = fetched
    if not source.is_dir():
        if source.suffix == ".gguf" and source.is_file():
            raise ConfigurationError(
                f"model={str(name)!r} is one file; pass its directory, "
                f"{str(source.parent)!r}, and gguf_file={source.name!r} (--gguf-file)."
            )
        if source.is_absolute() or str(name).startswith((".", "~")):
            raise ConfigurationError(
                f"model={str(name)!r} cannot be loaded: there is no such directory; pass that of a "
                "causal language model, or its name."
            )
        return ModelFiles(str(name), str(name), str(name))
    if gguf_file is not None:
        return _gguf(source, gguf_file)
    if (source / _ADAPTER).is_file():
        return _adapter(source)
    return _plain(source)


def _gguf(source: Path, file: str) -> ModelFiles:
    if not (source / file).is_file():
        there = sorted(path.name for path in source.glob("*.gguf"))
        raise ConfigurationError(
            f"gguf_file={file!r} is not in {str(source)!r}, which holds "
            f"{', '.join(there) or 'no .gguf file'}; pass one that is there."
        )
    if find_spec("accelerate") is None:
        raise ConfigurationError(
            "accelerate is missing, which GGUF files are loaded with; install it with: pip "
            "install 'safe-decode[gguf]'"
        )
    place = str(source)
    has = _has_tokenizer(source)
    return ModelFiles(place, place, place, quantisation="gguf", has_tokenizer=has)


def _adapter(source: Path) -> ModelFiles:
    if find_spec("peft") is None:
        raise ConfigurationError(
            f"model={str(source)!r} is an adapter ({_ADAPTER}), and peft is missing; install it "
            "with: pip install 'safe-decode[adapters]', or merge the adapter into its base."
        )
    if not any((source / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ConfigurationError(
            f"model={str(source)!r} holds {_ADAPTER} and no {_ADAPTER_WEIGHTS[0]}; pass the "
            "directory that the adapter was saved to."
        )
    base: Any = source  # a whole model with an adapter beside it
    if not (source / _CONFIG).is_file():
        base = _json(source / _ADAPTER).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ConfigurationError(
                f"model={str(source)!r} is an adapter whose {_ADAPTER} names no base "
                "(base_model_name_or_path); name it there."
            )
    try:
        below = _plain(base) if isinstance(base, Path) else look_at(base)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"model={str(source)!r} is an adapter on {str(base)!r}, which cannot be loaded: "
            f"{error} Mend base_model_name_or_path in its {_ADAPTER}."
        ) from error
    tokenizer = str(source) if _has_tokenizer(source) else below.tokenizer
    return ModelFiles(str(source), tokenizer, below.config, below.quantisation, is_adapter=True)


def _plain(source: Path) -> ModelFiles:
    there = sorted(path.name for path in source.iterdir())
    if _CONFIG not in there:
        files = [one for one in there if one.endswith(".gguf")]
        remedy = (
            f"pass gguf_file={files[0]!r} (--gguf-file)"
            if files
            else "pass the directory that save_pretrained wrote"
        )
        raise ConfigurationError(
            f"model={str(source)!r} holds no {_CONFIG}, but {_shown(there)}; {remedy}."
        )
    if not any(any(source.glob(pattern)) for pattern in _WEIGHTS):
        raise ConfigurationError(
            f"model={str(source)!r} holds no weights (*.safetensors or *.bin), but "
            f"{_shown(there)}; fetch them, or pass the directory that save_pretrained wrote."
        )
    method = _method(_json(source / _CONFIG))
    module, install = _PACKAGES.get(method or "", ("", ""))
    if module and not _is_there(module):
        raise ConfigurationError(
            f"model={str(source)!r} is quantised by {method}, and {module} is missing; install it "
            f"with: {install}, or pass the model as it was before it was quantised."
        )
    return ModelFiles(str(source), str(source), str(source), quantisation=method)


def _has_tokenizer(source: Path) -> bool:
    return any((source / name).is_file() for name in _TOKENIZER)


def _method(config: Mapping[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method")) if isinstance(found, Mapping) else None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} is not JSON that can be read ({error}); fetch the file again."
        ) from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} holds no JSON object; fetch the file again.")
    return found


def _shown(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
