"""`safe-decode ablate`: from located units to a table, a journal and a picture."""

import json

import pytest
from typer.testing import CliRunner

from probes.analysis import ablation as workbench
from safe_decode.cli.main import app
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.probes.finetuning.test_freeze import located

WORDS = ("lamp", "boat", "wheel", "stone", "clock", "river")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablate")
    model = tiny_model("llama")
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    located(model).save(root / "units")
    for name, text in (("harmful", "break the {}"), ("benign", "polish the {}")):
        rows = "".join(json.dumps({"prompt": text.format(word)}) + "\n" for word in WORDS)
        (root / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    return root


def run(folder, *more):
    files = ("--harmful", folder / "harmful.jsonl", "--benign", folder / "benign.jsonl")
    sizes = ("--random-sets", 1, "--margin-sets", 2, "--max-new-tokens", 8)
    fixed = ("--units", folder / "units", "--model", folder / "model", *files, *sizes)
    # What the random model says to harmful prompts more often than to benign ones.
    phrase = ("--refusal-phrase", "\x01")
    return CliRunner().invoke(app, ["ablate", *map(str, (*fixed, *phrase, *more))])


def test_an_ended_run_goes_on_and_tells_what_it_found(folder, tmp_path, monkeypatch):
    out, plot = tmp_path / "arms.jsonl", tmp_path / "arms.png"
    first = run(folder, "--out", out, "--plot", plot, "--json")
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert [arm["arm"] for arm in told["arms"][:2]] == ["whole", "SCU"]
    assert len(told["arms"]) == 6 + 2 * 2
    assert {row["family"] for row in told["compared"]} == {
        "random, matched on layer",
        "random, matched on importance",
    }
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = out.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(told["arms"])
    out.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    measured = []
    bare = workbench.ablate

    def counted(model, tokenizer, arm, *rest):
        measured.append(arm.name)
        return bare(model, tokenizer, arm, *rest)

    monkeypatch.setattr(workbench, "ablate", counted)
    again = run(folder, "--out", out, "--json")
    assert again.exit_code == 0, again.output
    assert len(measured) == len(told["arms"]) - 3
    assert json.loads(again.stdout)["arms"] == told["arms"]
    other = run(folder, "--out", out, "--seed", 3)
    assert other.exit_code == 2
    assert "pass another file" in other.stderr


def test_people_see_a_table_and_a_comparison(folder):
    result = run(folder, "--fill", "mean")
    assert result.exit_code == 0, result.output
    for word in ("Without these units", "nothing", "perplexity", "SCU against 1 sets random"):
        assert word in result.stdout


def test_half_of_the_prompts_are_refused(folder):
    result = CliRunner().invoke(
        app,
        ["ablate", "--units", str(folder / "units"), "--harmful", str(folder / "harmful.jsonl")],
    )
    assert result.exit_code == 2
    assert "belong together" in result.stderr
