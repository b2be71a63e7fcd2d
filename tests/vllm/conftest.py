"""Tests of the guard inside vLLM; each engine runs in a forked process of its own.

vLLM needs an environment of its own, which `.ci/vllm` builds. Its second model runner is tested
under Triton's interpreter, in a run of its own: `TRITON_INTERPRET=1`, with `triton_stub` on
PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.vllm.toys import Toy, make_toy

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    reason = "vLLM is not installed here; .ci/vllm builds its environment and runs these tests"
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def llama_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy("llama", Path(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session", params=FAMILIES)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(request.param, Path(tmp_path_factory.mktemp(request.param)))
