"""Commands of other packages: what is registered is there, and only the runtime's own are known."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

from safe_decode.cli.main import GROUP, app

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
REGISTERED = PROJECT["entry-points"][GROUP]


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_a_command_of_the_workbench_is_registered_and_loads(name):
    found = EntryPoint(name, REGISTERED[name], GROUP).load()
    commands = {info.name: info.callback for info in app.registered_commands}
    assert commands[name] is found, (
        "the installation is older than pyproject.toml: install it again"
    )


def test_each_command_is_registered_once():
    names = [info.name for info in app.registered_commands]
    assert len(names) == len(set(names))
    assert isinstance(app, typer.Typer) and set(REGISTERED) < set(names)
