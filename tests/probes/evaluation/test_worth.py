"""What a bundle is worth is counted on the test split, or said to be unknown without one."""

from probes.evaluation.worth import measured_peaks, worth_of
from tests.bundles import random_bundle


def test_without_test_rows_nothing_is_known_and_nothing_fails(llama, tokenizer):
    bundle = random_bundle(llama, tokenizer)
    peaks = measured_peaks(llama, tokenizer, bundle, [])
    worth = worth_of([], peaks, bundle.certificates[0], is_located=False)
    unknown = {"hits": 0, "n": 0, "low": 0.0, "high": 1.0}
    assert worth["recall"] == worth["false_alarms"] == unknown and worth["by_source"] == {}
