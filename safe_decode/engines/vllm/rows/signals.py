"""Two ids by which a worker tells the scheduler how the guard ends a row.

A worker of vLLM has no other way to the scheduler than the id that it samples. The two ids are
control tokens that no answer holds; the model is kept from choosing them, and the scheduler takes
them out of what readers get. Knows a vocabulary. Does not know rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from safe_decode.errors import UnsupportedError
from safe_decode.prompts.plain_text import controls_of
from safe_decode.typing import Tokenizer

__all__ = ["SignalIds"]


@dataclass(frozen=True)
class SignalIds:
    """The ids.

    Attributes:
        redirected: A tripped row has said what it says.
        capped: A row that has not tripped has as many tokens as it may have.
    """

    redirected: int
    capped: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> SignalIds:
        """Choose the ids: the last ones that no text uses, else control tokens.

        Args:
            tokenizer: Of the model.
            vocab_size: Ids that the model chooses from.
            ends: Ids by which the model itself ends its turn.

        Raises:
            UnsupportedError: There are not two of them.
        """
        used = set(tokenizer.get_vocab().values())
        unused = [i for i in range(vocab_size - 1, -1, -1) if i not in used]
        controls = sorted(i for i in controls_of(tokenizer).ids if i < vocab_size)
        free = [i for i in (*unused, *controls) if i not in ends]
        if len(free) < 2:
            raise UnsupportedError(
                f"the vocabulary of {vocab_size} ids has {len(free)} that no text uses and that "
                "end nothing, wanted 2 by which the guard ends rows; add special tokens to the "
                "tokenizer, or serve with `safe-decode serve`."
            )
        return cls(free[0], free[1])
