"""One command from a model's name to a bundle that says what it is worth, and goes on if ended."""

import json
import re

import pytest
from typer.testing import CliRunner

from probes.building.builder import build_bundle
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.cli.main import app
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.loading import load_model
from safe_decode.prompts.chat import encode_chat
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.probes.building.embedded_recipe import write_recipe

STEPS = ("answers", "locate", "fit and certify", "evaluate")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def answers(folder):
    text = (folder / "guard.work" / "answers.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("build")
    write_recipe(root)
    return root


@pytest.fixture(scope="module")
def built(folder):
    result = run("build", "--recipe", folder / "recipe.yaml", "--out", folder / "guard", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_bundle_guards_and_says_what_it_is_worth(folder, built):
    bundle = ProbeBundle.load(folder / "guard")
    assert bundle.digest == built["bundle"]
    worth = bundle.provenance["worth"]
    assert worth == built["worth"]
    assert worth["split"] == "test" and worth["located"] is True
    assert bundle.provenance["select"][0]["sites"].startswith("telling-")
    assert worth["recall"]["n"] >= 10 and worth["recall"]["hits"] <= worth["recall"]["n"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", bundle.made)
    from safe_decode.demo.embedded_pair import artefact

    own = load_model(artefact("aligned"))
    guarded = SafeDecoder(own.model, own.tokenizer, bundle)
    assert guarded.generate(["How are you?"], max_new_tokens=4, do_sample=False).texts[0]


@pytest.mark.usefixtures("built")
def test_the_page_stands_alone_and_holds_no_text_of_the_data(folder):
    page = (folder / "guard" / "report.html").read_text()
    assert "harmful responses that trip (recall)" in page
    assert not re.search(r"(?:src|href)=[\"']?http", page), "it asks for something from outside"
    assert not re.search(r">\s*nan\b", page, re.IGNORECASE)
    said = answers(folder)
    assert said
    for row in said:
        assert row["response"] not in page or len(row["response"]) < 20
        assert row["messages"][-1]["content"] not in page


@pytest.mark.usefixtures("built")
def test_what_was_short_follows_the_bundle(folder):
    warnings = ProbeBundle.load(folder / "guard").provenance["worth"]["warnings"]
    assert any("distinct refusals, wanted 50" in one for one in warnings)


def test_a_build_that_was_ended_at_any_step_goes_on_to_the_same_bundle(folder, built, monkeypatch):
    class Ended(Exception):
        pass

    out, arguments = folder / "ended", ("build", "--recipe", folder / "recipe.yaml", "--json")
    for ended in STEPS[1:]:

        def ending(own, recipe, material, work, *, judge, stage, ended=ended):
            def told(name):
                if name == ended:
                    raise Ended
                stage(name)

            return build_bundle(own, recipe, material, work, judge=judge, stage=told)

        with monkeypatch.context() as patch:
            patch.setattr("probes.building.builder.build_bundle", ending)
            assert isinstance(run(*arguments, "--out", out).exception, Ended)
        assert not out.exists()
        monkeypatch.setattr(
            "probes.rollouts.resume.rollout", lambda *_, **__: pytest.fail("answered once more")
        )
    result = run(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bundle"] == built["bundle"]


@pytest.mark.usefixtures("built")
def test_a_work_directory_of_another_recipe_is_refused(folder):
    line = refused(
        "build", "--recipe", folder / "recipe.yaml", "--out", folder / "guard", "--alpha", 0.2
    )
    assert "holds a build with another recipe" in line and "--work" in line


def test_the_plan_is_shown_without_a_model(folder, monkeypatch):
    monkeypatch.setattr(
        "safe_decode.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    result = run("build", "--recipe", folder / "recipe.yaml", "--out", folder / "planned", "--plan")
    assert result.exit_code == 0, result.output
    assert "What each split gets" in result.stdout and "answers to generate" in result.stdout
    assert not (folder / "planned").exists() and not (folder / "planned.work").exists()


class TestWrongStarts:
    """Each is an error before the weights are loaded; it names value, wanted and remedy."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        monkeypatch.setattr(
            "safe_decode.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
        )

    @pytest.fixture
    def start(self, folder, tmp_path):
        def started(change=lambda text: text, *further):
            path = folder / "changed.yaml"
            path.write_text(change((folder / "recipe.yaml").read_text()))
            return refused("build", "--recipe", path, "--out", tmp_path / "out", *further)

        return started

    def test_too_few_rows(self, start):
        line = start(lambda text: text.replace("benign: 300", "benign: 30"))
        assert "more benign prompts (answers.benign), or pass alpha" in line

    def test_an_alpha_too_small(self, start):
        line = start(lambda text: text, "--alpha", 0.0001)
        assert "alpha=0.0001 at delta=0.05 needs 29956" in line

    def test_one_class(self, start):
        line = start(lambda text: text.replace("harmful: 400", "harmful: 0"))
        assert "fit holds at most 0 harmful responses, wanted at least 10" in line

    def test_no_refusals_where_located_units_are_wanted(self, start):
        line = start(lambda text: text.replace("reading: {", "reading: {where: located, "))
        assert "locate holds at most 0 distinct refusals, wanted 50" in line
        assert "reading.where: residual" in line

    def test_a_judge_that_is_down(self, start):
        line = start(
            lambda text: text.replace(
                '"probes.organism.oracle:judge"', '"http://127.0.0.1:9/v1", judge_model: "m"'
            )
        )
        assert "the judge at http://127.0.0.1:9/v1 cannot be reached" in line and "start it" in line

    def test_a_judge_that_is_no_function(self, start):
        line = start(lambda text: text.replace("oracle:judge", "oracle:none"))
        assert "cannot be imported" in line and "pass module:function" in line

    def test_data_that_is_not_there(self, start):
        line = start(lambda text: text.replace("prompts.jsonl", "gone.jsonl"))
        assert "gone.jsonl is no file" in line

    def test_a_model_without_a_chat_template(self, start, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        tiny_model("llama").save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        line = start(lambda text: text, "--model", tmp_path / "base")
        assert (
            "has no chat template: it is a base model" in line and "pass the model's chat" in line
        )

    def test_no_model(self, start, tmp_path):
        line = start(lambda text: text, "--model", tmp_path / "none")
        assert "cannot be loaded: there is no such directory" in line

    def test_no_disk(self, start, monkeypatch):
        monkeypatch.setattr(
            "probes.building.workplace.shutil.disk_usage",
            lambda _: type("Usage", (), {"free": 1000})(),
        )
        assert "0.00 GB free" in start() and "--work on another disk" in start()

    def test_a_cap_beyond_the_context(self, start):
        assert "leaves no room for a prompt" in start(lambda t: t, "--max-new-tokens", 100_000)

    @pytest.mark.parametrize(
        "tried", ["statistics: [nothing]", "methods: [nothing]", "methods: null, probe: nothing"]
    )
    def test_something_to_try_that_is_not_there(self, start, tried):
        line = start(lambda text: re.sub(r"reading: .*", f"reading: {{{tried}}}", text))
        assert "'nothing'" in line and "pass" in line

    def test_a_layer_outside_the_model(self, start):
        line = start(lambda text: text.replace("reading: {", "reading: {layers: [99], "))
        assert "names layer 99, and this model has 0.." in line

    def test_a_place_that_is_no_bundle(self, folder, tmp_path):
        (tmp_path / "file").write_text("mine")
        line = refused("build", "--recipe", folder / "recipe.yaml", "--out", tmp_path)
        assert "is there and is no bundle" in line
        assert (tmp_path / "file").read_text() == "mine"

    def test_neither_recipe_nor_data(self, tmp_path):
        assert "pass exactly one of them" in refused("build", "--out", tmp_path / "out")


def test_evaluate_leaves_out_what_the_bundle_has_seen(folder, built):
    plain = answers(folder)
    for row in plain:
        row.pop("split")
    unsplit = folder / "unsplit.jsonl"
    unsplit.write_text("".join(json.dumps(row) + "\n" for row in plain))
    result = run(
        "evaluate", "--data", unsplit, "--bundle", folder / "guard", "--draws", 10, "--json"
    )
    assert result.exit_code == 0, result.output
    assert "rows are left out: the bundle was made from their prompts (select" in result.stderr
    found = json.loads(result.stdout)["teacher_forced"]
    judged = built["worth"]["recall"]["n"]
    (own,) = [one for one in found["slices"][0]["figures"] if one["method"] == "probe"]
    assert own["n_harmful"] == judged
    assert len(found["slices"][0]["figures"]) > 5, "the controls are gone"
    assert own["at_calibrated"]["detected"]["successes"] == built["worth"]["recall"]["hits"]


@pytest.mark.usefixtures("built")
def test_evaluate_refuses_a_set_that_the_bundle_was_made_from(folder, monkeypatch):
    monkeypatch.setattr(
        "safe_decode.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    judged = [row for row in answers(folder) if "response_harmful" in row]
    seen = [{**row, "split": "test"} for row in judged if row["split"] == "fit"]
    path = folder / "seen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in seen))
    line = refused("evaluate", "--data", path, "--bundle", folder / "guard")
    assert f"holds {len(seen)} rows to report on" in line and f"(fit {len(seen)})" in line


def test_labelled_responses_are_read_up_to_the_cap():
    from probes.building.answers import up_to
    from probes.data.conversations import Conversation
    from safe_decode.loading import Loaded

    own = Loaded(tiny_model("llama"), byte_tokenizer())
    row = Conversation(
        messages=({"role": "user", "content": "hello"},),
        response="abcdefgh",
        group="g",
        onset_char=6,
    )
    cut = up_to(own, row, 4)
    whole = encode_chat(own.tokenizer, row.messages, prefill=row.response)
    assert cut.response_ids == whole.ids[whole.turn_start :][:4]
    assert row.response.startswith(cut.response) and cut.onset_char is None
    assert up_to(own, row, 100) is row
