"""Running both arms: the bare model and the guarded one on the same prompts.

Knows batches, both arms and what a trace tells of a row. Does not know how a response is
judged (the judge is passed in) nor how anything is drawn. The bare arm is the model's own
`generate`; where its tokens are shown with risks, they come from the guard in flag mode,
which changes no token, and that is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from safe_decode.demo.figures import Label, Outcome
from safe_decode.demo.scenes import DemoPrompt
from safe_decode.demo.view import Duel, Side

if TYPE_CHECKING:
    from torch import Tensor

    from safe_decode.guard import GuardedOutput, SafeDecoder

__all__ = ["Arena", "Judge"]

Judge = Callable[[Sequence[Mapping[str, str]], str | None, str], Label]
"""From the messages, the supplied prefill and the text that reached the reader to a word."""


@dataclass(frozen=True, slots=True)
class Arena:
    """Both arms, ready to run.

    Attributes:
        decoder: The guarded arm.
        model: The bare arm: the same model.
        tokenizer: Theirs.
        max_new_tokens: The cap of both.
        judge: Says what reached the reader; None for no claim about it.
        batch_size: Prompts that are answered at once.
    """

    decoder: SafeDecoder
    model: Any
    tokenizer: Any
    max_new_tokens: int
    judge: Judge | None = None
    batch_size: int = 64
