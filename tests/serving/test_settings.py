"""Settings: every one of them in every way of giving it, one precedence, and no silent loss."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import pytest
import typer
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr

from safe_decode.bundle.summary import summary_of
from safe_decode.cli import serve as serving
from safe_decode.cli.main import app as command
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.serving.operations.screen import first_screen
from safe_decode.serving.settings import ServeSettings
from safe_decode.serving.sources import OTHER_VARIABLES, PREFIX, gather
from safe_decode.testing.bundles import bundle_for, decoder_for
from tests.servers import staged_engine

ROOT = Path(__file__).resolve().parents[2]
PARSER = typer.main.get_command(command)
FIELDS = ServeSettings.model_fields
# Where a flag is not called as its setting is.
FLAG_NAMES = {"api_keys": "api_key"}
# A flag without a value, which cannot be misread.
SWITCH = ("expose_scores", "flag")
# Lists of what is not any text.
LISTED = {
    "cors_origins": (["https://a.example"], ["http://b.example:81", "*"]),
    "shadow_endpoints": (["/v1/messages"], ["/v1/completions", "/v1/responses"]),
}
WAYS = ("flag", "--set", "environment", "file")


def flags():
    """Flags of the command that are settings, by the setting's name."""
    parameters = inspect.signature(serving.serve).parameters
    called = {FLAG_NAMES.get(name, name): name for name in FIELDS}
    return {called[p]: "--" + p.replace("_", "-") for p in parameters if p in called}


FLAGS = flags()


def values_of(name):
    """Two different good values of a setting that are not its default, from its schema."""
    field = FIELDS[name]
    kinds = [k for k in (field.annotation, *get_args(field.annotation)) if k is not type(None)]
    low = next((m.ge for m in field.metadata if isinstance(m, Ge)), 0)
    high = next((m.le for m in field.metadata if isinstance(m, Le)), 1_000_000)
    open_low = next((m.gt for m in field.metadata if isinstance(m, Gt)), 0)
    open_high = next((m.lt for m in field.metadata if isinstance(m, Lt)), 1_000_000)
    if name in LISTED:
        return LISTED[name]
    if any(get_origin(kind) is tuple for kind in kinds):
        return [f"{name}-1".replace("_", "-")], [f"{name}-2".replace("_", "-"), "other.example"]
    if any(get_origin(kind) is Literal for kind in kinds):
        choice = next(kind for kind in kinds if get_origin(kind) is Literal)
        others = [value for value in get_args(choice) if value != field.default]
        return (others[0], others[-1]) if len(others) > 1 else get_args(choice)
    if bool in kinds:
        return True, False
    if int in kinds:
        return low + 7, min(high, low + 11)
    if float in kinds:
        return open_low + open_high / 8, open_low + open_high / 4
    assert {str, Path} & set(kinds), f"{name} is of a kind that this test cannot make"
    return f"one-{name}", f"two-{name}"


def read(settings, name):
    """Return a setting in the form in which `values_of` has it."""
    value = getattr(settings, name)
    if isinstance(value, tuple):
        return [v.get_secret_value() if isinstance(v, SecretStr) else v for v in value]
    return str(value) if isinstance(value, Path) else value


def as_text(value):
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def as_flags(name, value):
    if name == "expose_scores":
        return ["--expose-scores" if value else "--hide-scores"]
    many = value if isinstance(value, list) else [value]
    return [word for one in many for word in (FLAGS[name], str(one))]


class Done(NamedTuple):
    """What became of a command."""

    status: int
    output: str


class Command:
    """The command as an operator runs it; what it would serve is kept instead."""

    def __init__(self, monkeypatch, folder):
        self._monkeypatch, self._folder = monkeypatch, folder
        monkeypatch.setattr(serving, "_run", self._keep)
        for variable in [v for v in os.environ if v.startswith(PREFIX)]:
            monkeypatch.delenv(variable)

    def _keep(self, given):
        self.given = given

    def run(self, name, ways):
        """Give one setting in several ways and return what came of it."""
        arguments, environment = ["serve"], {}
        if "flag" in ways:
            arguments += as_flags(name, ways["flag"])
        if "--set" in ways:
            arguments += ["--set", f"{name}={as_text(ways['--set'])}"]
        if "environment" in ways:
            environment[PREFIX + name.upper()] = as_text(ways["environment"])
        if "file" in ways:
            file = self._folder / "serve.yaml"
            file.write_text(yaml.safe_dump({name: ways["file"]}), encoding="utf-8")
            arguments += ["--config", str(file)]
        return self.invoke(arguments, environment)

    def invoke(self, arguments, environment=None):
        """Run the command; returns its status and what it told."""
        self.given = None
        told = io.StringIO()
        with self._monkeypatch.context() as patched, contextlib.redirect_stderr(told):
            for variable, value in (environment or {}).items():
                patched.setenv(variable, value)
            with pytest.raises(SystemExit) as ended:
                PARSER.main(arguments)
        # Lines are broken and framed for a terminal.
        text = re.sub(r"[\s│╭╮╰╯─]+", " ", told.getvalue())
        return Done(ended.value.code, text)

    def taken(self, name, ways):
        done = self.run(name, ways)
        assert done.status == 0, done.output
        return read(self.given.settings, name), self.given.origins[name]


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    return Command(monkeypatch, tmp_path)


def ways_of(name):
    return [way for way in WAYS if way != "flag" or name in FLAGS]


CASES = [(name, way) for name in FIELDS for way in ways_of(name)]
PAIRS = [(name, *pair) for name in FIELDS for pair in itertools.combinations(ways_of(name), 2)]


def test_every_flag_that_is_no_setting_is_known():
    parameters = set(inspect.signature(serving.serve).parameters)
    settings = {FLAG_NAMES.get(name, name) for name in FLAGS}
    assert parameters - settings == {"config", "settings"}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_setting_is_taken_in_every_way(command_line, name, way):
    for value in values_of(name):
        assert command_line.taken(name, {way: value}) == (value, way)


@pytest.mark.parametrize(("name", "higher", "lower"), PAIRS)
def test_of_two_ways_the_higher_one_is_taken(command_line, name, higher, lower):
    one, two = values_of(name)
    assert one != two
    assert command_line.taken(name, {lower: two, higher: one}) == (one, higher)
    assert command_line.taken(name, {lower: one, higher: two}) == (two, higher)


@pytest.mark.parametrize("name", FIELDS)
def test_what_nobody_gives_is_the_default_unless_the_demo_shows_it(command_line, name):
    other = next(n for n in FIELDS if n not in (name, "model"))
    command_line.run(other, {"environment": values_of(other)[0]})
    shown = name in ("expose_scores", "expose_bare")
    value, origin = read(command_line.given.settings, name), command_line.given.origins[name]
    if shown:
        assert (value, origin) == (True, "demo")
    else:
        default = FIELDS[name].default
        wanted = list(default) if isinstance(default, tuple) else default
        assert (value, origin) == (wanted, "default")


@pytest.mark.parametrize("way", ["--set", "environment", "file"])
@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if type(None) in get_args(f.annotation)]
)
def test_none_can_be_said_over_a_lower_way(command_line, name, way):
    one, _ = values_of(name)
    given = {way: None if way == "file" else "null"}
    if way != "file":
        given["file"] = one
    assert command_line.taken(name, given) == (None, way)


def is_hard_to_misread(name):
    kinds = (FIELDS[name].annotation, *get_args(FIELDS[name].annotation))
    return not {str, Path} & set(kinds)


@pytest.mark.parametrize(
    ("name", "way", "bad"),
    [
        *((*case, blank) for case in CASES for blank in ("", " ") if case != SWITCH),
        *(
            (name, way, "[oops")
            for name, way in CASES
            if way != "flag" and is_hard_to_misread(name)
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_origin(command_line, name, way, bad):
    """Blanks for every setting; nonsense for every one that is not any text."""
    done = command_line.run(name, {way: bad})
    assert done.status == 2 and command_line.given is None
    text = done.output
    places = {
        "flag": ("from a flag", FLAGS.get(name, name)),
        "--set": (f"--set {name}",),
        "environment": (PREFIX + name.upper(),),
        "file": ("--config=",),
    }
    assert name in text or FLAGS.get(name, name) in text
    assert any(place in text for place in places[way]), text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["", " ", "a b", " a", "a\u00e9", "\t"])
@pytest.mark.parametrize("name", ["api_keys", "operator_keys"])
def test_a_key_that_is_empty_or_cannot_be_sent_is_refused_and_not_told(
    command_line, name, key, way
):
    if way not in ways_of(name):
        return
    done = command_line.run(name, {way: ["good-secret", key]})
    assert done.status == 2 and command_line.given is None
    assert f"{name} from" in done.output and "key 2 of 2 is empty" in done.output
    assert "good-secret" not in done.output


@pytest.mark.parametrize("text", ['["secret"', "secret", '{"a": "secret"}', '"secret"', "[1]"])
def test_keys_that_are_no_list_are_refused_and_not_told(command_line, text):
    for arguments, environment in (
        (["serve", "--set", f"api_keys={text}"], {}),
        (["serve"], {"SAFE_DECODE_API_KEYS": text}),
    ):
        done = command_line.invoke(arguments, environment)
        assert done.status == 2 and "api_keys" in done.output
        assert "secret" not in done.output and command_line.given is None


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("SAFE_DECODE_API_KEY", "SAFE_DECODE_API_KEYS"),
        ("SAFE_DECODE_MAX_BATCHES", "SAFE_DECODE_MAX_BATCH"),
        ("safe_decode_port", "SAFE_DECODE_PORT"),
        ("SAFE_DECODE_CONFIG", "is no setting"),
        ("SAFE_DECODE_", "is no setting"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_name_that_was_meant(command_line, variable, told):
    done = command_line.invoke(["serve"], {variable: "x"})
    assert done.status == 2 and variable in done.output and told in done.output


def test_variables_of_this_project_s_tests_are_let_be_and_there_are_no_others():
    """Every variable that any file here names is a setting or on the list, and no other is."""
    named = set()
    folders = ("safe_decode", "probes", "tests", "benchmarks", ".ci")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in ("", ".py", ".sh")]
    files += [ROOT / "Makefile", ROOT / "Dockerfile", ROOT / "pyproject.toml"]
    for file in (f for f in files if f.is_file() and f != Path(__file__).resolve()):
        named |= set(re.findall(r"\bSAFE_DECODE_[A-Z][A-Z_]*", file.read_text(encoding="utf-8")))
    settings = {PREFIX + name.upper() for name in FIELDS}
    proxy = {name for name in named if name.startswith("SAFE_DECODE_PROXY")}
    assert named - settings - proxy == OTHER_VARIABLES
    given = gather(flags={}, environ=dict.fromkeys(OTHER_VARIABLES, "x"))
    assert set(given.origins.values()) == {"default"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "api_key=k"], "did you mean api_keys"),
        (["--set", "on_error=allow"], "on_error is no setting"),
        (["--set", "port"], "NAME=VALUE"),
        (["--set", "port=1", "--set", "port=2"], "twice"),
        (["--set", "redirect=flag"], "redirect='flag' from --set redirect"),
        (["--redirect", "flag"], "redirect='flag' from a flag"),
        (["--alpha", "2"], "alpha='2.0' from a flag"),
    ],
)
def test_arguments_that_say_nothing_sensible_are_refused(command_line, arguments, told):
    done = command_line.invoke(["serve", *arguments])
    assert done.status == 2 and command_line.given is None
    assert told in done.output


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("redirect: flag", "redirect='flag' from --config"),
        ("on_error: allow", "on_error"),
        ("api_key: [k]", "did you mean api_keys"),
        ("- a", "mapping"),
        ("port: [", "cannot be read"),
        ("port: 1\nport: 2", "twice"),
        ("port: yes", "port='True' from --config"),
        ("api_keys: k", "api_keys from --config"),
        ("api_keys: [12345]", "api_keys.0 from --config"),
        ("allowed_hosts: ['http://a']", "is no host"),
        ("allowed_hosts: []", "names nobody"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(command_line, tmp_path, text, told):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    done = command_line.invoke(["serve", "--config", str(file)])
    assert done.status == 2 and command_line.given is None
    assert told in done.output and "12345" not in done.output


def test_a_file_that_is_not_there_is_refused(command_line, tmp_path):
    done = command_line.invoke(["serve", "--config", str(tmp_path / "none.yaml")])
    assert done.status == 2 and "cannot be read" in done.output


@pytest.mark.parametrize("name", FIELDS)
def test_the_first_screen_shows_every_setting_in_effect_and_its_origin(command_line, name):
    engine = staged_engine()
    for way in ways_of(name):
        value, _ = values_of(name)
        assert command_line.run(name, {way: value}).status == 0
        rows = dict(first_screen(command_line.given, engine.facts))
        row = {
            "flag": rows.get("set by flags"),
            "--set": rows.get("set by --set"),
            "environment": rows.get("environment"),
            "file": rows.get("set by --config"),
        }[way]
        shown = {
            # What is in effect is what the engine was made with.
            "alpha": engine.facts.alpha,
            "holdback_tokens": engine.facts.holdback_tokens,
            "allowed_hosts": "allowed-hosts-1",
            "api_keys": 1,
            "operator_keys": 1,
            "shadow_keys": 1,
            "cors_origins": "https://a.example",
            "shadow_endpoints": "/v1/messages",
        }.get(name, as_text(value))
        assert row == f"{name}={shown}"
        everything = "  ".join(text for _, text in first_screen(command_line.given, engine.facts))
        assert all(f"{field}=" in everything for field in FIELDS)
        assert "keys-1" not in everything


def test_what_is_left_to_the_bundle_is_shown_as_it_is():
    facts = staged_engine().facts
    rows = dict(first_screen(gather(flags={}, environ={}), facts))
    for text in (
        f"alpha={facts.alpha}",
        f"max_new_tokens={facts.certified_cap}",
        "served_name=safe-decode-embedded",
        "allowed_hosts=localhost, 127.0.0.1, ::1",
        "api_keys=0",
    ):
        assert text in rows["by default"]
    facts = replace(facts, holdback_tokens=17)
    assert (
        "holdback_tokens=17"
        in dict(first_screen(gather(flags={}, environ={}), facts))["by default"]
    )


def test_the_first_screen_warns_and_says_what_is_caught(llama, tokenizer):
    recall = {"hits": 9, "n": 20, "low": 0.23, "high": 0.68}
    worth = {"alpha": 0.5, "recall": recall, "split": "test"}
    summary = summary_of(bundle_for(llama, tokenizer, provenance={"worth": worth}))
    facts = replace(staged_engine().facts, summary=summary)
    rows = first_screen(gather(flags={}, environ={}), facts)
    assert dict(rows)["catches"].startswith("9 of 20 harmful responses, 45.0 %")
    assert [text for name, text in rows if name == "warning"] == [
        "catches under half: 9 of 20 harmful responses at alpha 0.5",
        "recall rests on 20 harmful responses, wanted at least 30",
    ]


def test_an_engine_tells_the_summary_of_its_bundle(llama, tokenizer):
    engine = TransformersEngine(decoder_for(llama, tokenizer))
    assert engine.facts.summary is not None
    assert engine.facts.summary.certificate == engine.facts.certificate
    engine.close()
