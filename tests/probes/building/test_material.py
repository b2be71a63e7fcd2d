"""What stands in which split is decided by hashes alone, and no prompt stands in two."""

import json
from collections import Counter

import pytest

from probes.building.material import OWN_ANSWERS, gathered
from probes.building.recipe import Answers, BuildRecipe, Source
from safe_decode.errors import DataError


def row(number, *, harmful=False, response="", response_harmful=None):
    return {
        "prompt": f"{'bad' if harmful else 'good'} request {number} about {number * 7919}",
        "response": response,
        "prompt_harmful": harmful,
        **({} if response_harmful is None else {"response_harmful": response_harmful}),
    }


@pytest.fixture
def folder(tmp_path):
    rows = [row(number, harmful=number % 2 == 0) for number in range(2000)]
    rows += [
        row(
            number,
            harmful=True,
            response=f"answer {number} of its own {number * 104729}",
            response_harmful=number % 2 == 0,
        )
        for number in range(1000, 2600)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path


def recipe(**changes):
    answers = Answers(benign=600, harmful=300)
    return BuildRecipe(sources=(Source(data="rows.jsonl"),), answers=answers, **changes)


def test_no_group_stands_in_two_splits(folder):
    found = gathered(recipe(), folder)
    homes = {}
    for one in (*found.labelled, *found.requests):
        assert homes.setdefault(one.group, one.split) == one.split


def test_what_others_wrote_is_neither_located_nor_calibrated_on(folder):
    found = gathered(recipe(), folder)
    assert {one.split for one in found.labelled} == {"fit", "select", "test"}


def test_a_group_is_asked_once(folder):
    found = gathered(recipe(), folder)
    assert max(Counter(one.group for one in found.requests).values()) == 1
    assert Counter(one.prompt_harmful for one in found.requests) == {False: 600, True: 300}


def test_the_draw_and_the_split_are_independent(folder):
    """A draw by the hash that splits would take all its rows from the first split."""
    found = gathered(recipe(), folder)
    shares = Counter(one.split for one in found.requests)
    for split, share in recipe().splits.asked.items():
        assert abs(shares[split] / 900 - share) < 0.05, (split, shares)


def test_rows_that_are_added_move_no_other_row(folder):
    before = {one.group: one.split for one in gathered(recipe(), folder).requests}
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row(99_991)) + "\n")
    after = {one.group: one.split for one in gathered(recipe(), folder).requests}
    assert len(set(before) - set(after)) <= 1  # whose place the new one took
    assert all(after[group] == split for group, split in before.items() if group in after)


def test_another_seed_is_another_draw(folder):
    first, second = (gathered(recipe(seed=seed), folder) for seed in (0, 1))
    assert {one.group for one in first.requests} != {one.group for one in second.requests}
    assert first.digest != second.digest
    assert first.digest == gathered(recipe(), folder).digest


def test_a_label_by_origin_stands_where_a_row_has_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "how are you today"}\n')
    source = Source(data="a.jsonl", prompt_harmful=False)
    (request,) = gathered(BuildRecipe(sources=(source,)), tmp_path).requests
    assert request.prompt_harmful is False and request.meta["source"] == OWN_ANSWERS


def test_sources_without_a_row_of_use_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "how are you today"}\n')
    with pytest.raises(DataError, match="none of 1 rows is a judged response or a prompt"):
        gathered(BuildRecipe(sources=(Source(data="a.jsonl", use=("labelled",)),)), tmp_path)
