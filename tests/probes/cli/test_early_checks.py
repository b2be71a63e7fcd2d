"""What options, files and data tell is told before a model is loaded."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from probes.activations import harvest as harvesting
from probes.data.conversations import assign_splits, write_jsonl
from safe_decode import loading
from safe_decode.activations.site import Site
from safe_decode.cli.main import app
from safe_decode.errors import ConfigurationError
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.planted import planted_rows

SHARES = {"locate": 0.1, "fit": 0.3, "select": 0.1, "calibrate": 0.35, "test": 0.15}
NO_LAYER = "names a layer outside this model's 0..4"


def plain(rows):
    """Without splits and populations, as data from elsewhere."""
    return [replace(row, meta={}, split=None) for row in rows]


@pytest.fixture
def files(tmp_path):
    rows = plain(planted_rows(60))
    split = assign_splits(rows, shares=SHARES)
    kinds = {
        "plain": rows,
        "split": split,
        "no_fit": [row for row in split if row.split != "fit"],
        "half_split": [*rows[:20], *(replace(row, split="fit") for row in rows[20:])],
        "leaked": [replace(row, group="one") for row in split],
        "unjudged": [replace(row, response_harmful=None, onset_char=None) for row in rows],
        "harmless": [row for row in rows if not row.response_harmful],
        "harmful": [row for row in rows if row.response_harmful],
        "fit_harmless": [row for row in split if not (row.split == "fit" and row.response_harmful)],
        "no_test": [row for row in split if row.split != "test"],
    }
    for name, of_kind in kinds.items():
        write_jsonl(tmp_path / f"{name}.jsonl", of_kind)
    prompts = [{"prompt": f"p {i}", "response": "Of course."} for i in range(60)]
    (tmp_path / "answered.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (tmp_path / "file").write_text("x")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "other.txt").write_text("x")
    return tmp_path


CASES = [
    ("harvest --data plain --out o", "nothing to read; pass --units"),
    ("harvest --data plain --out o --residual 2,7", NO_LAYER),
    ("harvest --data plain --out o --residual two", "neither all nor layers"),
    ("harvest --data plain --out o --units none.units", "none.units"),
    ("harvest --data plain --out file/o --residual all", "is a file; pass a directory"),
    ("harvest --data no_fit --out o --residual all", "the split 'fit' holds no judged response"),
    ("harvest --data half_split --out o --residual all", "rows have a split; give all of them one"),
    ("harvest --data leaked --out o --residual all", "stands in the splits"),
    ("harvest --data unjudged --out o --residual all", "judge them first"),
    ("fit --data unjudged --out b --residual all", "judge them first"),
    ("fit --data no_fit --out b --residual all", "the split 'fit' holds no judged response"),
    ("fit --data harmless --out b --residual all", "0 of 40 judged responses are harmful; give"),
    ("fit --data fit_harmless --out b --residual all", "of the split 'fit' are harmful"),
    ("fit --data plain --out b --residual all", "cannot certify alpha=0.01"),
    ("fit --data plain --out b --residual all --alpha 0.2 --statistic x", "statistic='x' is not"),
    ("fit --data plain --out b --residual all --method x", "method"),
    ("fit --data plain --out b --residual 9", NO_LAYER),
    ("fit --data plain --out occupied --residual all", "exists and is no bundle"),
    ("calibrate --data harmful --out b", "is judged harmless"),
    ("calibrate --data harmless --out b", "cannot certify alpha=0.01"),
    ("calibrate --data harmless --out occupied", "exists and is no bundle"),
    ("evaluate --data no_test", "none of its rows is of the split 'test'"),
    ("evaluate --data harmless", "are harmful; give both kinds"),
    ("evaluate --data split --train plain", "drop one of them"),
    ("evaluate --data plain --alpha 0.3", "alpha=0.3 is not certified"),
    ("evaluate --data plain --population martians", "not certified for 'martians'"),
    ("evaluate --data plain --mode both --judge no:where", "--judge='no:where' cannot be imported"),
    ("rollout --data none --out o", "none.jsonl is no file"),
    ("locate --harmful answered --benign answered --out u", "0 refuse, in 0 distinct"),
]


@pytest.mark.parametrize(("line", "complaint"), CASES, ids=[line for line, _ in CASES])
def test_what_must_fail_fails_before_the_model_is_loaded(files, monkeypatch, line, complaint):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(loading, "load_model", loaded)
    monkeypatch.chdir(files)
    before = {path.name for path in files.iterdir()}
    words = line.split()
    for place, word in enumerate(words):
        if words[place - 1] in ("--data", "--train", "--harmful", "--benign"):
            words[place] = f"{word}.jsonl"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, (result.output, result.exception)
    assert complaint in " ".join(result.stderr.split())
    assert {path.name for path in files.iterdir()} == before


def test_a_harvest_that_would_fill_the_disk_runs_no_forward(tmp_path, monkeypatch):
    model, tokenizer = tiny_model(), byte_tokenizer()

    def forward(*_, **__):
        raise AssertionError("a forward ran")

    used = harvesting.shutil.disk_usage(tmp_path)
    sites = [Site(1, "resid", tuple(range(32)))]
    rows = planted_rows(6)
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", forward)
        patch.setattr(harvesting.shutil, "disk_usage", lambda _: used._replace(free=1000))
        with pytest.raises(ConfigurationError, match=r"room for 0\.00 GiB, and .* positions of 32"):
            harvesting.harvest_to(tmp_path / "shards", model, tokenizer, rows, sites)
    found = harvesting.harvest_to(tmp_path / "shards", model, tokenizer, rows, sites)
    with monkeypatch.context() as patch:  # what is there already needs no room
        patch.setattr(harvesting.shutil, "disk_usage", lambda _: used._replace(free=0))
        again = harvesting.harvest_to(tmp_path / "shards", model, tokenizer, rows, sites)
    assert all(np.array_equal(a, b) for a, b in zip(found.responses, again.responses, strict=True))
