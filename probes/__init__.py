"""The workbench: how a probe bundle comes to be.

The public names are imported when they are first used, so that `import probes` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.activations.harvest import harvest
    from probes.calibration.certify import certify
    from probes.data.conversations import Conversation
    from probes.data.reader import read_conversations
    from probes.data.splits import prepared as prepare_splits
    from probes.evaluation.offline import evaluate_bundle
    from probes.export.onnx import export_onnx
    from probes.fitting.linear import FitConfig, LinearProbeFitter
    from probes.fitting.mlp import MLPFitConfig
    from probes.location.locate import LocateConfig, locate
    from probes.location.units import UnitSet
    from probes.recipes.bundle import RecipeConfig, make_bundle

_HOMES = {
    "Conversation": "data.conversations",
    "FitConfig": "fitting.linear",
    "LinearProbeFitter": "fitting.linear",
    "LocateConfig": "location.locate",
    "MLPFitConfig": "fitting.mlp",
    "RecipeConfig": "recipes.bundle",
    "UnitSet": "location.units",
    "certify": "calibration.certify",
    "evaluate_bundle": "evaluation.offline",
    "export_onnx": "export.onnx",
    "harvest": "activations.harvest",
    "locate": "location.locate",
    "make_bundle": "recipes.bundle",
    "prepare_splits": "data.splits",
    "read_conversations": "data.reader",
}
_OWN_NAMES = {"prepare_splits": "prepared"}
"""What a public name is called in its module, where that differs."""

__all__ = [
    "Conversation",
    "FitConfig",
    "LinearProbeFitter",
    "LocateConfig",
    "MLPFitConfig",
    "RecipeConfig",
    "UnitSet",
    "certify",
    "evaluate_bundle",
    "export_onnx",
    "harvest",
    "locate",
    "make_bundle",
    "prepare_splits",
    "read_conversations",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        home = importlib.import_module(f"probes.{_HOMES[name]}")
        return getattr(home, _OWN_NAMES.get(name, name))
    raise AttributeError(f"module 'probes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
