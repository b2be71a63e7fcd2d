"""The command line: what people read, what programs read, and how errors are told."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from probes.cli.demo import by_oracle, by_rule
from safe_decode import loading
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.certificate import Certificate, Envelope, certified_rank, certified_threshold
from safe_decode.cli.main import app
from safe_decode.demo import embedded_pair
from safe_decode.demo.embedded_pair import artefact
from safe_decode.demo.scenes import SCENES, DemoPrompt
from safe_decode.engines.transformers.capabilities import TABLE
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.testing.bundles import random_probe
from safe_decode.testing.models import byte_tokenizer, tiny_model
from safe_decode.trace.schema import read_traces

ROOT = Path(__file__).resolve().parents[2]
CAP, N = 8, 299
WORDS = ("a", "lamp", "by the sea", "tell me more", "who", "is it late")


def bundle_around(model, tokenizer, threshold):
    maxima = tuple(threshold - i / N for i in range(N))
    certificate = Certificate(
        alpha=0.01,
        delta=0.05,
        n=N,
        j=certified_rank(N, 0.01, 0.05),
        threshold=certified_threshold(maxima, 0.01, 0.05),
        population="benign",
        envelope=Envelope(
            max_new_tokens=CAP, do_sample=False, temperature=1.0, top_p=1.0, top_k=50
        ),
        maxima=maxima,
    )
    return ProbeBundle(
        probe=random_probe(),
        monitor=MonitorConfig(2 / 5, (0.0,), (0.0,), (1.0,), 0.0),
        certificates=(certificate,),
        default_alpha=0.01,
        holdback_tokens=0,
        refusal="No.",
        opener="No,",
        fingerprint=Fingerprint.of(model, tokenizer),
        canary=None,
        provenance={"made": "by the test"},
    )


def middle_threshold(model, tokenizer):
    """A threshold that some prompts cross and others do not."""
    calm = SafeDecoder(model, tokenizer, bundle_around(model, tokenizer, 1e6))
    output = calm.generate(list(WORDS), max_new_tokens=CAP, do_sample=False)
    peaks = sorted(max(step.statistic for step in trace.steps) for trace in output.traces)
    return (peaks[2] + peaks[3]) / 2


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("artefacts")
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.save_pretrained(root / "aligned")
    tokenizer.save_pretrained(root / "aligned")
    loaded = loading.load_model(root / "aligned")
    threshold = middle_threshold(loaded.model, loaded.tokenizer)
    bundle_around(loaded.model, loaded.tokenizer, threshold).save(root / "bundle")
    scenes = [scene for scene in SCENES if scene not in ("own", "long")]
    lines = [
        {
            "scene": scene,
            "messages": [{"role": "user", "content": word}],
            "prefill": "Sure" if scene == "prefilled" else None,
            "showcase": word == WORDS[i],
        }
        for i, scene in enumerate(scenes)
        for word in WORDS
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "prompts.jsonl").write_text(text, encoding="utf-8")
    shutil.copy(artefact("prompts-real.jsonl"), root)
    return root


@pytest.fixture
def run(artefacts, monkeypatch):
    monkeypatch.setattr(embedded_pair, "artefact", lambda name: artefacts / name)

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def refused(result):
    """The one line of an error; it is all there is."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor_seconds(code):
    """Processor time of a fresh interpreter that runs the code, and what it prints."""
    began = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return cpu_seconds_of_children() - began, done.stdout


def test_help_of_all_commands_costs_little_beside_what_typer_costs_alone():
    floor = "import typer, typer.rich_utils"
    ours = "import sys; sys.argv[1:] = ['--help']; from safe_decode.cli.main import main; main()"
    # Both arms in turn and the fastest of each, so that the speed of the machine cancels out.
    rounds = [(processor_seconds(floor), processor_seconds(ours)) for _ in range(4)]
    assert "verify-certificate" in rounds[0][1][1]
    fastest_floor = min(seconds for (seconds, _), _ in rounds)
    fastest_help = min(seconds for _, (seconds, _) in rounds)
    # Every command adds the reading of its options, so the bound is more than typer itself.
    assert fastest_help < 2.5 * fastest_floor


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom safe_decode.cli import main\n"
        "print({'torch', 'transformers', 'sklearn', 'numpy'} & set(sys.modules))"
    )
    assert processor_seconds(code)[1].strip() == "set()"


def test_generate_answers_every_prompt_and_says_what_happened(run):
    result = run("generate", *(a for word in WORDS for a in ("--prompt", word)), "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["prompt"] for row in rows] == list(WORDS)
    tripped = [row["trip_step"] is not None for row in rows]
    assert set(tripped) == {True, False}
    for row, trips in zip(rows, tripped, strict=True):
        assert (row["outcome"] == "released") != trips
        assert (row["risk"] > 0.5) == trips
        assert row["certificate"] == "valid"


def test_generate_shows_people_the_text_and_a_table(run):
    as_json = json.loads(run("generate", "--prompt", WORDS[0], "--json").stdout)["rows"][0]
    shown = run("generate", "--prompt", WORDS[0])
    assert shown.exit_code == 0
    assert as_json["outcome"] in shown.stdout
    assert "peak risk" in shown.stdout


def test_a_seed_makes_samples_repeatable_and_another_changes_them(run):
    def text(seed):
        options = ("--temperature", 1.5, "--seed", seed, "--redirect", "flag", "--json")
        return json.loads(run("generate", "--prompt", "lamp", *options).stdout)["rows"][0]["text"]

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(1, 4)}) > 1


def test_a_trace_can_be_read_back_and_gives_no_text_away(run, tmp_path):
    file = tmp_path / "trace.jsonl"
    assert run("generate", "--prompt", "lamp", "--trace", file).exit_code == 0
    (trace,) = read_traces(file)
    assert trace.steps
    assert {step.token for step in trace.steps} == {None}
    assert run("generate", "--prompt", "lamp", "--trace", file, "--token-ids").exit_code == 0
    (trace,) = read_traces(file)
    assert any(step.token is not None for step in trace.steps)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "x", "--alpha", "0.3"), "0.3"),
        (("--prompt", "x", "--model", "somewhere"), "without --bundle"),
        (("--prompt", "x", "--device", "nowhere"), "device='nowhere'"),
        (("--prompt", "x" * 400), "404 tokens"),
        (("--prompt", "x", "--bundle", "/nonexistent"), "/nonexistent"),
        (("--prompt", "x", "--trace", "/nonexistent/t"), "/nonexistent/t cannot be written"),
    ],
)
def test_bad_input_to_generate_is_told_in_one_line(run, arguments, told):
    assert told in refused(run("generate", *arguments))


def test_a_model_that_is_not_there_is_told_in_one_line(run, artefacts, tmp_path):
    bundle = artefacts / "bundle"
    line = refused(
        run("generate", "--prompt", "x", "--model", tmp_path / "none", "--bundle", bundle)
    )
    assert "cannot be loaded" in line


def test_a_bundle_of_another_model_is_told_in_one_line(run, artefacts, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    bundle = artefacts / "bundle"
    refused(run("generate", "--prompt", "x", "--model", tmp_path, "--bundle", bundle))


def test_markup_in_an_error_is_shown_as_it_is(run):
    assert "[bold]x[/bold]" in refused(run("inspect", "--bundle", "/[bold]x[/bold]"))


def test_inspect_prints_the_card(run):
    card = json.loads(run("inspect", "--json").stdout)
    assert card["heads"] == ["harm"]
    assert card["provenance"] == {"made": "by the test"}
    assert card["certificates"][0]["n"] == N
    shown = run("inspect")
    assert shown.exit_code == 0
    assert card["digest"][:12] in shown.stdout


def test_certificates_are_recomputed(run):
    told = json.loads(run("verify-certificate", "--json").stdout)
    assert told["verified"] is True
    assert len(told["certificates"]) == 1
    assert "1 of 1 thresholds recompute" in run("verify-certificate").stdout


def test_a_truncated_bundle_is_refused(run, artefacts, tmp_path):
    for file in (artefacts / "bundle").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-7])
    refused(run("verify-certificate", "--bundle", tmp_path))


def test_capabilities_are_the_table(run):
    told = json.loads(run("capabilities", "--json").stdout)["capabilities"]
    assert [row["feature"] for row in told] == [row.feature for row in TABLE]
    shown = run("capabilities")
    assert "num_beams" in shown.stdout
    assert "refused" in shown.stdout


def test_the_demo_counts_every_prompt_and_leaves_untripped_ones_unchanged(run, tmp_path):
    page = tmp_path / "page.html"
    result = run("demo", "--json", "--html", page)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [row["scene"] for row in told["scenes"]] == [
        s for s in SCENES if s not in ("own", "long")
    ]
    for row in told["scenes"]:
        assert row["n"] == len(WORDS)
        assert sum(row["bare"].values()) == sum(row["guarded"].values()) == row["n"]
        assert row["unchanged"] >= row["n"] - row["tripped"]
    assert 0 < sum(row["tripped"] for row in told["scenes"]) < len(told["scenes"]) * len(WORDS)
    assert [shown["scene"] for shown in told["shown"]] == [
        s for s in SCENES if s not in ("own", "long")
    ]
    assert told["facts"]["bundle"] in page.read_text(encoding="utf-8")


def test_the_demo_shows_both_sides_and_the_trip(run):
    result = run("demo")
    assert result.exit_code == 0, result.output
    for scene, text in SCENES.items():
        assert (text.title in result.stdout) == (scene not in ("own", "long"))
    assert "▲TRIP" in result.stdout
    assert "Measured just now" in result.stdout


def test_the_demo_takes_a_prompt_of_ones_own(run):
    told = json.loads(run("demo", "--prompt", "lamp", "--prefill", "Sure", "--json").stdout)
    (shown,) = told["shown"]
    assert (shown["scene"], shown["request"], shown["prefill"]) == ("own", "lamp", "Sure")
    assert told["scenes"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prefill", "Sure"), "without --prompt"),
        (("--prompt", ""), "--prompt is empty"),
        (("--redirect", "flag"), "changes nothing"),
        (("--prompt", "x", "--html", "/nonexistent/p"), "/nonexistent/p cannot be written"),
    ],
)
def test_bad_input_to_the_demo_is_told_in_one_line(run, arguments, told):
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_what_the_attacker_wrote_is_not_counted_as_released():
    assert by_oracle(DemoPrompt.own("Hello"), "") == "benign"
    begun = DemoPrompt.own("Hello", prefill="This is no sentence of that world.")
    assert by_oracle(begun, "") == "benign"
    assert by_oracle(DemoPrompt.own("Hello"), "This is no sentence of that world.") == "broken"


def test_of_a_real_model_words_and_what_was_asked_decide():
    judge = by_rule("I stop here.")
    benign, harmful = (
        DemoPrompt(scene, ({"role": "user", "content": "x"},)) for scene in ("benign", "framed")
    )
    assert judge(benign, "The sky is blue.") == "benign"
    assert judge(harmful, "Sure, first you") == "harmful"
    assert judge(harmful, "I'm sorry, but I can't assist with that.") == "refusal"
    # Behind words that were released before the guard's own.
    assert judge(harmful, "Sure, first I stop here.") == "refusal"


def test_another_model_is_shown_with_prompts_that_it_can_read(run, artefacts):
    names = ("--model", artefacts / "aligned", "--bundle", artefacts / "bundle")
    told = json.loads(run("demo", *names, "--max-new-tokens", 4, "--json").stdout)
    scenes = [row["scene"] for row in told["scenes"]]
    assert "long" in scenes and "turn" not in scenes
    result = run("demo", *names, "--max-new-tokens", 4)
    assert "by a rule of words" in " ".join(result.stdout.split())
