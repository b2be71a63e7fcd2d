"""What one choice of a running loop is to each row, and how rows end.

Knows words and counts. Does not know tensors, sessions or what is done about an end.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["RowEnd", "Turn", "Turns"]

Turn = Literal["says", "cut", "looks", "ends", "stops"]
"""What one choice is to its row.

says: a token of the response.
cut: a token of the response, its last: somebody else ends it here.
looks: an unseen token behind the response's end.
ends: an end id by which the model itself ends its turn.
stops: an end id that the model would hardly have chosen by itself; nothing follows.
"""


class Turns(NamedTuple):
    """One choice of every row.

    Attributes:
        turns: [batch] what the choice is.
        is_last: [batch] whether the row takes no further token.
        wanted: [batch] unseen tokens that are to be judged behind a response.
    """

    turns: list[Turn]
    is_last: list[bool]
    wanted: list[int]


class RowEnd(NamedTuple):
    """How a row has ended.

    Attributes:
        n_ids: Leading generated ids that stand, an end id included.
        content: Tokens of the response, withheld ones included and end ids left out.
        looked: Unseen tokens decoded behind them.
        withheld: Tokens of the response that do not stand, since too few follow them.
    """

    n_ids: int
    content: int
    looked: int
    withheld: int
