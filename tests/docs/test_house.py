"""The laws of the house: what is light to import, how large a part may be, what is pinned."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
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
    wanted = (
        PYPROJECT["project"]["dependencies"] + extras["tests"] + extras["check"] + extras["docs"]
    )
    names = {normalised(re.split(r"[\[><=]", line)[0]) for line in wanted} - {"safe-decode"}
    assert names <= {normalised(PIN.match(line).group(1)) for line in pinned()}


def test_lower_bounds_stay_open():
    for line in PYPROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", line), f"{line!r} is not a bare lower bound"


def test_no_registry_host_is_named_in_the_build_files():
    host = re.compile(r"https?://|--(extra-)?index-url|--find-links")
    names = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "noxfile.py", "mkdocs.yml")
    for name in names:
        assert not host.search((ROOT / name).read_text(encoding="utf-8")), name


def test_both_packages_are_typed():
    for package in ("safe_decode", "probes"):
        assert (ROOT / package / "py.typed").is_file()


MOST_LINES_OF_A_MODULE, MOST_LINES_OF_A_FUNCTION, MOST_MODULES_OF_A_FOLDER = 300, 60, 20
NAMES_THAT_MAY_RECUR = {
    "__init__.py": "each package has one",
    "__main__.py": "each package that is run has one",
    "interface.py": "the Protocols of engines, of probes and of their fitters",
    "registry.py": "the kinds of engines, of probes and of their fitters",
    "settings.py": "the generation loop, vLLM, the server and the proxy have settings of their own",
    "harvest.py": "the step, the command that runs it and the benchmark that times it",
    "self_check.py": "the policy, the recipe that makes its certificate, and its benchmark",
}
"""File names that stand three times or more, and why."""


def modules(*roots):
    """Every module of the packages, as the path in the repository, with its text."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for root in roots
        for path in sorted((ROOT / root).rglob("*.py"))
    }


EVERY_MODULE = modules("safe_decode", "probes", "benchmarks")


def functions(text):
    """Name and lines of every function and method, inner ones among them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def too_large(found, most):
    return {name: size for name, size in found.items() if size > most}


def test_no_module_is_longer_than_300_lines():
    found = {path: len(text.splitlines()) for path, text in EVERY_MODULE.items()}
    assert not too_large(found, MOST_LINES_OF_A_MODULE)


def test_no_function_is_longer_than_60_lines():
    found = defaultdict(int)
    for path, text in EVERY_MODULE.items():
        for name, lines in functions(text):
            found[path, name] = max(found[path, name], lines)
    assert not too_large(found, MOST_LINES_OF_A_FUNCTION)


def test_no_folder_holds_more_than_20_modules():
    folders = defaultdict(list)
    for path in EVERY_MODULE:
        folders[Path(path).parent].append(path)
    assert not [f for f, found in folders.items() if len(found) > MOST_MODULES_OF_A_FOLDER]


def test_no_public_class_name_stands_for_two_things():
    places = defaultdict(list)
    for path, text in modules("safe_decode", "probes").items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_file_name_stands_three_times_without_a_reason():
    places = defaultdict(list)
    for path in EVERY_MODULE:
        places[Path(path).name].append(path)
    recurring = {name for name, found in places.items() if len(found) >= 3}
    assert recurring <= NAMES_THAT_MAY_RECUR.keys()
    assert NAMES_THAT_MAY_RECUR.keys() <= recurring, "no longer needed; take them off the list"
