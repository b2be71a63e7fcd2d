"""The judge that a recipe or an option names, ready to be asked.

Knows names of judges. Does not know rows.
"""

from __future__ import annotations

import os

from probes.building.recipe import Labels
from probes.rollouts.endpoint_judge import EndpointJudge
from probes.rollouts.judges import RowJudge, RuleJudge, load_judge

__all__ = ["judge_for"]


def judge_for(labels: Labels) -> RowJudge:
    """Make a judge, and see that it is there.

    Raises:
        ConfigurationError: No such function, no address, or a pattern that is none.
        DataError: The endpoint cannot be reached.
    """
    name = labels.judge
    if name == "rule":
        return RuleJudge.of(
            labels.harmful_patterns,
            refusal_phrases=labels.refusal_phrases,
            answers_to_harm_are_harm=labels.answers_to_harm_are_harm,
        )
    if name.startswith(("http://", "https://")):
        key = os.environ.get(labels.key_variable)
        judge = EndpointJudge(url=name, model=labels.judge_model, key=key)
        judge.require_up()
        return judge
    return load_judge(name)
