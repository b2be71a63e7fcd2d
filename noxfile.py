"""The tests on every supported Python, and at both ends of what the dependencies may be.

`nox --list` names the sessions; `nox --session lowest` runs one. uv makes the environments. On
Linux torch brings CUDA along; `UV_INDEX` or `UV_FIND_LINKS` may name a place with a CPU build.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests"]

PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def run_tests(session: nox.Session) -> None:
    """Run the default tests, offline."""
    session.env["HF_HUB_OFFLINE"] = "1"
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the default tests at the pinned versions."""
    session.install("--constraint", "constraints.txt", "--editable", ".[tests]")
    run_tests(session)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run the default tests at the lowest versions that the package allows."""
    session.install("--resolution", "lowest-direct", "--editable", ".[tests]")
    run_tests(session)


@nox.session(python="3.11")
def newest(session: nox.Session) -> None:
    """Run the default tests at the newest versions that there are."""
    session.install("--upgrade", "--editable", ".[tests]")
    run_tests(session)
