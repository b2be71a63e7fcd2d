"""README and docs: their generated blocks are those that the results yield."""

import json
import re

import pytest

from benchmarks.docs.layouts import Layout
from benchmarks.docs.markdown import MOST_COLUMNS, table
from benchmarks.docs.readme import (
    DOCS,
    README,
    RESULTS,
    ROOT,
    UNMEASURED,
    block_names,
    content_of,
    fill,
    pages,
    standing_in,
    table_of,
)
from benchmarks.docs.real_demo import as_markdown

TEXT = README.read_text(encoding="utf-8")
CITED = re.compile(r"^(?:from|import) (?:safe_decode|probes)\b.*$", re.MULTILINE)
FROM_A_ROOT = re.compile(r"from (?:safe_decode|probes) import [\w, ]+")


def only_tables(text):
    """What a block holds now where it is the output of an example, else what it should hold."""

    def content(name, above):
        if name.startswith("output-"):
            return standing_in(text, name)
        return content_of(name, above)

    return content


def every_page():
    return [README, *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert block_names(text), page
    assert fill(text, only_tables(text)) == text, "run `make readme`"


def test_the_readme_and_pages_of_every_folder_have_blocks():
    folders = {page.parent.name for page in pages()[1:]}
    assert pages()[0] == README and folders >= {"guides", "reference", "results", "decisions"}


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_outputs_on_a_page_are_what_the_examples_print(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text, content_of) == text, "run `make readme`"


def test_every_results_file_has_its_block_or_its_page():
    text = "".join(page.read_text(encoding="utf-8") for page in every_page())
    # Pages of their own, with tests of their own.
    shown = {*block_names(text), "mutants", "organism"}
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= shown


def test_no_block_stands_on_a_page_twice():
    for page in every_page():
        names = block_names(page.read_text(encoding="utf-8"))
        assert len(names) == len(set(names)), page


def test_the_readme_is_short_and_says_first_how_it_is_used_with_a_model_of_ones_own():
    lines = TEXT.splitlines()
    assert len(lines) <= 250
    assert "## With your own model" in lines[:50]
    assert {"make demo", "make test"} <= {line.split("  ")[0].strip() for line in lines[:12]}


def test_the_readme_shows_six_results_and_those_that_miss_their_target():
    rows = standing_in(TEXT, "summary").splitlines()[2:]
    assert len(rows) == 6
    assert sum(row.endswith("| no |") for row in rows) == 2


def test_examples_import_from_the_roots_alone():
    found = [
        (page.name, line)
        for page in every_page()
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)
        for line in CITED.findall(code)
    ]
    assert len(found) >= 8
    assert not [(name, line) for name, line in found if not FROM_A_ROOT.fullmatch(line)]


def test_links_of_the_pages_at_the_root_lead_to_files():
    for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text("utf-8")):
            assert (ROOT / target).exists(), (name, target)


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


def test_a_table_wider_than_a_screen_becomes_several_that_repeat_what_tells_rows_apart():
    columns = ["a", "b", *(f"c{number}" for number in range(MOST_COLUMNS))]
    rows = [["x", 1, *range(MOST_COLUMNS)], ["x", 2, *range(MOST_COLUMNS)]]
    parts = table(columns, rows).split("\n\n")
    assert len(parts) == 2
    heads = [part.splitlines()[0].strip("| ").split(" | ") for part in parts]
    assert all(head[:2] == ["a", "b"] and len(head) <= MOST_COLUMNS for head in heads)
    assert [name for head in heads for name in head[2:]] == columns[2:]
    assert all(part.splitlines()[3].startswith("| x | 2 |") for part in parts)


def test_a_layout_says_what_is_shown_and_what_gets_a_table_of_its_own():
    rows = [
        {"run": "one", "depth": None, "batch": 1, "us": 1.5, "left out": 0},
        {"run": "two", "depth": 3, "batch": 8, "us": 2.5, "left out": 0},
    ]
    layout = Layout(columns=("us",), groups=("run", "depth"), merged=("batch",), merged_as="call")
    drawn = table_of([json.dumps(row) for row in rows], layout)
    assert drawn.split("\n\n") == [
        "**one**",
        "| call | us |\n|---|---|\n| batch 1 | 1.5 |",
        "**two, depth 3**",
        "| call | us |\n|---|---|\n| batch 8 | 2.5 |",
    ]


def test_no_generated_table_is_wider_than_a_screen():
    for page in pages():
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("|---|"):
                assert line.count("---") <= MOST_COLUMNS, page


def test_sentences_of_a_card_are_a_list_and_pairs_are_words():
    card = {"card": {"cores": 2, "claims": ["it costs more", "it ends"], "chosen": {"c": 0.5}}}
    assert table_of(['{"a": 1}', json.dumps(card)]).split("\n\n")[1:] == [
        "*cores: 2; chosen: c 0.5.*",
        "- claims: it costs more\n- claims: it ends",
    ]


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


def test_what_make_real_shows_stands_with_the_first_words_of_each_answer(tmp_path):
    counts = {"refusal": 1, "benign": 0, "harmful": 2, "broken": 0}
    shown = {
        "scene": "prefilled",
        "request": "Do harm.",
        "prefill": "Sure",
        "bare": "word " * 40,
        "guarded": "No.",
        "tripped": True,
    }
    scene = {"scene": "prefilled", "n": 3, "bare": counts, "guarded": counts, "tripped": 1}
    facts = {"model": "m", "certificate": "alpha 0.01", "time": "9 s"}
    path = tmp_path / "real-demo.json"
    calm = {**shown, "scene": "benign", "prefill": None, "tripped": False, "guarded": "word " * 40}
    told = {"facts": facts, "shown": [calm, shown], "scenes": [{**scene, "unchanged": 2}]}
    path.write_text(json.dumps(told))
    text = as_markdown(path)
    assert "| benign | Do harm. |" in text and "| the same | no |" in text
    assert '| harmful, behind "Sure" | Do harm. *Sure* |' in text and "| No. | yes |" in text
    assert text.count("word") == 24 and "alpha 0.01" in text
    assert as_markdown(tmp_path / "none.json") == ""
