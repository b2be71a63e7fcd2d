"""Faults planted into modules: each kind is planted, what cannot show is spared, children tell."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutants import report
from benchmarks.mutants.operators import mutants_of
from benchmarks.mutants.plan import PLAN

ROOT = Path(__file__).parents[2]


def planted(source):
    """What a module becomes: one text a mutant."""
    return [ast.unparse(mutant.tree) for mutant in mutants_of(source)]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("x = a < b", ["x = a <= b", "x = a >= b"]),
        ("x = a == b", ["x = a != b"]),
        ("x = a is None", ["x = a is not None"]),
        (
            "x = a < b <= c",
            ["x = a <= b <= c", "x = a >= b <= c", "x = a < b < c", "x = a < b > c"],
        ),
        ("x = a and b", ["x = a or b"]),
        ("x = not a", ["x = a"]),
        ("x = -a", ["x = a"]),
        ("x = a + b", ["x = a - b"]),
        ("x += a", ["x -= a"]),
        ("x = 'a' + b", ["x = 'a~' + b"]),
        ("x = 3", ["x = 4"]),
        ("x = True", ["x = False"]),
        ("if a:\n    x = b", ["if not a:\n    x = b"]),
        ("x = b if a() else c", ["x = b if not a() else c"]),
        ("a(b)", ["pass"]),
        ("a.b = c", ["pass"]),
        ("a[b] = c", ["pass"]),
        ("raise ValueError('words')", ["pass"]),
        ("for x in a:\n    break", ["for x in a:\n    continue"]),
        ("def f():\n    return a", ["def f():\n    return None"]),
    ],
)
def test_each_kind_of_fault_is_planted_alone(source, wanted):
    assert planted(source) == wanted
    tree = ast.parse(source)
    list(mutants_of(source))
    assert ast.unparse(tree) == ast.unparse(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""Words."""',
        "def f(a: int | None) -> int | None:\n    ...",
        "@deco(frozen=True)\nclass A(B):\n    pass",
        "__all__ = ['a']",
        "assert a < 3",
        "x = SomeError(f'{a + 1} words', 3)",
        "from a import b",
        "if TYPE_CHECKING:\n    x = 3",
        "x = f'{a + 1}'",
        "def f():\n    return None",
    ],
)
def test_what_cannot_show_is_spared(source):
    assert planted(source) == []


def test_mutants_have_names_that_do_not_move_with_lines():
    source = "class A:\n    def f(self):\n        return (x < 1, x < 1)\n"
    names = [mutant.name for mutant in mutants_of(source)]
    assert len(set(names)) == len(names)
    assert [mutant.name for mutant in mutants_of(f"\n\n# More.\n{source}")] == names
    assert "A.f: x < 1 -> x <= 1 #2" in names


def test_a_child_meets_the_fault_and_says_what_became_of_it(tmp_path):
    """Three faults of one module: noticed, not noticed, and one whose tests do not end."""
    target = tmp_path / "test_rank.py"
    target.write_text(
        "from safe_decode.certificate import certified_rank\n\n"
        "def test_rank():\n    assert certified_rank(1000, 0.01, 0.05) == 4\n",
        "utf-8",
    )
    code = f"""
from pathlib import Path
from benchmarks.mutants import forks
from benchmarks.mutants.operators import mutants_of
forks.get_ready()
path = Path("safe_decode/certificate.py")
print(forks.run([{str(target)!r}], limit_s=90.0).outcome)
wanted = (
    "certified_rank: cumulative > delta -> cumulative <= delta",
    "certified_rank: n < 0 -> n <= 0",
)
for mutant in mutants_of(path.read_text("utf-8")):
    if mutant.name in wanted:
        fault = forks.Fault("safe_decode.certificate", path, mutant.tree)
        print(mutant.name, forks.run([{str(target)!r}], fault=fault, limit_s=90.0).outcome)
slow = Path({str(tmp_path / "test_slow.py")!r})
slow.write_text("import time\\n\\ndef test_slow():\\n    time.sleep(600)\\n", "utf-8")
print(forks.run([str(slow)], limit_s=1.0).outcome)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "survived" and lines[-1] == "timeout"
    told = dict(line.rsplit(" ", 1) for line in lines[1:-1])
    assert told["certified_rank: cumulative > delta -> cumulative <= delta"] == "killed"
    assert told["certified_rank: n < 0 -> n <= 0"] == "survived"


def test_the_plan_names_what_is_there():
    for subject in PLAN:
        assert (ROOT / subject.path).is_file()
        for name in subject.tests:
            assert (ROOT / "tests" / name.split("::")[0]).is_file()


def test_the_page_is_written_from_the_results_and_every_survivor_has_a_reason():
    rows, given = report.recorded(), report.reasons()
    assert report.PAGE.read_text("utf-8") == report.page(rows, given)
    assert report.shortfalls(rows, given) == []
    for row in rows:
        assert row["mutants"] == row["killed"] + row["survived"] + row["timeouts"] > 0
        assert len(row["survivors"]) == row["survived"]
        unused = set(given.get(row["module"], {})) - set(row["survivors"])
        assert not unused, "a reason for a mutant that did not survive"
