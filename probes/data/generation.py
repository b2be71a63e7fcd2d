"""How a response was generated: by which weights, under which cap and sampling.

`rollout` writes it beside every response, files carry it, and calibration asks it whether the
model that is certified wrote the response as it will be used. A row without it counts as
written by somebody else. It is a note, not a proof: whoever writes the file can write it.

Knows settings. Does not know models or text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from safe_decode.certificate import Envelope
from safe_decode.engines.transformers.coverage import ENDS, departure
from safe_decode.errors import DataError

__all__ = ["Generation"]

_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "Mapping[str, str]": (Mapping,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What `rollout` knows of a response.

    Attributes:
        weights: `activations.harvest.weights_digest` of the model.
        max_new_tokens: The cap, beyond a supplied beginning.
        do_sample: Sampled, or greedy.
        temperature: Of the sampling; without meaning if greedy.
        top_p: Share of probability that sampling keeps; without meaning if greedy.
        top_k: Tokens that sampling keeps, 0 for all; without meaning if greedy.
        options: Every further option that was in force, see `coverage.record_of`.

    Raises:
        DataError: A value of another type, or a cap below 1.
    """

    weights: str
    max_new_tokens: int
    do_sample: bool
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kinds = getattr(self, one.name), _KINDS.get(str(one.type), (int, float))
            if not isinstance(value, kinds) or (kinds != (bool,) and isinstance(value, bool)):
                raise DataError(f"generation has {one.name}={value!r}, wanted {one.type}.")
        for name, value in self.options.items():
            try:
                json.loads(value)
            except (TypeError, ValueError) as error:
                raise DataError(f"generation has {name}={value!r}, wanted JSON text.") from error
        if self.max_new_tokens < 1:
            raise DataError(
                f"generation has max_new_tokens={self.max_new_tokens}, wanted 1 or more."
            )

    @classmethod
    def from_json(cls, record: object) -> Generation:
        """Read what `to_json` wrote.

        Raises:
            DataError: Not an object, or entries that are missing or unknown.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"generation={record!r} is not an object; drop it, or pass one.")
        try:
            return cls(**record)
        except TypeError as error:
            raise DataError(f"generation cannot be read: {error}; drop it.") from error

    def to_json(self) -> dict[str, Any]:
        """Return the entries."""
        return asdict(self)

    def is_sampled_as(self, envelope: Envelope) -> bool:
        """Say whether its tokens were chosen as those of an envelope, whatever the cap."""
        own = Envelope(
            max_new_tokens=1,  # an envelope's is at least that
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            options=self.options,
        )
        ends = json.loads(self.options.get(ENDS, "[]"))
        return departure(envelope, own, ends) is None
