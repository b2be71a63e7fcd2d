"""What is short is said with how much more is wanted, and what the data does support."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.building.counts import SplitCounts, require_enough, smallest_alpha, warnings_of
from probes.building.recipe import BuildRecipe, ProbeReading, Source
from safe_decode.certificate import least_draws
from safe_decode.errors import DataError

ENOUGH = {"locate": 100, "fit": 200, "select": 100, "calibrate": 400, "test": 100}


def recipe(**changes):
    return BuildRecipe(**{"sources": (Source(data="a"),), "caps": (), **changes})


def counts(*, is_expected=True, **changes):
    parts = {
        name: Counter(ENOUGH)
        for name in ("harmful", "harmless", "benign_groups", "begun_groups", "refusals")
    }
    for name, by_split in changes.items():
        parts[name].update(by_split)
        parts[name] = Counter({**ENOUGH, **by_split})
    return SplitCounts(**parts, is_expected=is_expected)


def test_enough_is_enough():
    require_enough(counts(), recipe())
    assert warnings_of(counts(), recipe()) == []


@pytest.mark.parametrize(
    ("short", "said"),
    [
        (
            {"harmful": {"select": 2}},
            "select holds at most 2 harmful responses, wanted at least 10",
        ),
        ({"harmless": {"fit": 3}}, "fit holds 3 harmless responses, wanted at least 10"),
        ({"harmful": {"test": 0}}, "test holds at most 0 harmful responses"),
        (
            {"benign_groups": {"calibrate": 120}},
            "calibrate holds 120 plain benign prompts, and alpha=0.01 at delta=0.05 needs 299",
        ),
    ],
)
def test_what_no_step_can_make_good_is_refused(short, said):
    with pytest.raises(DataError) as raised:
        require_enough(counts(**short), recipe())
    assert said in str(raised.value)


def test_a_small_calibration_is_told_the_alpha_that_it_supports():
    with pytest.raises(DataError, match="or pass alpha 0.025 or more"):
        require_enough(counts(benign_groups={"calibrate": 120}), recipe())


def test_several_alphas_share_the_confidence():
    require_enough(counts(benign_groups={"calibrate": 299}), recipe())
    with pytest.raises(DataError, match="needs 368"):
        require_enough(counts(benign_groups={"calibrate": 299}), recipe(alphas=(0.05, 0.01)))
    with pytest.raises(DataError, match="needs 368"):
        require_enough(counts(benign_groups={"calibrate": 299}), recipe(caps=(64, 300)))


@given(st.integers(8, 100_000), st.floats(0.001, 0.2))
def test_an_alpha_that_is_advised_is_supported(n, delta):
    alpha = smallest_alpha(n, delta)
    if 0 < alpha < 1:
        assert least_draws(alpha, delta) <= n


def test_few_harmful_responses_are_a_warning():
    (warning,) = warnings_of(counts(harmful={"select": 29}), recipe())
    assert "select holds at most 29 harmful responses, wanted 30" in warning


def test_few_refusals_mean_the_residual_stream_and_are_said():
    few = counts(refusals={"locate": 49})
    require_enough(few, recipe())
    (warning,) = warnings_of(few, recipe())
    assert "units of importance are not located" in warning
    with pytest.raises(DataError, match="49 distinct refusals, wanted 50"):
        require_enough(few, recipe(reading=ProbeReading(where="located")))
