"""The options of a call as `generate` reads them: argument, given configuration, model's own.

Knows the options and their precedence. Does not know prompts, policies or rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safe_decode.engines.transformers.call_spec import GuardedModel

__all__ = ["CallOptions"]

_DEFAULT_CAP = 20
"""New tokens of a call that names no cap, as in transformers."""
_OURS = frozenset(
    {
        *("tokenizer", "assistant_tokenizer", "inputs", "inputs_embeds", "streamer"),
        *("custom_generate", "trust_remote_code", "disable_compile"),
    }
)
"""Options that do not go to the model's `generate` as they are."""


@dataclass(frozen=True)
class CallOptions:
    """The keyword arguments of one call.

    Attributes:
        protected: The model and its guard.
        given: As the caller named them.
    """

    protected: GuardedModel
    given: Mapping[str, Any]

    def get(self, name: str) -> Any:  # noqa: ANN401 - each has a type of its own
        """Read an option as `generate` does."""
        configs = (self.given.get("generation_config"), self.protected.model.generation_config)
        values = (self.given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def cap(self, width: int) -> int:
        """Count the new tokens that are asked for at most, behind a prompt of so many columns."""
        cap = self.get("max_new_tokens")
        if cap is not None:
            return int(cap)
        most = self.get("max_length")
        return _DEFAULT_CAP if most is None else int(most) - width

    def places(self, width: int) -> int:
        """Count the places that a cache of fixed size has, unseen tokens aside."""
        return max(self.get("max_cache_len") or 0, width + self.cap(width))

    def for_generate(self) -> dict[str, Any]:
        """Return what goes to the model's own `generate`."""
        given = self.given
        options = {key: value for key, value in given.items() if key not in _OURS}
        cache = self.get("cache_implementation") or ""
        if self.protected.tap.is_built_in:
            if given.get("disable_compile") is not None:
                options["disable_compile"] = given["disable_compile"]
        elif "static" in cache or given.get("past_key_values") is not None:
            # A graph compiled by generate itself would skip the hooks.
            options["disable_compile"] = True
        stop_strings = self.get("stop_strings")
        if stop_strings is not None:
            # generate keeps its tokenizer from a callable custom_generate, so the criterion is
            # built here.
            from transformers import StopStringCriteria

            criteria = list(given.get("stopping_criteria") or ())
            tokenizer: Any = self.protected.tokenizer  # transformers asks for its own class
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
            options |= {"stop_strings": None, "stopping_criteria": criteria}
        return options
