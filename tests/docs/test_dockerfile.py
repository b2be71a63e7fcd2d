"""The Dockerfile, as far as it can be checked without building: what it names exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer

from safe_decode.cli.main import app as command
from safe_decode.serving.app import create_app
from safe_decode.serving.settings import ServeSettings
from safe_decode.serving.sources import gather
from tests.servers import settings_of, staged_engine

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def values(name):
    return [value for word, value in instructions() if word == name]


def environment():
    return dict(pair.split("=", 1) for pair in shlex.split(values("ENV")[0]))


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [name for value in values("COPY") if "--from" not in value for name in value.split()]
    sources = {name for name in copied if name != "./"}
    assert {"pyproject.toml", "constraints.txt", "safe_decode", "probes", "bundles"} <= sources
    for name in sources:
        assert (ROOT / name).exists(), name
    # What the build reads besides the packages.
    wanted = {PROJECT["readme"], *PROJECT.get("license-files", ["LICENSE"])}
    assert wanted <= sources
    shipped = [*sources, "safe_decode/demo/artefacts/aligned/model.safetensors"]
    assert not [(n, p) for n in shipped for p in ignored if fnmatch(n, p) or n.startswith(f"{p}/")]


def test_the_extra_that_is_installed_is_the_server_s():
    extras = re.findall(r"'\.\[([^\]]+)\]'", values("RUN")[0])
    assert extras == ["serving"] and "serving" in PROJECT["optional-dependencies"]
    assert "--constraint constraints.txt" in values("RUN")[0]


def test_its_python_is_one_of_ours_in_both_stages():
    images = [value.split()[0] for value in values("FROM")]
    assert len(set(images)) == 1
    (version,) = re.findall(r"python:(\d+\.\d+)", images[0])
    assert PROJECT["requires-python"] == f">={version}"


def test_its_command_is_one_of_ours_and_hides_what_a_public_server_hides():
    program, *words = json.loads(values("ENTRYPOINT")[0])
    assert program in PROJECT["scripts"]
    given = json.loads(values("CMD")[0])
    parser = typer.main.get_command(command)
    serve = parser.get_command(None, words[0])
    params = serve.make_context("serve", list(given)).params
    found = gather(
        flags={"expose_scores": params["expose_scores"]},
        assigned=params["settings"],
        environ=environment(),
    )
    # The embedded model, which would show them unless it is told not to.
    settings = found.for_demo().settings
    assert settings.host == "0.0.0.0" and settings.is_demo
    assert not settings.expose_scores and not settings.expose_bare


def test_every_setting_it_makes_is_a_setting():
    own = [name for name in environment() if name.startswith("SAFE_DECODE_")]
    assert own
    assert {name.removeprefix("SAFE_DECODE_").lower() for name in own} <= set(
        ServeSettings.model_fields
    )


def test_it_runs_as_nobody_and_ends_by_the_signal_that_the_server_takes():
    (user,) = values("USER")
    assert user.isdigit() and int(user) > 0 and f"--uid {user} " in values("RUN")[1]
    assert values("STOPSIGNAL") == ["SIGTERM"]
    assert values("EXPOSE") == [str(ServeSettings.model_fields["port"].default)]


def test_its_health_check_compiles_and_asks_a_path_that_is_served():
    (check,) = values("HEALTHCHECK")
    program = json.loads(check[check.index("[") :])
    assert program[:2] == ["python", "-c"]
    compile(program[2], "healthcheck", "exec")
    path = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", program[2])
    assert path and path.group(1) in values("EXPOSE")
    paths = create_app(staged_engine(), settings_of()).openapi()["paths"]
    assert path.group(2) in paths


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    done = subprocess.run(
        ["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
