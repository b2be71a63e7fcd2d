"""From files to a bundle and back by commands: each says what it did, and can go on."""

import json

import pytest
from typer.testing import CliRunner

from probes.data.conversations import Conversation, read_jsonl, write_jsonl
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.cli.main import app
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.own_rows import as_own
from tests.probes.recipes.test_bundle import corpus


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(*arguments, status=0):
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("workbench")
    tiny_model("llama").save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    write_jsonl(root / "foreign.jsonl", corpus(900))
    own = as_own(tiny_model("llama"), byte_tokenizer(), corpus(900), cap=48)
    write_jsonl(root / "rows.jsonl", own)
    return root


@pytest.fixture(scope="module")
def fitted(folder):
    """The shortest way to a bundle, activations stored on the way."""
    return told(
        "fit", "--data", folder / "rows.jsonl", "--model", folder / "model", "--out",
        folder / "bundle", "--residual", "0,1", "--method", "token", "--c", 0.01, "--c", 0.1,
        "--statistic", "ema", "--statistic", "hysteresis", "--alpha", 0.05, "--store",
        folder / "store", "--max-new-tokens", 48,
    )  # fmt: skip


def test_fit_makes_a_bundle_that_guards(folder, fitted):
    bundle = ProbeBundle.load(folder / "bundle")
    assert bundle.digest == fitted["bundle"]
    assert bundle.certificate(0.05).envelope.max_new_tokens == 48
    assert fitted["chosen"]["tpr"] > 0.9
    assert len(fitted["tried"]) == 8
    assert set(fitted["chosen"]["c_aurocs"]) == {"0.01", "0.1"}
    assert fitted["not_of_this_model"] == 0
    assert {one["source"] for one in fitted["certificates"]} == {"on-policy"}
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    decoder = SafeDecoder(model, tokenizer, bundle, alpha=0.05)
    assert decoder.generate(["hello"], max_new_tokens=4, do_sample=False).texts[0] is not None


@pytest.mark.usefixtures("fitted")
def test_the_activations_that_fit_stored_are_those_of_harvest(folder):
    shards = sorted((folder / "store").rglob("*.npy"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    found = told(
        "harvest", "--data", folder / "rows.jsonl", "--model", folder / "model", "--out",
        folder / "store", "--residual", "0,1",
    )  # fmt: skip
    assert [shard.stat().st_mtime_ns for shard in shards] == before
    assert found["features"] == 64
    assert set(found["positions"]) == {"fit", "select"}
    assert found["bytes"] == 2 * 64 * sum(found["positions"].values())


@pytest.mark.usefixtures("fitted")
def test_fit_without_storing_finds_the_same(folder):
    found = told(
        "fit", "--data", folder / "rows.jsonl", "--model", folder / "model", "--out",
        folder / "again", "--residual", "0,1", "--method", "pooled", "--statistic", "ema",
        "--alpha", 0.05, "--recompute",
    )  # fmt: skip
    assert found["chosen"]["auroc"] > 0.9
    assert "recompute exclude" in refused(
        "fit", "--data", folder / "rows.jsonl", "--out", folder / "no", "--recompute", "--store",
        folder / "store",
    )  # fmt: skip


def test_a_probe_of_another_kind_is_fitted_and_refused_where_it_cannot(folder):
    given = (
        "fit", "--data", folder / "rows.jsonl", "--model", folder / "model", "--out",
        folder / "bent", "--residual", "1", "--statistic", "ema", "--alpha", 0.05,
    )  # fmt: skip
    found = told(*given, "--probe", "mlp")
    assert found["chosen"]["fit"]["probe"] == ProbeBundle.load(folder / "bent").probe.kind == "mlp"
    assert found["chosen"]["tpr"] > 0.9 and found["chosen"]["way"].startswith("mlp H=64")
    assert "do not support" in refused(*given, "--probe", "mlp", "--recompute")
    assert "method='token' is of linear" in refused(*given, "--probe", "mlp", "--method", "token")
    assert "probe='cubic' is no kind" in refused(*given, "--probe", "cubic")


def test_people_see_a_table_and_what_is_doubtful(folder):
    result = run(
        "fit", "--data", folder / "foreign.jsonl", "--model", folder / "model", "--out",
        folder / "shown", "--residual", "1", "--method", "mass_mean", "--statistic", "cusum",
        "--alpha", 0.05,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Best on select" in result.stdout
    assert "mass_mean" in result.stdout
    assert "benign at 0.05" in result.stdout
    assert "not this model's own" in result.stderr
    assert "nothing records that a model generated it" in result.stderr
    assert "off-policy" in result.stdout
    cap = ProbeBundle.load(folder / "shown").certificate().envelope.max_new_tokens
    assert 24 < cap < 40  # as far as enough of the texts reach, not as the longest does
    assert "fit holds too little of the cell benign request, harmful response" in result.stderr


def test_calibrate_certifies_anew_and_says_how_many_more_are_needed(folder, fitted):
    found = told(
        "calibrate", "--bundle", folder / "bundle", "--model", folder / "model", "--data",
        folder / "rows.jsonl", "--out", folder / "calibrated", "--alpha", 0.1,
        "--max-new-tokens", 40,
    )  # fmt: skip
    bundle = ProbeBundle.load(folder / "calibrated")
    assert bundle.default_alpha == 0.1
    assert found["certificates"][0]["alpha"] == 0.1
    assert bundle.certificate().envelope.max_new_tokens == 40
    assert bundle.provenance["calibrated_again"]["bundle_before"] == fitted["bundle"]
    common = ("--bundle", folder / "bundle", "--data", folder / "rows.jsonl", "--out", folder / "x")
    line = refused("calibrate", *common, "--model", folder / "model", "--alpha", 0.001)
    assert "collect" in line and "more" in line
    own = ("--model", folder / "model", "--alpha", 0.1)
    line = refused("calibrate", *common, *own, "--max-new-tokens", 100_000)
    assert "max_new_tokens=100000 is not supported for 'benign'" in line
    assert "(this model's own responses) support at most 48" in line
    assert "Pass max_new_tokens=48 or less" in line
    foreign = ("calibrate", "--bundle", folder / "bundle", "--data", folder / "foreign.jsonl")
    line = refused(*foreign, "--out", folder / "x", *own, "--max-new-tokens", 48)
    assert "texts that this model did not write" in line and "safe-decode rollout" in line
    assert "--delta=0.99 is outside (0, 0.2]" in refused("calibrate", *common, "--delta", 0.99)
    assert not (folder / "x").exists()
    shown = told(*foreign, "--out", folder / "off", *own)
    assert {one["source"] for one in shown["certificates"]} == {"off-policy"}
    loaded = ProbeBundle.load(folder / "off")
    assert loaded.certificate().envelope.max_new_tokens == loaded.certificate().supported_cap < 40
    output = SafeDecoder(tiny_model("llama"), byte_tokenizer(), loaded).generate(
        ["hello"], max_new_tokens=4, do_sample=False
    )
    assert output.traces[0].header.certificate == "valid(off-policy)"
    assert output.traces[0].header.source == "off-policy"
    for command in ("inspect", "verify-certificate"):
        assert "off-policy" in run(command, "--bundle", folder / "off").stdout
    other = folder / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    assert "made for another model" in refused("calibrate", *common, "--model", other)


@pytest.mark.usefixtures("fitted")
def test_check_compares_live_traces_with_the_calibration(folder):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    decoder = SafeDecoder(
        model, tokenizer, ProbeBundle.load(folder / "bundle"), alpha=0.05, redirect="flag"
    )
    prompts = [row.prompt for row in corpus(60)]
    # Live answers that begin with the letters of planted harm: other traffic than calibrated on.
    for name, prefill in (("calm", None), ("moved", "klmnopqrst" * 3)):
        output = decoder.generate(prompts, prefill=prefill, max_new_tokens=8, do_sample=False)
        for trace in output.traces:
            trace.write(folder / f"{name}.jsonl")
    arguments = ("check", "--bundle", folder / "bundle", "--alpha", 0.05, "--trace")
    calm = told(*arguments, folder / "calm.jsonl")
    assert (calm["traces"], calm["verdict"]) == (60, "no sign of change")
    moved = told(*arguments, folder / "moved.jsonl", status=1)
    assert moved["verdict"] == "calibrate again"
    assert moved["alarms"] > calm["alarms"]
    shown = run(*arguments, folder / "moved.jsonl")
    assert "responses alarm, more than 0.05 explains" in shown.stdout
    assert "cannot be read" in refused("check", "--bundle", folder / "bundle", "--trace", "/none")


@pytest.mark.usefixtures("fitted")
def test_export_writes_graphs_that_were_compared(folder):
    pytest.importorskip("onnxruntime")
    found = told("export", "--bundle", folder / "bundle", "--out", folder / "onnx", "--steps", 300)
    assert found["onnx_torch"] <= 1e-5
    assert found["flags_differ"] == 0
    assert {p.name for p in (folder / "onnx").iterdir()} == {"probe.onnx", "probe_monitor.onnx"}


def test_rollout_answers_prompts_and_judges_them(folder):
    prompts = [
        {"prompt": f"{word} {i}", "prompt_harmful": i % 2, "category": word}
        for i, word in enumerate(("lamp", "boat", "rope", "coal") * 4)
    ]
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in prompts) + "{\n")
    found = told(
        "rollout", "--data", source, "--model", folder / "model", "--out", folder / "own.jsonl",
        "--max-new-tokens", 5, "--framed", 0.5, "--prefilled", 0.5, "--answers-to-harm-are-harm",
    )  # fmt: skip
    rows = read_jsonl(folder / "own.jsonl")
    assert found["responses"] == len(rows) == 16
    assert (found["framed"], found["prefilled"]) == (8, 8)
    assert found["labels"] == {"benign": 8, "harmful": 8}
    assert found["sources"][0]["bad"] == 1
    assert all(len(row.response_ids) - row.prefill_tokens <= 5 for row in rows)
    shown = run(
        "rollout", "--data", source, "--model", folder / "model", "--out", folder / "o.jsonl",
        "--max-new-tokens", 2, "--judge", "none",
    )  # fmt: skip
    assert "1 of 17 rows cannot be used" in shown.stderr
    assert "unjudged 16" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("fit", "--out", "b"), "--data"),
        (("fit", "--data", "none.jsonl", "--out", "b"), "none.jsonl is no file"),
        (("fit", "--data", "none.txt", "--out", "/nowhere/b"), "cannot be written"),
        (("rollout", "--data", "x", "--out", "o", "--samples", "3"), "without --temperature"),
        (("rollout", "--data", "x", "--out", "o", "--framed", "2"), "framed=2.0 is outside"),
        (("rollout", "--data", "x", "--out", "o", "--judge", "a:b"), "cannot be imported"),
        (("harvest", "--data", "x", "--out", "o", "--split", "dev"), "--split='dev'"),
    ],
)
def test_bad_input_is_told_before_any_work(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unjudged_conversations_are_refused(folder, tmp_path):
    message = {"role": "user", "content": "a"}
    rows = [Conversation(messages=(message,), response="b", group="g")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    common = ("--data", tmp_path / "rows.jsonl", "--model", folder / "model")
    assert "judge them first" in refused("fit", *common, "--out", tmp_path / "b")
    assert "nothing to read" in refused("harvest", *common, "--out", tmp_path / "b")


def test_fit_says_what_the_bundle_is_worth_on_rows_that_nobody_chose_by(folder, fitted):
    worth = fitted["worth"]
    test = [row for row in read_jsonl(folder / "rows.jsonl") if row.split in (None, "test")]
    assert worth["split"] == "test" and 0 < worth["recall"]["n"] < len(test)
    assert ProbeBundle.load(folder / "bundle").provenance["worth"] == worth


def test_fit_refuses_a_select_split_that_decides_nothing_before_it_loads_a_model(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "safe_decode.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    rows = read_jsonl(folder / "rows.jsonl")
    harmful = [row for row in rows if row.response_harmful]
    few = [row for row in rows if not row.response_harmful] + harmful[:12]
    write_jsonl(tmp_path / "few.jsonl", few)
    line = refused(
        "fit", "--data", tmp_path / "few.jsonl", "--out", tmp_path / "bundle", "--alpha", 0.05
    )
    assert "harmful responses, wanted at least 10" in line and "select holds" in line
