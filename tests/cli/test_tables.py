"""Tables: no word is ever broken, at 80 columns and at any other width."""

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from probes.cli.tables.facts import show_facts
from probes.cli.tables.figures import print_tables
from safe_decode.cli.main import app
from safe_decode.cli.tables import WordTable, fitted_widths, print_table

ROOT = Path(__file__).resolve().parents[2]
WORDS = st.text("abcdefghij[]/=.", min_size=1, max_size=30)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)


def drawn(table, width):
    screen = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    print_table(table, screen)
    return screen.file.getvalue()


@given(
    names=st.lists(WORDS, min_size=1, max_size=6),
    texts=st.lists(st.lists(TEXTS, min_size=6, max_size=6), min_size=1, max_size=4),
    width=st.integers(20, 140),
    has_header=st.booleans(),
)
def test_every_word_of_a_table_stands_whole_at_any_width(names, texts, width, has_header):
    rows = [row[: len(names)] for row in texts]
    columns = names if has_header else [""] * len(names)
    shown = drawn(WordTable(columns, rows, "the title", "the caption"), width).split()
    for row in rows:
        for cell in row:
            for word in cell.split():
                assert any(word in piece for piece in shown), (word, shown)


def test_a_table_that_fits_is_a_table_and_one_that_does_not_goes_downwards():
    table = WordTable(("name", "figure"), [("first", "0.123456789"), ("second", "2")])
    assert drawn(table, 40).splitlines()[0].split() == ["name", "figure"]
    downwards = drawn(table, 14).splitlines()
    assert downwards[0].strip() == "name: first"
    assert [line.strip() for line in downwards if "0.123456789" in line] == ["0.123456789"]


def test_a_word_longer_than_the_line_is_left_whole():
    digest = "d" * 120
    assert digest in drawn(WordTable(("", ""), [("bundle", digest)]), 80)


def test_what_a_terminal_would_obey_is_shown_instead():
    assert "\x1b" not in drawn(WordTable(("",), [("\x1b[31mred",)]), 80)


def test_widths_are_shared_by_what_the_columns_lack():
    assert fitted_widths([10, 10], [5, 5], 20) == [10, 10]
    found = fitted_widths([10, 30], [5, 5], 20)
    assert sum(found) <= 20 and all(width >= 5 for width in found)
    assert fitted_widths([10, 30], [12, 9], 20) is None


def words_of(text):
    return {word for word in re.findall(r"[A-Za-z][A-Za-z-]{7,}", text)}


TABLES = (
    ("capabilities",),
    ("inspect",),
    ("verify-certificate",),
)


@pytest.mark.parametrize("command", TABLES, ids=" ".join)
def test_commands_break_no_word_at_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    wide = CliRunner().invoke(app, list(command))
    monkeypatch.setenv("COLUMNS", "80")
    narrow = CliRunner().invoke(app, list(command))
    assert wide.exit_code == narrow.exit_code == 0, narrow.output
    missing = words_of(wide.stdout) - words_of(narrow.stdout)
    assert not missing


METHOD = {
    "method": "the probe",
    "n": "1234 + 5678",
    "AUROC pooled": "0.987",
    "within source": "0.987 [0.981, 0.992]",
    "probe's gain": "0.123 [0.101, 0.134]",
    "p (Holm)": "0.001",
    "recall at 1 %": "87.5 [81.2, 91.9] %",
    "recall, calibrated": "85.0 [80.0, 90.0] %",
    "realised FPR": "0.9 [0.4, 1.7] %",
}


def test_figures_and_facts_break_no_word_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_tables({"Detection: everything": [METHOD, METHOD]})
    show_facts(
        "Activations",
        {"responses": {"fit": 1200, "select": 600}, "not_of_this_model_because": "x" * 70},
    )
    shown = capsys.readouterr().out
    for name, value in METHOD.items():
        for word in (*name.split(), *value.split()):
            assert word in shown.split() or f"{word}:" in shown.split(), word
    assert "x" * 70 in shown


def test_commands_draw_tables_in_one_place():
    """So that the law above holds for every one of them."""
    drawing = [
        path.relative_to(ROOT).as_posix()
        for folder in ("safe_decode", "probes")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"from rich(\.table)? import .*\bTable\b", path.read_text(encoding="utf-8"))
    ]
    assert sorted(drawing) == ["safe_decode/cli/tables.py", "safe_decode/demo/terminal.py"]
