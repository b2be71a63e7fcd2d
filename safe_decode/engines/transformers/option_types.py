"""Whether each option of a call is of a type that `generate` can read.

Knows names and types. Does not know which options are guarded, models or tensors; what it does
not name passes. transformers itself raises bare TypeErrors, some of them after the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from safe_decode.errors import ConfigurationError

__all__ = ["require_seed", "require_types"]

_Check = Callable[[Any], bool]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_configuration(value: object) -> bool:
    # By name, so that transformers is not imported here; subclasses of models count.
    return any(base.__name__ == "GenerationConfig" for base in type(value).__mro__)


def _are_strings(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    is_list = isinstance(value, (list, tuple))
    return is_list and all(isinstance(one, str) and one for one in value)  # type: ignore[attr-defined]


def _are_ids(value: object) -> bool:
    if _is_int(value) or hasattr(value, "tolist"):
        return True
    return isinstance(value, (list, tuple)) and all(map(_is_int, value))


def _are_callable(value: object) -> bool:
    return isinstance(value, Iterable) and all(map(callable, value))


def _is_streamer(value: object) -> bool:
    return callable(getattr(value, "put", None)) and callable(getattr(value, "end", None))


def _named(check: _Check, wanted: str, names: str) -> dict[str, tuple[_Check, str]]:
    return dict.fromkeys(names.split(), (check, wanted))


_WANTED: Mapping[str, tuple[_Check, str]] = {
    **_named(_is_configuration, "a transformers.GenerationConfig", "generation_config"),
    **_named(_are_strings, "a string or a list of strings, none of them empty", "stop_strings"),
    **_named(_are_ids, "an id or a list of ids", "eos_token_id suppress_tokens"),
    **_named(_are_ids, "an id or a list of ids", "begin_suppress_tokens"),
    **_named(_are_callable, "a list of callables", "logits_processor stopping_criteria"),
    **_named(callable, "a callable", "prefix_allowed_tokens_fn"),
    **_named(_is_streamer, "an object with the methods put and end", "streamer"),
    **_named(_is_flag, "True or False", "do_sample use_cache return_dict_in_generate"),
    **_named(_is_flag, "True or False", "output_scores output_logits renormalize_logits"),
    **_named(_is_flag, "True or False", "output_attentions output_hidden_states"),
    **_named(_is_int, "an integer", "max_new_tokens max_length min_new_tokens min_length"),
    **_named(_is_int, "an integer", "top_k num_beams num_return_sequences prefill_chunk_size"),
    **_named(_is_int, "an integer", "no_repeat_ngram_size prompt_lookup_num_tokens"),
    **_named(_is_number, "a number", "temperature top_p top_h min_p typical_p epsilon_cutoff"),
    **_named(_is_number, "a number", "eta_cutoff repetition_penalty max_time length_penalty"),
}


def require_types(options: Mapping[str, object]) -> None:
    """Refuse options that `generate` cannot read; None is always an option left out.

    Raises:
        ConfigurationError: Names the option, the type it has and the one wanted.
    """
    for name, value in options.items():
        if value is None or name not in _WANTED:
            continue
        is_good, wanted = _WANTED[name]
        if not is_good(value):
            raise ConfigurationError(
                f"{name}={_shown(value)} is of type {type(value).__name__}, wanted {wanted}; pass "
                "one, or leave it out."
            )


def require_seed(seed: object) -> None:
    """Refuse what no random generator can be seeded with.

    Args:
        seed: None, an integer, or a list with one of them for each prompt.

    Raises:
        ConfigurationError: It is something else, or outside of 64 bits.
    """
    for one in seed if isinstance(seed, (list, tuple)) else (seed,):
        if one is None:
            continue
        if not _is_int(one) or not -(2**63) <= int(one) < 2**64:
            raise ConfigurationError(
                f"seed={_shown(one)} is of type {type(one).__name__}, wanted an integer of at most "
                "64 bits, None, or a list of them; pass one."
            )


def _shown(value: object) -> str:
    plain = isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"<{type(value).__name__}>"
