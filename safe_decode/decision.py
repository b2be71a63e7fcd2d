"""The vocabulary of what happens to a row: redirects, actions, reasons, outcomes.

Knows words and their meaning. Does not know when any of them applies.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["Action", "Outcome", "Reason", "Redirect"]

Redirect = Literal["refuse", "rewind", "stop", "flag"]
"""What a tripped row emits.

refuse: drop what is not released, say the canned refusal, end.
rewind: drop what was said after the clear point, say the opener, and let the model finish in
    its own words under the probe; after the last try, the canned refusal.
stop: drop what is not released and end.
flag: emit every token of the bare model and only report; the row is unprotected.
"""

Action = Literal["scan", "pass", "ahead", "alarm", "trip", "force", "watch", "close"]
"""What was done on one score.

scan: the score judged the prompt (s_0, or a token of the supplied prefill) and nothing crossed.
pass: the score judged a generated token and nothing crossed.
ahead: the score judged an unseen token behind a response that the model did not end itself, and
    nothing crossed.
alarm: the threshold is crossed and no trip follows, or the row has tripped and goes on (flag).
trip: the redirect begins here; latched.
force: the token was dictated by the guard (opener, refusal, end), whatever its score.
watch: the model chose the token itself after a trip; the probe keeps judging.
close: the guard failed on this score and the row ends closed.
"""

Reason = Literal[
    "below_threshold",
    "above_threshold",
    "cleared",
    "latched",
    "opener",
    "refusal",
    "end_of_text",
    "tries_exhausted",
    "non_finite",
    "missed_beat",
    "forced_token_lost",
    "guard_error",
]
"""Why an action was taken.

below_threshold: the statistic does not exceed the threshold.
above_threshold: it does.
cleared: it does, and the self-check cleared the alarm.
latched: the row tripped before.
opener: the token belongs to the opener of a rewound row.
refusal: the token belongs to the canned refusal.
end_of_text: the token ends the row.
tries_exhausted: a rewound row tripped again with no try left.
non_finite: an activation, logit or statistic is NaN or infinite.
missed_beat: a token had no fresh score, or more than one.
forced_token_lost: a dictated token did not arrive.
guard_error: any other failure of the guard.
"""

Outcome = Literal["released", "refused", "rewound", "stopped", "flagged", "closed", "cancelled"]
"""How a row ended.

released: it never tripped; the reader got the bare model's tokens.
refused: it tripped and ended in the canned refusal.
rewound: it tripped and the model finished in its own words, without a further trip.
stopped: it tripped and ended without a text of its own.
flagged: it tripped and nothing was changed.
closed: the guard failed and the row was ended.
cancelled: its reader wanted no more before it ended.
"""
