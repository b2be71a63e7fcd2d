"""The laws of the house: what is light to import, what is pinned, what is named nowhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.+]+)$")


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("heavy", ["transformers", "sklearn"])
def test_importing_safe_decode_stays_light(heavy):
    assert heavy not in loaded_after("import safe_decode")


def test_every_constraint_is_an_exact_pin_and_stands_once():
    names = []
    for line in pinned():
        match = PIN.match(line)
        assert match, f"{line!r} is not NAME==VERSION"
        names.append(normalised(match.group(1)))
    assert len(names) == len(set(names))


def test_everything_the_commands_install_directly_is_pinned():
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = PYPROJECT["project"]["dependencies"] + extras["tests"] + extras["check"]
    names = {normalised(re.split(r"[\[><=]", line)[0]) for line in wanted} - {"safe-decode"}
    assert names <= {normalised(PIN.match(line).group(1)) for line in pinned()}


def test_lower_bounds_stay_open():
    for line in PYPROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", line), f"{line!r} is not a bare lower bound"


def test_no_registry_host_is_named_in_the_build_files():
    host = re.compile(r"https?://|--(extra-)?index-url|--find-links")
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        assert not host.search((ROOT / name).read_text(encoding="utf-8")), name


def test_both_packages_are_typed():
    for package in ("safe_decode", "probes"):
        assert (ROOT / package / "py.typed").is_file()
