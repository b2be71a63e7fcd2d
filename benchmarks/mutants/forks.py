"""One process a mutant, forked from one that has imported what is slow and not ours.

Importing torch and transformers takes seconds, a fork milliseconds. The parent imports nothing
of the project, so that every child meets the fault in whatever it imports. It starts no thread
either: a fork would lose it.

Knows processes, pytest's exit codes and time. Does not know what a fault is.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Literal, NamedTuple

__all__ = ["Fault", "Outcome", "MutantVerdict", "get_ready", "run"]

Outcome = Literal["killed", "survived", "timeout"]


class MutantVerdict(NamedTuple):
    """What became of a mutant.

    Attributes:
        outcome: killed: a test failed. timeout: the tests did not end; noticed as well.
        seconds: How long its tests ran.
        shown: The end of what pytest wrote.
    """

    outcome: Outcome
    seconds: float
    shown: str


class Fault(NamedTuple):
    """A module with a fault: its dotted name, its file and its syntax tree."""

    module: str
    path: Path
    tree: ast.Module


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree instead of from its file."""

    def __init__(self, fault: Fault) -> None:
        self._name, self._path = fault.module, fault.path
        self._code: CodeType = compile(fault.tree, str(fault.path), "exec")

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Claim the one module."""
        del path, target
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the tree."""
        exec(self._code, vars(module))


def get_ready() -> None:
    """Import what is slow and not ours, and build one tiny model, so that children need not."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # Loading every plugin that is installed costs a child more than most tests do.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # The same examples for every mutant, and no time spent on a smaller one that fails too.
    hypothesis.settings.register_profile(
        "mutants",
        database=None,
        derandomize=True,
        deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    from safe_decode.testing.models import byte_tokenizer, tiny_model

    byte_tokenizer()
    tiny_model("llama")
    for name in ("scipy.stats", "sklearn.linear_model", "fastapi.testclient", "uvicorn"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # The tiny models come with the package; nothing of it that is mutated may be there.
    ready = {"safe_decode", "safe_decode.testing", "safe_decode.testing.models"}
    ready |= {"safe_decode.typing"}
    strays = [n for n in sys.modules if n.split(".")[0] == "safe_decode" and n not in ready]
    assert not strays, strays
    gc.collect()
    gc.freeze()  # or a child's collector would read, and so copy, every page of the parent


def run(tests: Sequence[str], *, fault: Fault | None = None, limit_s: float) -> MutantVerdict:
    """Run tests in a child until one fails.

    Args:
        tests: Arguments for pytest.
        fault: What is planted; None: nothing.
        limit_s: The child is ended behind so many seconds.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            _become(tests, out.fileno(), fault)
        status = _waited(child, started + limit_s)
        out.seek(0)
        shown = out.read()[-2000:]
    seconds = time.monotonic() - started
    if status is None:
        return MutantVerdict("timeout", seconds, shown)
    return MutantVerdict("survived" if status == 0 else "killed", seconds, shown)


def _become(tests: Sequence[str], out: int, fault: Fault | None) -> None:
    """Be the child; does not return."""
    code = 70
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(out, stream)
        if fault is not None:
            sys.meta_path.insert(0, _Planted(fault))
        import hypothesis
        import pytest

        hypothesis.settings.load_profile("mutants")
        quiet = ("-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider")
        # Hypothesis is imported by the parent: its own assertions are not rewritten.
        known = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
        code = int(pytest.main([*quiet, *known, "-p", "_hypothesis_pytestplugin", *tests]))
    except BaseException as error:  # whatever the fault does, the child ends here
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _waited(child: int, until: float) -> int | None:
    """Wait for a child; None where it had to be ended."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until:
            # What the child has started is ended with it: it leads a group of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)
