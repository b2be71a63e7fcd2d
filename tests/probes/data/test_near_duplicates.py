"""Near duplicates are found wherever they hide, and what everybody says joins nobody."""

import pytest

from probes.data.balance import CELLS, cell_shares, rebalanced, short_cells
from probes.data.conversations import Conversation, assign_splits, by_split
from probes.data.near_duplicates import merge_near_duplicates, word_grams
from safe_decode.errors import ConfigurationError, DataError

WORDS = [f"word{i}" for i in range(4000)]


def text(start, n=30):
    return " ".join(WORDS[start : start + n])


def row(prompt, response, group, **labels):
    message = {"role": "user", "content": prompt}
    return Conversation(messages=(message,), response=response, group=group, **labels)


def groups_of(rows, **options):
    return [row.group for row in merge_near_duplicates(rows, **options).conversations]


def test_an_edited_prompt_and_an_edited_response_share_a_group():
    rows = [
        row(text(0), text(1000), "a"),
        row(text(0, 25) + " and then some", text(1100), "b"),
        row(text(100), text(1100).upper() + "!", "c"),
        row(text(200), text(1200), "d"),
    ]
    assert groups_of(rows) == ["a", "a", "a", "d"]


def test_less_than_half_is_no_kinship():
    rows = [row(text(0), "x", "a"), row(text(0, 14) + " " + text(500, 16), "y", "b")]
    assert groups_of(rows) == ["a", "b"]
    assert groups_of(rows, share=0.2) == ["a", "a"]


def test_short_prompts_are_compared_whole_and_short_responses_not_at_all():
    rows = [
        row("Hello there!", "Yes.", "a"),
        row("hello THERE", "No.", "b"),
        row("Bye", "Yes.", "c"),
    ]
    assert groups_of(rows) == ["a", "a", "c"]
    assert len(word_grams("one two", 8)) == 0


def test_refusals_and_boilerplate_join_nobody():
    refusal = "I'm sorry, but I cannot help you with that request at all, whatever you say."
    rows = [row(text(40 * i), refusal, f"g{i:02d}") for i in range(30)]
    assert len(set(groups_of(rows))) == 30
    template = text(3000, 40)
    framed = [row(f"{template} {text(40 * i)}", "x", f"g{i:02d}") for i in range(30)]
    merged = merge_near_duplicates([*framed, row(f"{template} {text(0)}", "y", "z")])
    assert [r.group for r in merged.conversations][-1] == "g00"  # the same request, framed
    assert merged.groups == 30
    assert merged.boilerplate >= 33
    assert merged.to_json()["groups_before"] == 31


def test_no_near_duplicate_stands_in_two_splits():
    rows = [row(text(i * 7 % 3900), text((i * 31) % 3900), f"g{i}") for i in range(400)]
    parts = by_split(assign_splits(merge_near_duplicates(rows).conversations))
    seen = {
        split: {gram for r in part for gram in word_grams(r.prompt, 8).tolist()}
        for split, part in parts.items()
    }
    for split, part in parts.items():
        others = set().union(*(grams for name, grams in seen.items() if name != split))
        for one in part:
            grams = set(word_grams(one.prompt, 8).tolist())
            assert len(grams & others) <= 0.5 * len(grams)


def test_the_cells_are_brought_to_their_share():
    counts = {(True, True): 400, (True, False): 30, (False, True): 20, (False, False): 900}
    rows = [
        row("p", f"r{i}", f"{asked}{said}{i}", prompt_harmful=asked, response_harmful=said)
        for (asked, said), count in counts.items()
        for i in range(count)
    ]
    rows.append(row("p", "unjudged", "u"))
    assert len(short_cells(rows)) == 2
    assert "benign request, harmful response: 1.5%" in short_cells(rows)[1]
    kept = rebalanced(rows)
    assert short_cells(kept) == []
    assert kept[-1].response == "unjudged"
    assert sum(share == 20 / (len(kept) - 1) for share in cell_shares(kept).values()) == 1
    assert {r.response for r in rebalanced(rows[::-1])} == {r.response for r in kept}
    with pytest.raises(DataError, match="no row has a benign request, harmful response"):
        rebalanced([r for r in rows if r.prompt_harmful or not r.response_harmful])
    with pytest.raises(ConfigurationError, match=r"least=0.3 is outside"):
        rebalanced(rows, least=0.3)
    assert set(cell_shares([])) == set(CELLS)
