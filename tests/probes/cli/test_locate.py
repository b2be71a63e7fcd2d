"""`safe-decode locate`: from two files and a model to units, tables and pictures."""

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest
from typer.testing import CliRunner

from probes.cli.locate import locate
from probes.data.conversations import read_jsonl
from probes.location import importance
from probes.location import units as workbench
from probes.location.units import Ratios, UnitSet
from safe_decode import loading
from safe_decode.cli.main import app
from safe_decode.testing.models import D_FF, N_HEADS, N_LAYERS, byte_tokenizer, tiny_model

WORDS = ("lamp", "boat", "wheel", "stone", "clock", "river", "coat", "door", "lock", "seed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, 60 refusals of harmful prompts, 20 answers, and the bare prompts."""
    root = tmp_path_factory.mktemp("locate")
    tiny_model("llama").save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")

    def write(name, rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name).write_text(text, encoding="utf-8")

    harmful = [f"break the {a} {b}" for a in WORDS for b in WORDS[:6]]
    refusing = [{"prompt": p, "response": f"I cannot help to {p}."} for p in harmful]
    complying = [{"prompt": p, "response": "Sure."} for p in WORDS]
    answers = [{"prompt": w, "response": f"A {w} is fine. {w}"} for w in WORDS]
    refused = [{"prompt": w, "response": f"I won't say what a {w} is."} for w in WORDS[:3]]
    write("refused.jsonl", refusing + complying)
    write("answered.jsonl", answers + refused)
    write("harmful.jsonl", [{"prompt": p} for p in harmful])
    write("benign.jsonl", [{"prompt": w} for w in WORDS])
    return root


@pytest.fixture
def run(folder, tmp_path):
    def run(harmful, benign, *more, out="units.safetensors"):
        files = ("--harmful", folder / harmful, "--benign", folder / benign)
        arguments = ("--model", folder / "model", *files, "--out", tmp_path / out, *more)
        return CliRunner().invoke(app, ["locate", *(str(argument) for argument in arguments)])

    return run


def refused(result):
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_units_are_written_with_where_they_come_from(run, tmp_path):
    result = run("refused.jsonl", "answered.jsonl", "--json")
    assert result.exit_code == 0, result.output
    units = UnitSet.load(tmp_path / "units.safetensors")
    told = json.loads(result.stdout)
    n_units = N_LAYERS * (N_HEADS + D_FF)
    assert told["units"] == len(units) == n_units
    assert told["counts"] == units.counts()
    assert told["counts"]["SCU"] == round(0.02 * n_units)
    assert sum(told["shares"].values()) == pytest.approx(1)
    assert [row["layer"] for row in told["layers"]] == list(range(N_LAYERS))
    assert all(sum(row["heads"].values()) == N_HEADS for row in told["layers"])
    assert all(sum(row["neurons"].values()) == D_FF for row in told["layers"])
    record = units.provenance
    assert told["provenance"] == record
    assert record["counts"] == {
        "harmful_responses": 70,
        "refusals": 60,
        "distinct_refusals": 60,
        "benign_responses": 13,
        "benign_answers": 10,
    }
    assert record["refusal_rule"] == "refusal-words-1"
    assert record["files"]["harmful"]["name"] == "refused.jsonl"
    assert record["fingerprint"]
    assert record["generation"] is None
    assert (record["variant"], record["ranking"]) == ("flap", "joint")
    assert Ratios(**record["ratios"]) == Ratios()


def test_the_choices_reach_the_scores(run, tmp_path):
    files = ("refused.jsonl", "answered.jsonl", "--json")
    assert run(*files, out="flap").exit_code == 0
    choices = ("--variant", "plain", "--ranking", "separate", "--redundant", "0.3")
    told = json.loads(run(*files, *choices, "--safety", "0.25", "--utility", 0, out="plain").stdout)
    flap, plain = UnitSet.load(tmp_path / "flap"), UnitSet.load(tmp_path / "plain")
    heads = flap.kind == 0
    assert not np.allclose(flap.i_s[heads], plain.i_s[heads])
    np.testing.assert_allclose(flap.i_s[~heads], plain.i_s[~heads])
    assert told["all"]["heads"]["SCU"] == round(0.25 * N_LAYERS * N_HEADS)
    assert told["all"]["neurons"]["RU"] == round(0.3 * N_LAYERS * D_FF)
    assert told["counts"]["UCU"] == 0


def test_people_see_a_table_and_pictures(run, tmp_path):
    (tmp_path / "plots").mkdir()
    result = run("refused.jsonl", "answered.jsonl", "--plot", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    for word in ("layer", "SCU heads", "SCU neurons", "all", "60 refusals (60 distinct)"):
        assert word in result.stdout
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"shares.png", "importance.png"}


def test_responses_are_the_models_own_and_can_be_given_back(run, tmp_path):
    # The tiny model's own formula: every text of random bytes has broken characters.
    options = ("--refusal-phrase", "\ufffd", "--max-new-tokens", 12, "--json")
    store = ("--responses", tmp_path)
    first = run("harmful.jsonl", "answered.jsonl", *options, *store)
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)["provenance"]
    assert record["generation"]["of"] == ["harmful"]
    assert record["generation"]["max_new_tokens"] == 12
    assert record["phrases"] == ["\ufffd"]
    written = read_jsonl(tmp_path / "harmful.jsonl")
    assert len(written) == 60
    assert all(0 < len(row.response_ids) <= 12 for row in written)
    again = run(tmp_path / "harmful.jsonl", tmp_path / "benign.jsonl", *options, out="again")
    assert again.exit_code == 0, again.output
    one, two = (UnitSet.load(tmp_path / name) for name in ("units.safetensors", "again"))
    np.testing.assert_array_equal(one.i_s, two.i_s)
    assert two.provenance["generation"] is None


@pytest.mark.parametrize(
    ("files", "more", "told"),
    [
        (("answered.jsonl", "answered.jsonl"), (), "at most 13 responses, wanted at least 50"),
        (("harmful.jsonl", "benign.jsonl"), ("--samples", 2), "without --temperature"),
        (("none.jsonl", "benign.jsonl"), (), "none.jsonl cannot be read"),
        (("harmful.jsonl", "benign.jsonl"), ("--safety", 2), "add to at most 1"),
        (("harmful.jsonl", "benign.jsonl"), ("--plot", "/nonexistent"), "cannot be written"),
        (("harmful.jsonl", "benign.jsonl"), ("--responses", "/nonexistent"), "cannot be written"),
        (("harmful.jsonl", "benign.jsonl"), ("--max-new-tokens", 999), "exceed the model's"),
        (
            ("harmful.jsonl", "benign.jsonl"),
            ("--max-new-tokens", 2, "--refusal-phrase", "never said"),
            "of 60 responses to harmful prompts 0 refuse",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(run, tmp_path, files, more, told):
    assert told in refused(run(*files, *more))
    assert not (tmp_path / "units.safetensors").exists()


def test_missing_matplotlib_is_told_before_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    line = refused(run("harmful.jsonl", "benign.jsonl", "--plot", tmp_path))
    assert "pip install 'safe-decode[plots]'" in line


def test_the_options_are_those_of_the_workbench():
    hints = get_type_hints(locate)
    assert get_args(hints["variant"]) == get_args(importance.Variant)
    assert get_args(hints["ranking"]) == get_args(workbench.Ranking)


def test_a_page_holds_tables_and_pictures_and_asks_for_nothing(run, tmp_path):
    result = run("refused.jsonl", "answered.jsonl", "--html", tmp_path / "units.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "units.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    assert f"{N_LAYERS * (N_HEADS + D_FF)} units" in page
    assert "refusal-words-1" in page


def test_ratios_are_searched_on_prompts_that_are_not_located_on(run, folder, tmp_path):
    # Twice as many, so that two thirds still hold fifty refusals.
    rows = (folder / "refused.jsonl").read_text(encoding="utf-8").splitlines()
    more = [line.replace("break the", "please break the") for line in rows]
    (folder / "many.jsonl").write_text("\n".join([*rows, *more]) + "\n", encoding="utf-8")
    html = tmp_path / "units.html"
    result = run("many.jsonl", "answered.jsonl", "--search", "--html", html, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["provenance"]
    located, searched = record["counts"], record["search"]["counts"]
    assert located["harmful_responses"] + searched["harmful_responses"] == 140
    assert record["search"]["ratios"] == record["ratios"]
    assert {tried["category"] for tried in record["search"]["tried"]} >= {"RU", "SCU"}
    assert len(record["seen_groups"]) >= 120
    assert "Ratios tried" in html.read_text(encoding="utf-8")


def test_an_ended_run_goes_on_from_what_it_kept(run, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    files = ("refused.jsonl", "answered.jsonl", "--kept", kept, "--json")
    whole = json.loads(run(*files[:2], "--json", out="whole").stdout)
    assert run(*files).exit_code == 0
    monkeypatch.setattr(
        "probes.location.locate.visit_activations", lambda *_, **__: pytest.fail("run again")
    )
    again = run(*files, out="again")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["counts"] == whole["counts"]
    one, two = (UnitSet.load(tmp_path / name) for name in ("whole", "again"))
    np.testing.assert_allclose(one.i_s, two.i_s, rtol=1e-4, atol=1e-5)
    line = refused(run("answered.jsonl", "refused.jsonl", "--kept", kept, "--samples", 9))
    assert "at most" in line or "--temperature" in line
    line = refused(run("refused.jsonl", "answered.jsonl", "--kept", kept, "--max-new-tokens", 9))
    assert "pass another directory" in line
