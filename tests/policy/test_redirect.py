import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import safe_decode
from safe_decode.decision import Redirect
from safe_decode.policy.policy import Policy
from safe_decode.policy.redirect import REDIRECTS, Script, cut_of, forced_scores
from safe_decode.serving.settings import GuardingRedirect


@given(st.integers(0, 40), st.integers(0, 40), st.integers(-1, 60), st.integers(0, 10))
def test_a_cut_never_takes_back_what_was_released(judged, later, clear, k):
    said = judged + later
    for redirect in ("refuse", "rewind", "stop", "flag"):
        cut = cut_of(redirect, said=said, judged=judged, clear=clear, holdback_tokens=k)
        assert 0 <= cut.released <= cut.kept <= said
        assert cut.kept + cut.dropped == said
        if redirect != "flag":
            assert cut.kept <= judged


def test_rewind_keeps_up_to_the_later_of_clear_point_and_released():
    args = {"said": 10, "judged": 9, "holdback_tokens": 4}
    assert cut_of("rewind", clear=2, **args).kept == 5
    assert cut_of("rewind", clear=7, **args).kept == 7
    assert cut_of("refuse", clear=7, **args).kept == 5
    assert cut_of("flag", clear=7, **args).kept == 10


def test_forcing_makes_a_new_tensor_and_does_not_read_forced_rows():
    scores = torch.randn(3, 5)
    scores[1] = torch.nan
    before = scores.clone()
    forced = forced_scores(scores, {1: 4})
    assert torch.equal(scores, before) or torch.equal(
        scores.nan_to_num(0.5), before.nan_to_num(0.5)
    )
    assert forced[1].tolist() == [-torch.inf] * 4 + [0.0]
    assert torch.equal(forced[0], before[0]) and torch.equal(forced[2], before[2])
    assert torch.softmax(forced, -1)[1, 4] == 1.0


def test_a_script_finds_the_id_that_did_not_arrive():
    script = Script([7, 8])
    assert script.force() == 7 and script.check(7) is None
    assert script.force() == 8 and not script.has_next
    assert not script.is_done
    assert script.check(3) == 8
    assert script.arrived == 2 and script.is_done


@pytest.mark.parametrize("ids", [[], [1]])
def test_a_script_without_ids_left_forces_nothing(ids):
    script = Script(ids)
    for token in ids:
        script.force()
        script.check(token)
    assert script.is_done and not script.has_next


def test_the_table_holds_every_redirect_and_agrees_with_what_each_promises():
    assert set(REDIRECTS) == set(get_args(Redirect))
    for name, rule in REDIRECTS.items():
        assert Policy(name).protects is rule.protects
        assert rule.protects is (rule.keeps != "all")
        assert not REDIRECTS[rule.if_guard_fails].resumes, "a failed guard watches nothing"
        assert REDIRECTS[rule.if_structured].says == "nothing", "no words between data"
        assert REDIRECTS[rule.if_guard_fails].protects is rule.protects
        assert REDIRECTS[rule.if_structured].protects is rule.protects
    assert set(get_args(GuardingRedirect)) == {n for n, rule in REDIRECTS.items() if rule.protects}


def test_no_module_compares_a_redirect_with_a_name():
    compares = re.compile(r"redirect\w*\b\s*(==|!=|in|not in)\s*[(\[{]?\s*[\"']")
    found = [
        f"{file}: {line.strip()}"
        for file in Path(safe_decode.__file__).parent.rglob("*.py")
        for line in file.read_text().splitlines()
        if compares.search(line)
    ]
    assert not found


def test_the_table_says_what_the_documents_promise():
    told = {
        name: (rule.keeps, rule.says, rule.outcome, rule.resumes, rule.protects)
        for name, rule in REDIRECTS.items()
    }
    assert told == {
        "refuse": ("released", "refusal", "refused", False, True),
        "rewind": ("clear", "opener", "rewound", True, True),
        "stop": ("released", "nothing", "stopped", False, True),
        "flag": ("all", "nothing", "flagged", False, False),
    }
    failed = {name: rule.if_guard_fails for name, rule in REDIRECTS.items()}
    assert failed == {"refuse": "refuse", "rewind": "refuse", "stop": "stop", "flag": "flag"}
    data = {name: rule.if_structured for name, rule in REDIRECTS.items()}
    assert data == {"refuse": "stop", "rewind": "stop", "stop": "stop", "flag": "flag"}


def test_a_script_counts_what_it_forced_and_what_arrived():
    script = Script([5, 6])
    assert script.has_next is True and script.arrived == 0
    assert script.force() == 5 and script.arrived == 0 and script.has_next is True
    assert script.check(5) is None and script.arrived == 1
    assert script.force() == 6 and script.has_next is False and not script.is_done
    assert script.check(6) is None and script.arrived == 2 and script.is_done
