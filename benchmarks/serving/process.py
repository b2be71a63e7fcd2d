"""Servers for measurements, each in a process of its own.

`python -m benchmarks.serving.process ARGUMENTS` is `safe-decode serve ARGUMENTS`. With
`--without-guard` as the first one, hooks, probe and monitor are left out and all else stays:
the arm that says what they cost. With `--failing KIND`, every so many forwards one fails: raised,
or its logits are NaN. Only this module can start such servers.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import httpx2

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from safe_decode.session.session import Session

__all__ = ["Failure", "Served", "serving"]

Failure = Literal["raise", "nan"]
_FAILS_EACH = 97
"""Not a multiple of a batch's length, so that failures come at every place of an answer."""

_ROOT = Path(__file__).resolve().parents[2]


class Served:
    """A server that runs.

    Attributes:
        address: Where it listens.
        bundle: What its answers must be marked with.
    """

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self._process, self.address = process, address
        self.bundle = httpx2.get(f"{address}/healthz").headers["x-safe-decode-bundle"]

    def rss_mib(self) -> float:
        """Return its resident memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return round(int(found.group(1)) / 1024, 1)

    @property
    def has_ended(self) -> bool:
        """Say whether the process is gone."""
        return self._process.poll() is not None

    def metric(self, name: str) -> float:
        """Read one number of `/metrics`; 0 where nothing was counted yet."""
        for line in httpx2.get(f"{self.address}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        return 0.0

    def kill(self) -> None:
        """End it without a warning."""
        self._process.kill()
        self._process.wait(90)

    def terminate(self) -> None:
        """Tell it to end."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        return self._process.wait(90)


@contextmanager
def serving(
    *arguments: str, is_bare: bool = False, failing: Failure | None = None
) -> Iterator[Served]:
    """Run a server on a free port; it is ended on the way out.

    Args:
        *arguments: Of `safe-decode serve`.
        is_bare: Leave the guard out.
        failing: Let forwards fail in this way.
    """
    flags = ["--without-guard"] if is_bare else []
    flags += ["--failing", failing] if failing else []
    command = [sys.executable, "-m", "benchmarks.serving.process", *flags, "--port", "0"]
    with tempfile.TemporaryFile("w+") as screen:
        process = subprocess.Popen(
            [*command, *arguments],
            stderr=screen,
            cwd=_ROOT,
            env={**os.environ, "COLUMNS": "200"},
        )
        try:
            yield Served(process, _address(process, screen))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(90)


def _address(process: subprocess.Popen[bytes], screen: IO[str]) -> str:
    found = None
    while found is None:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.poll()} before it listened")
        time.sleep(0.1)
        screen.seek(0)
        found = re.search(r"http://\S+:\d+", screen.read())
    return found.group(0)


def _without_guard() -> None:
    """Leave out what is measured: no hook is installed, and the loop judges nothing."""
    from safe_decode.activations.tap import ActivationTap
    from safe_decode.engines.transformers.batch.engine import TransformersEngine
    from safe_decode.engines.transformers.loops.step import StepLoop

    real = StepLoop.__init__

    def blind(self: StepLoop, session: Session, **options: Any) -> None:  # noqa: ANN401 - StepLoop's
        real(self, session, **options)
        self._is_blind = True

    def nothing(self: ActivationTap) -> None:
        del self

    def sound(self: TransformersEngine) -> float:
        del self
        return 0.0

    StepLoop.__init__ = blind  # type: ignore[method-assign]
    ActivationTap._install = nothing  # type: ignore[method-assign]
    TransformersEngine.check = sound  # type: ignore[method-assign]


def _failing(kind: str) -> None:
    """Let one of every `_FAILS_EACH` forwards of the model's class fail."""
    from transformers import LlamaForCausalLM

    real, forwards = LlamaForCausalLM.forward, itertools.count(1)

    def forward(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:  # noqa: ANN401 - those of the method it replaces
        fails = next(forwards) % _FAILS_EACH == 0
        if fails and kind == "raise":
            raise RuntimeError("the engine fails, as it was asked to")
        output: CausalLMOutputWithPast = real(self, *args, **kwargs)
        if fails:
            assert output.logits is not None
            output.logits[:] = float("nan")
        return output

    LlamaForCausalLM.forward = forward  # type: ignore[method-assign]


def _main() -> None:
    import torch

    from safe_decode.cli.main import app

    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    if arguments[:1] == ["--without-guard"]:
        _without_guard()
        arguments = arguments[1:]
    if arguments[:1] == ["--failing"]:
        _failing(arguments[1])
        arguments = arguments[2:]
    app(["serve", *arguments])


if __name__ == "__main__":
    _main()
