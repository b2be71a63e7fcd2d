"""The README: its generated blocks are those that the results yield."""

import json

import pytest

from benchmarks.docs.readme import (
    PAGES,
    README,
    RESULTS,
    UNMEASURED,
    block_names,
    content_of,
    fill,
    standing_in,
    table_of,
)

TEXT = README.read_text(encoding="utf-8")


def only_tables(name, above):
    """What the block holds now where it is the output of an example, else what it should hold."""
    if not name.startswith("output-"):
        return content_of(name, above)
    return standing_in(TEXT, name)


def test_the_tables_of_the_readme_are_those_of_the_results():
    assert fill(TEXT, only_tables) == TEXT, "run `make readme`"


def test_the_tables_of_the_pages_are_those_of_the_results():
    assert README in PAGES and len(PAGES) > 1
    for page in PAGES[1:]:
        text = page.read_text(encoding="utf-8")
        assert block_names(text), page
        assert fill(text, content_of) == text, "run `make readme`"


@pytest.mark.slow
def test_the_outputs_in_the_readme_are_what_the_examples_print():
    assert fill(TEXT, content_of) == TEXT, "run `make readme`"


def test_every_results_file_has_its_block_or_its_page():
    pages = list((RESULTS.parents[1] / "docs").rglob("*.md"))
    blocks = [name for page in pages for name in block_names(page.read_text(encoding="utf-8"))]
    shown = {*block_names(TEXT), *blocks, *(page.stem for page in pages)}
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= shown


def test_blocks_are_filled_and_the_rest_is_untouched():
    text = "a\n<!-- begin:x -->\nold\n<!-- end:x -->\nb <!-- begin:y --> c"
    filled = fill(text, lambda name, above: f"{name} after {above.strip()}")
    assert filled == "a\n<!-- begin:x -->\nx after a\n<!-- end:x -->\nb <!-- begin:y --> c"


def test_rows_become_a_table_with_the_card_beneath():
    rows = [{"what": "a|b", "share": 0.123456, "interval": [0.1, 0.2]}, {"card": {"cores": 2}}]
    table = table_of([json.dumps(row) for row in rows])
    assert table.splitlines() == [
        "| what | share | interval |",
        "|---|---|---|",
        "| a\\|b | 0.1235 | [0.1, 0.2] |",
        "",
        "*cores: 2.*",
    ]


def test_measures_of_one_study_stand_in_one_row():
    found = [("crowd", "right", 3), ("crowd", "missed", ""), ("kill", "wrong", 1)]
    rows = [{"study": s, "measure": m, "value": v} for s, m, v in found]
    rows.append({"study": "kill", "measure": "missed", "value": "wrong"})
    table = table_of([json.dumps(row) for row in rows])
    assert table.splitlines()[2:] == ["| crowd | right 3 | none |", "| kill | wrong 1 | wrong |"]


@pytest.mark.parametrize("lines", [[], ['{"card": {}}'], ['{"a": 1}', '{"b": 1}']])
def test_results_that_are_no_table_are_refused(lines):
    with pytest.raises(ValueError, match="row"):
        table_of(lines)


def test_what_was_not_measured_says_so():
    assert content_of("no-such-study", "") == UNMEASURED


def test_an_example_is_run_and_its_failure_is_not_hidden():
    assert content_of("output-x", "```python\nprint(6 * 7)\n```\n") == "```text\n42\n```"
    assert content_of("output-x", "```sh\necho hello\n```\n") == "```text\nhello\n```"
    with pytest.raises(ValueError, match="the example fails"):
        content_of("output-x", "```python\nraise SystemExit(3)\n```\n")
