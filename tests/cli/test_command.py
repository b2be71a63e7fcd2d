"""Options as dataclasses: what typer reads of them, and that each help text stands alone."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from safe_decode.cli.command import OTHER, PANELS, command, panel_of
from safe_decode.cli.main import app

GROUP = typer.main.get_command(app)
NAMES = GROUP.list_commands(None)
PARAMETERS = [
    (name, parameter) for name in NAMES for parameter in GROUP.get_command(None, name).params
]


@dataclass(frozen=True, kw_only=True)
class Shared:
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 3


@dataclass(frozen=True, kw_only=True)
class Further:
    plain: Annotated[bool, typer.Option("--plain-text", help="No colour.")] = False


@dataclass(frozen=True, kw_only=True)
class Own(Shared, Further):
    words: Annotated[list[str], typer.Option("--word", help="A word.")]
    place: Annotated[str | None, typer.Argument(help="A place.")] = None


def run_with(*arguments):
    taken = []

    @command("Tools")
    def take(options: Own) -> None:
        """Take options."""
        taken.append(options)

    own = typer.Typer(add_completion=False)
    own.command()(take)
    return CliRunner().invoke(own, list(arguments)), taken


def test_fields_arrive_as_they_were_given():
    result, taken = run_with("--word", "a", "here", "--word", "b", "--plain-text", "--seed", "4")
    assert result.exit_code == 0, result.output
    assert taken == [Own(words=["a", "b"], place="here", plain=True, seed=4)]


def test_defaults_are_those_of_the_fields():
    assert run_with("--word", "a")[1] == [Own(words=["a"])]


@pytest.mark.parametrize("arguments", [(), ("--word", "a", "--seed", "-1")])
def test_what_is_missing_or_out_of_range_is_refused(arguments):
    result, taken = run_with(*arguments)
    assert result.exit_code == 2
    assert taken == []


def test_own_options_come_before_shared_ones():
    @command("Tools")
    def take(options: Own) -> None:
        """Take options."""

    assert list(inspect.signature(take).parameters) == ["words", "place", "seed", "plain"]
    assert take.__doc__ == "Take options."


def test_a_default_that_no_help_could_show_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Made:
        words: Annotated[list[str], typer.Option(help="A word.")] = field(default_factory=list)

    def take(options) -> None:
        """Take options."""

    take.__annotations__ = {"options": Made}
    with pytest.raises(TypeError, match="'words' has a default factory"):
        command("Tools")(take)


def test_a_function_without_a_purpose_stands_among_the_others():
    assert panel_of(lambda: None) == OTHER


def test_every_command_states_a_purpose():
    assert {GROUP.get_command(None, name).rich_help_panel for name in NAMES} == set(PANELS)


@pytest.mark.parametrize(
    ("name", "parameter"), PARAMETERS, ids=[f"{n}-{p.name}" for n, p in PARAMETERS]
)
def test_help_of_an_option_stands_alone(name, parameter):
    told = parameter.help
    assert told, f"{name} says nothing of {parameter.name}"
    assert told.endswith("."), told
    assert re.match(r"[A-Z]", told), told
    assert not re.search(r"\b(Likewise|as above|the same as|the former|the latter)\b", told), told
    assert not told.startswith("Of "), told
