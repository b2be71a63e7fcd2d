"""Every study of located units runs through at its smallest size, and goes on when ended."""

import importlib
import json
import logging

import pytest

from benchmarks.docs.located_units import UNMEASURED
from benchmarks.docs.located_units import main as write_page
from benchmarks.location.pair import Pair
from probes.runs.journal import read_journal
from safe_decode.errors import DataError

STUDIES = {
    "ablation": "ablation",
    "alignment_tax": "alignment-tax",
    "finetuning": "finetuning",
    "locate_cost": "cost",
    "superficial": "superficial",
    "where_to_read": "reading-aligned",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("located")


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_runs_through_and_a_second_run_measures_nothing(study, results, caplog):
    module = importlib.import_module(f"benchmarks.location.{study}")
    module.main(["--tiny", "--results", str(results)])
    path = results / f"{STUDIES[study]}-embedded.jsonl"
    _, rows = read_journal(path)
    assert rows
    if study != "locate_cost":  # seconds are measured anew
        caplog.clear()
        with caplog.at_level(logging.INFO):
            module.main(["--tiny", "--results", str(results)])
        assert read_journal(path)[1] == rows


@pytest.mark.slow
def test_the_page_is_written_from_what_the_studies_kept(results, tmp_path):
    for study in STUDIES:  # those that have run in this process go on from where they ended
        importlib.import_module(f"benchmarks.location.{study}").main(
            ["--tiny", "--results", str(results)]
        )
    write_page(["--results", str(results), "--docs", str(tmp_path)])
    page = (tmp_path / "results" / "location.md").read_text(encoding="utf-8")
    assert page.count(UNMEASURED) == 1  # the motives are asked by a command of their own


def test_a_pair_from_files_takes_the_rows_of_the_sources_asked_for(tmp_path):
    rows = [
        {
            "prompt": f"question {number}",
            "response": f"answer {number}",
            "prompt_harmful": 1,
            "response_harmful": number % 2,
            "source": "one" if number % 3 else "two",
        }
        for number in range(60)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    wanted = {row["response"] for row in rows if row["source"] == "two"}
    parts = ("locate", "search", "train", "report")

    def found(sources: tuple[str, ...]) -> set[str | None]:
        pair = Pair("files", tmp_path, tmp_path, (path,), sources=sources)
        return {row.response for part in parts for row in pair.judged(60, part)}

    assert found(("two",)) == wanted
    assert len(found(())) == 60
    with pytest.raises(DataError, match="hold no judged responses"):
        found(("three",))
