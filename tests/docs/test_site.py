"""The documentation site, as far as it can be checked without building it."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from benchmarks.docs.decisions import FOLDER, THEMES, as_markdown, read_record
from benchmarks.docs.readme import DOCS, ROOT
from benchmarks.docs.site_hooks import SHOWN, as_page
from benchmarks.docs.summary import SHOWN as SUMMARY
from probes.data.formats import _READERS
from probes.data.schemas import COLUMN_MAPS
from safe_decode.cli.main import app

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def named_in(nav):
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else (entry,):
            yield from [value] if isinstance(value, str) else named_in(value)


def test_the_navigation_names_every_page_and_no_other():
    found = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    records = {page for page in found if re.match(r"decisions/\d", page)}
    assert set(named_in(SITE["nav"])) == (found - records) | set(SHOWN)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_and_pictures_of_a_page_lead_to_files(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target


def test_pages_from_the_root_turn_their_links():
    assert as_page("see [x](docs/guides/serving.md)") == "see [x](guides/serving.md)"
    for source in SHOWN.values():
        for target in LINK.findall(as_page((ROOT / source).read_text(encoding="utf-8"))):
            assert (DOCS / target).exists(), (source, target)


def test_the_site_asks_no_other_host_for_fonts():
    assert SITE["theme"]["font"] is False


def test_what_the_site_is_built_with_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {re.split(r"[\[><=]", line)[0] for line in extras["optional-dependencies"]["docs"]}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert wanted <= {line.partition("==")[0] for line in pins}


def test_ci_builds_the_site_and_takes_warnings_for_errors():
    assert "step make docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_decision_has_a_theme_and_a_status_and_stands_in_the_index_once():
    records = [read_record(path) for path in sorted(FOLDER.glob("[0-9]*.md"))]
    assert len({record.number for record in records}) == len(records)
    index = as_markdown()
    for record in records:
        assert record.file.startswith(f"{record.number}-"), record
        assert index.count(f"]({record.file})") == 1
        assert record.status


def test_a_decision_without_a_theme_is_listed_last_and_a_wrong_one_is_refused(tmp_path):
    (tmp_path / "001-a.md").write_text("# 001. A thing\n")
    sorted_in = "---\ntheme: serving\nstatus: replaced by 009\n---\n\n# 002: B thing\n"
    (tmp_path / "002-b.md").write_text(sorted_in)
    index = as_markdown(tmp_path)
    assert "| 002 | [B thing](002-b.md) | replaced by 009 |" in index
    assert index.index(THEMES["serving"]) < index.index(THEMES["other"]) < index.index("A thing")
    (tmp_path / "003-c.md").write_text("---\ntheme: cooking\n---\n# 003 C\n")
    with pytest.raises(ValueError, match="cooking"):
        as_markdown(tmp_path)


def test_the_overview_of_commands_names_each_of_them():
    import typer

    group = typer.main.get_command(app)
    text = (DOCS / "guides" / "command-line.md").read_text(encoding="utf-8")
    for name in group.list_commands(typer.Context(group)):
        assert f"`safe-decode {name}`" in text, name


def test_the_guide_names_every_format_and_every_known_set():
    text = (DOCS / "guides" / "make-a-bundle.md").read_text(encoding="utf-8").lower()
    for ending in set(_READERS) - {".ndjson"}:
        assert f"`rows{ending}`" in text
    sets = {name.removesuffix("-completions") for name in COLUMN_MAPS if "native" not in name}
    plain = re.sub(r"[- ]", "", text)
    for name in sets:
        assert name.replace("-", "") in plain, name


def test_each_result_of_the_summary_has_its_page():
    for shown in SUMMARY:
        assert (DOCS / "results" / f"{shown.page}.md").is_file()
