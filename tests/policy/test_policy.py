import pytest
import torch

from safe_decode.errors import ConfigurationError
from safe_decode.policy.policy import Policy


@pytest.mark.parametrize(
    "change",
    [{"redirect": "shout"}, {"on_error": "ignore"}, {"holdback_tokens": -1}, {"max_tries": 3}],
)
def test_values_outside_the_choices_are_refused_by_name(change):
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        Policy(**change)


def test_a_row_that_cannot_be_judged_trips_unless_errors_are_allowed():
    alarm, finite = torch.tensor([False, True, False]), torch.tensor([True, True, False])
    assert Policy().trips(alarm, finite).tolist() == [False, True, True]
    assert Policy(on_error="allow").trips(alarm, finite).tolist() == [False, True, False]


def test_flag_is_the_only_redirect_that_does_not_protect():
    kinds = ("refuse", "rewind", "stop", "flag")
    assert [kind for kind in kinds if not Policy(redirect=kind).protects] == ["flag"]
