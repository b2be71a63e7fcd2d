"""What is guarded, and what is refused by name before the first token, with the reason.

One table (`capability_table`) is the source of this check, of what a certificate covers and of
the README's table. Knows option names and values. Does not know tensors, hooks or how the guard
works, and does not import transformers: configurations are read by duck typing. What the table
does not name is refused unless it has its default value, so that an option of a later version
cannot skip the guard in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from safe_decode.activations.compiled.forward_patch import compiled_part
from safe_decode.activations.families import why_alone, why_unpadded
from safe_decode.engines.transformers.capability import EFFECTS, Capability, Status
from safe_decode.engines.transformers.capability_table import TABLE, WRAPPERS
from safe_decode.engines.transformers.loops.extra_forwards import positions_in
from safe_decode.engines.transformers.option_types import require_types
from safe_decode.errors import UnsupportedError
from safe_decode.typing import CausalLM

__all__ = [
    "TABLE",
    "Capability",
    "as_markdown",
    "require_rows",
    "require_supported",
    "require_supported_model",
]

_CACHE = "cache_implementation"
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")

_BY_FEATURE = {capability.feature: capability for capability in TABLE}
# Bookkeeping of a GenerationConfig, not an option.
_BOOKKEEPING = frozenset({"transformers_version"})


def require_supported(
    model: CausalLM,
    options: Mapping[str, object],
    *,
    is_installed: bool = False,
) -> None:
    """Refuse a call that would skip the guard, before the first token.

    Args:
        model: A Hugging Face model; its `generation_config` fills what the call leaves open.
        options: Keyword arguments as for `model.generate`.
        is_installed: Whether taps stand where compiled graphs read them.

    Raises:
        UnsupportedError: An option is refused, or unknown to this version and not at its
            default. The message names it, the reason and what to do instead.
        ConfigurationError: An option is of a type that `generate` cannot read.
    """
    require_types(options)
    require_supported_model(model, is_installed=is_installed)
    own = getattr(model, "generation_config", None)
    given = options.get("generation_config")
    defaults = _defaults_of(own)
    for key, value in options.items():
        if key != "generation_config":
            _require(key, value, defaults.get(key), is_installed=is_installed)
    for config in (given, own):
        for key, value in _values_of(config).items():
            if options.get(key) is None and not (
                config is own and _values_of(given).get(key) is not None
            ):
                _require(key, value, defaults.get(key), is_installed=is_installed)
    kinds = (options.get(_CACHE), *(_values_of(config).get(_CACHE) for config in (given, own)))
    kind = next((kind for kind in kinds if kind is not None), "")
    _require("cache_offloading", "offloaded" in str(kind) and not _is_on_cuda(model))
    _require_taken_back(model, options, (given, own))


def _require_taken_back(
    model: CausalLM, options: Mapping[str, object], configs: Sequence[object]
) -> None:
    """Refuse what would have to take tokens back out of a recurrent state, or to count them."""
    drafts = [options.get(name) for name in _DRAFTS]
    drafts += [_values_of(config).get(name) for config in configs for name in _DRAFTS]
    is_stateful = bool(getattr(model, "_is_stateful", False))
    _require("recurrent_draft", is_stateful and any(drafts))
    cache: Any = options.get("past_key_values")
    _require("recurrent_cache", cache is not None and positions_in(cache) is None)


def require_supported_model(model: CausalLM, *, is_installed: bool = False) -> None:
    """Refuse a model in a state that cannot be guarded.

    Raises:
        UnsupportedError: Run in copies or parts by a wrapper, encoder-decoder, in
            training mode, wholly offloaded, under torch.autocast or accelerate's mixed precision,
            or compiled without installed taps.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for wrapper in WRAPPERS:
        _require(wrapper, wrapper in kinds)
    _require("meta device", _device_type(model) == "meta")
    # Where accelerate keeps the forward that it has replaced.
    _require("mixed_precision", "_original_forward" in getattr(model, "__dict__", {}))
    config = getattr(model, "config", None)
    _require("is_encoder_decoder", getattr(config, "is_encoder_decoder", False))
    _require("training", getattr(model, "training", False))
    _require("torch.autocast", torch.is_autocast_enabled(_device_type(model)))
    _require("torch.compile", compiled_part(model), is_installed=is_installed)


def require_rows(model: CausalLM, attention_mask: Tensor | None, n_copies: int = 1) -> None:
    """Refuse a batch in which rows of some families would read each other, or padding.

    Args:
        model: As it generates.
        attention_mask: [batch, seq] of the prompts; None: of any, as a server joins them.
        n_copies: Rows that run for each prompt.

    Raises:
        UnsupportedError: The family runs one row at a time, or rows of one length, and the batch
            has more, or padding.
    """
    n_rows = 2 if attention_mask is None else attention_mask.shape[0] * n_copies
    for config in (model.config, model.config.get_text_config()):
        alone, unpadded = why_alone(config), why_unpadded(config)
        if alone is not None and n_rows > 1:
            raise UnsupportedError(
                f"a batch of {n_rows} rows is refused for model_type={config.model_type!r}: "
                f"{alone}; run one row at a time."
            )
        if unpadded is not None and (attention_mask is None or not bool(attention_mask.all())):
            raise UnsupportedError(
                f"padding is refused for model_type={config.model_type!r}: {unpadded}; run prompts "
                "of one length together, or one prompt at a time."
            )


def as_markdown() -> str:
    """Render the table for the README, supported features first."""
    lines = ["| feature | status | certificate | note | instead |", "|---|---|---|---|---|"]
    for status in get_args(Status):
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for row in TABLE:
            if row.status == status:
                reason = row.reason + (f"; not installed: {row.eager}" if row.eager else "")
                effect = EFFECTS[row.effect] + "".join(f"; {v} voids" for v in row.voiding)
                grouped.setdefault((effect, reason, row.instead), []).append(f"`{row.feature}`")
        lines += [
            f"| {', '.join(features)} | {status} | {effect} | {reason} | {instead} |"
            for (effect, reason, instead), features in grouped.items()
        ]
    return "\n".join(lines) + "\n"


def _require(
    feature: str, value: object, default: object = None, *, is_installed: bool = False
) -> None:
    capability = _BY_FEATURE.get(feature)
    if capability is None:
        if value is None or feature in _BOOKKEEPING or _same(value, default):
            return
        raise UnsupportedError(
            f"{feature}={_shown(value)} is not known to this version of safe-decode and could skip "
            "the guard; leave it at its default."
        )
    if not capability.is_used_by(value):
        return
    if is_installed and capability.eager:
        raise UnsupportedError(
            f"{feature}={_shown(value)} is refused inside decoder.installed(): {capability.eager}; "
            "leave it out, or generate outside."
        )
    is_refused = capability.status in ("refused", "served")
    if is_refused or (capability.status == "installed" and not is_installed):
        raise UnsupportedError(
            f"{feature}={_shown(value)} is refused: {capability.reason}; {capability.instead}."
        )


def _is_on_cuda(model: CausalLM) -> bool:
    return _device_type(model) == "cuda"


def _device_type(model: CausalLM) -> str:
    return str(getattr(getattr(model, "device", None), "type", "cpu"))


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and bool(value == default)


def _shown(value: object) -> str:
    plain = isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"<{type(value).__name__}>"


def _values_of(config: object) -> dict[str, object]:
    public = vars(config) if config is not None else {}
    return {key: value for key, value in public.items() if not key.startswith("_")}


def _defaults_of(config: object) -> dict[str, object]:
    """Read the defaults of the installed version from the class of a configuration."""
    if config is None:
        return {}
    fallback: Callable[[], dict[str, object]] = getattr(
        config, "_get_default_generation_params", dict
    )
    return {**_values_of(type(config)()), **fallback()}
