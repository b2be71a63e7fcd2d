"""The commands that evaluate, attack, refit and reproduce, from the shell's side."""

import json
import re

import pytest
from typer.testing import CliRunner

from benchmarks.docs.tables import attack_rows, evaluation_rows, fold_rows
from benchmarks.docs.tables import main as tables_main
from probes.attacks.results import read_records
from probes.data.conversations import Conversation, by_split, write_jsonl
from probes.organism.labelled_data import EmbeddedData
from probes.runs.protocol import read_protocol
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.cli.main import app
from safe_decode.errors import DataError
from safe_decode.loading import load_model
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.planted import as_benign, planted_bundle, planted_rows

JUDGE = ["--judge", "tests.planted:judge"]


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output + str(done.exception)
    return done.output if code else done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    tiny_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    loaded = load_model(folder / "model")
    rows = [as_benign(row) for row in planted_rows(360)]
    parts = by_split(rows)
    planted_bundle(loaded.model, loaded.tokenizer, parts).save(folder / "bundle")
    write_jsonl(folder / "data.jsonl", rows)
    return folder


def own(place, *more):
    return ("--model", place / "model", "--bundle", place / "bundle", *more)


def test_evaluate_prints_json_and_writes_a_page_that_asks_for_nothing(place, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "found.json"
    done = run(
        "evaluate",
        *own(place),
        "--data",
        place / "data.jsonl",
        "--draws",
        20,
        "--prefix",
        8,
        "--mode",
        "both",
        *JUDGE,
        "--max-new-tokens",
        4,
        "--html",
        page,
        "--out",
        out,
        "--json",
    )
    found = json.loads(done)
    assert found == json.loads(out.read_text())
    assert found["facts"]["hold-back"] == "2 tokens"
    names = [(one["name"], one["prefix_tokens"]) for one in found["teacher_forced"]["slices"]]
    assert ("within harmful requests", 8) in names
    assert {one["name"] for one in found["generated"]["situations"]} == {"s0", "s1"}
    rows = evaluation_rows(found)
    assert len({tuple(row) for row in rows}) == 1
    assert len(rows) == len(names) * 11
    worse = json.loads(json.dumps(found))
    for figures in worse["teacher_forced"]["slices"][0]["figures"]:
        figures["at_fpr"][-1]["detected"]["successes"] = 0
    better, worst = fold_rows({"0": found, "1": worse})
    assert (better["worst"], worst["worst"], worst["met"]) == ("no", "yes", "no")
    assert worst["recall at 1 %"].startswith("0.0 [")
    text = page.read_text(encoding="utf-8")
    for wanted in ("Recall where false alarms are few", "Delay", "Certificate: promised", "<svg"):
        assert wanted in text
    assert "default-src 'none'" in text and "<script" not in text
    outside = set(re.findall(r'(?:href|src)="(?!#)([^"]*)"', text))
    assert not outside


def test_evaluate_prints_tables_for_people(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = run(
        "evaluate",
        *own(place, "--data", place / "data.jsonl", "--mode", "generated", *JUDGE),
        "--max-new-tokens",
        3,
    )
    for wanted in ("Answered, bare and guarded", "over-refused", "harmful released", "hold-back:"):
        assert wanted in done


@pytest.fixture(scope="module")
def attacked(place):
    journal = place / "first.jsonl"
    done = run(
        "attack",
        *own(place),
        "--behaviours",
        place / "data.jsonl",
        *JUDGE,
        "--threat",
        "T1",
        "--threat",
        "t3",
        "--count",
        2,
        "--queries",
        6,
        "--steps",
        2,
        "--candidates",
        2,
        "--restarts",
        1,
        "--max-new-tokens",
        3,
        "--half",
        "first",
        "--keep-prompts",
        "--out",
        journal,
        "--html",
        place / "attack.html",
        "--json",
    )
    return json.loads(done), journal


def test_attack_counts_every_arm_and_draws_success_against_budget(attacked, place):
    found, journal = attacked
    assert [(row["threat"], row["arm"]) for row in found["rows"]] == [
        ("T1", "guarded"),
        ("T1", "bare"),
        ("T3", "guarded"),
        ("T3", "bare"),
        ("T3", "random"),
    ]
    assert all(row["behaviours"] == 2 for row in found["rows"])
    assert [check["met"] for check in found["adequacy"]][0] is None
    assert len(found["claims"]) == 2 and "under a budget of" in found["claims"][0]
    text = (place / "attack.html").read_text(encoding="utf-8")
    assert "T3: success against budget" in text and "robust" not in text
    records = read_records(journal)
    assert all(record.prompts for record in records)
    rows = attack_rows({"shipped": journal})
    assert {row["bundle"] for row in rows} == {"shipped"}


def test_refit_certifies_a_bundle_of_its_own_that_can_be_attacked(attacked, place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, journal = attacked
    done = run(
        "refit",
        "--records",
        journal,
        "--out",
        place / "refitted",
        *own(place),
        "--behaviours",
        place / "data.jsonl",
        "--data",
        place / "data.jsonl",
        "--count",
        2,
        "--spread",
        2,
        "--random-suffixes",
        3,
        "--answers",
        2,
        "--residual",
        "0,1",
        *JUDGE,
        "--json",
    )
    told = json.loads(done)
    before, after = ProbeBundle.load(place / "bundle"), ProbeBundle.load(place / "refitted")
    assert told["refitted_from"] == before.digest[:12] == after.provenance["refitted_from"][:12]
    assert told["adversarial_rows"] >= 2 * (2 + 3 * 2)
    after.certificate().verify()
    assert after.certificate().alpha == before.certificate().alpha
    assert [(site.layer, site.kind) for site in after.probe.sites] == [(0, "resid"), (1, "resid")]
    assert after.canary is not None
    shown = run(
        "attack",
        "--model",
        place / "model",
        "--bundle",
        place / "refitted",
        "--behaviours",
        place / "data.jsonl",
        *JUDGE,
        "--threat",
        "T1",
        "--arm",
        "guarded",
        "--count",
        1,
        "--queries",
        2,
        "--half",
        "second",
        "--doubled",
        "--max-new-tokens",
        3,
        "--json",
    )
    rows = json.loads(shown)["rows"]
    assert {row["arm"] for row in rows} == {"guarded"}
    assert {row["budget"] for row in rows} == {"4 queries"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("evaluate", "--model", "x"), "without --data"),
        (("evaluate", "--mode", "generated", "--html", "x.html"), "finished responses"),
        (("attack", "--model", "x"), "needs --behaviours and --judge"),
        (("attack", "--redirect", "flag"), "no guard to attack"),
        (("attack", "--threat", "T9"), "not one of"),
        (("attack", "--arm", "open"), "--arm='open' is not one of"),
        (("refit", "--records", "x", "--out", "y", "--model", "z"), "needs --behaviours"),
        (("reproduce", "none-such"), "is not in protocol.yaml"),
        (("reproduce", "--protocol", "none.yaml"), "is not there"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(arguments, told):
    assert told in run(*arguments, code=2)


def test_a_judge_that_is_not_there_is_named(place):
    data = place / "data.jsonl"
    told = run(
        "attack",
        *own(place),
        "--behaviours",
        data,
        "--judge",
        "no.such:judge",
        "--threat",
        "T1",
        code=2,
    )
    assert "cannot be imported" in told


PROTOCOL = """
seed: 0
tables:
  small:
    about: a list of modules
    primary: one
    secondary: [two]
    minutes: 1
    steps: [[this], [json.tool, --help]]
    writes: [nothing]
  broken:
    about: fails
    primary: one
    secondary: []
    minutes: 1
    steps: [[no_such_module]]
    writes: []
"""


def test_reproduce_runs_the_steps_of_a_table(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    path = tmp_path / "benchmarks" / "protocol.yaml"
    path.write_text(PROTOCOL)
    assert "this\njson.tool --help" in run("reproduce", "small", "--protocol", path, "--dry-run")
    assert json.loads(run("reproduce", "--protocol", path, "--json"))["small"]["primary"] == "one"
    told = run("reproduce", "broken", "--protocol", path, code=2)
    assert "ended with status 1" in told
    path.write_text(PROTOCOL.replace("minutes: 1", "minutes: soon", 1))
    with pytest.raises(DataError, match="'soon'"):
        read_protocol(path)
    path.write_text(PROTOCOL.replace("seed: 0", "sead: 0"))
    with pytest.raises(DataError, match="sead"):
        read_protocol(path)


def test_the_published_protocol_is_whole_and_its_commands_exist():
    from probes.cli.reproduce import _found

    protocol = read_protocol(_found(None))
    assert {"evaluation", "attacks", "attacks-refit"} <= set(protocol.tables)
    for table in protocol.tables.values():
        for step in table.steps:
            if step[0] == "safe_decode":
                # --help after all options: every option and its value must be known.
                assert run(*step[1:], "--help")


def test_tables_of_attacks_are_written_with_their_card(attacked, monkeypatch, tmp_path):
    _, journal = attacked
    monkeypatch.setattr("benchmarks.card.RESULTS", tmp_path)
    tables_main(["attacks", "--name", "x", f"shipped={journal}"])
    *rows, last = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert len(rows) == 5 and "shipped, claim" in last["card"]
    with pytest.raises(FileNotFoundError, match="run the attack first"):
        tables_main(["attacks", "shipped=none.jsonl"])


def test_splits_drawn_from_the_small_world_share_no_request(monkeypatch):
    def row(group: int, split: str) -> Conversation:
        asked = ({"role": "user", "content": "x"},)
        return Conversation(messages=asked, response="y", group=str(group), split=split)

    drawn = {"fit": (1, 2, 2), "select": (2, 3), "calibrate": (1, 3, 4)}
    monkeypatch.setattr(
        EmbeddedData, "seen", lambda _self, _m, _t, split, _n: [row(g, split) for g in drawn[split]]
    )
    parts = EmbeddedData().apart(None, None, dict.fromkeys(drawn, 3))
    found = {split: [r.group for r in rows] for split, rows in parts.items()}
    assert found == {"fit": ["1", "2", "2"], "select": ["3"], "calibrate": ["4"]}
    assert by_split([r for rows in parts.values() for r in rows])["calibrate"]
