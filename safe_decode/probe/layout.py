"""What a kind of probe stores and computes, written down as data.

The tensors have names and shapes; the arithmetic is a list of nodes, each an operator of ONNX.
So the same description checks a bundle's tensors, scores in NumPy and becomes an ONNX graph.

Knows names, shapes and NumPy. Does not know torch, onnx or which kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_decode.errors import ConfigurationError

__all__ = ["OPERATORS", "Node", "ProbeLayout"]

OPERATORS: Mapping[str, Callable[..., NDArray[Any]]] = {
    "Add": np.add,
    "MatMul": np.matmul,
    "Relu": lambda values: np.maximum(values, np.float32(0)),
    "Sub": np.subtract,
}
"""Operators of ONNX that a node may name, and what they are in NumPy."""
_FEATURES, _LOGITS, _HEADS = "features", "logits", "heads"


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        operator: A key of `OPERATORS`.
        inputs: Names of tensors, of earlier outputs, or `features`.
        output: The name of the result.
    """

    operator: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class ProbeLayout:
    """A kind of probe as data.

    Attributes:
        kind: Its name in the card of a bundle.
        implementation: Module and class in torch, as `module:Class`; imported when asked for.
        shapes: Dimensions of each tensor by name. `features` and `heads` are known from sites
            and heads; any other dimension is free, and the same wherever it is named.
        nodes: The arithmetic, in order: reads `features` [batch, F], ends in `logits` [batch, K].

    Raises:
        ConfigurationError: A node reads what nothing has written, names an unknown operator,
            writes a name twice, or the last one does not write `logits`.
    """

    kind: str
    implementation: str
    shapes: Mapping[str, tuple[str, ...]]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        known = {_FEATURES, *self.shapes}
        for node in self.nodes:
            missing = [name for name in node.inputs if name not in known]
            if missing or node.output in known or node.operator not in OPERATORS:
                raise ConfigurationError(
                    f"{node} of the kind {self.kind!r} must name one of {sorted(OPERATORS)}, read "
                    f"only {sorted(known)} and write a new name."
                )
            known.add(node.output)
        if not self.nodes or self.nodes[-1].output != _LOGITS:
            raise ConfigurationError(f"the last node of the kind {self.kind!r} must write logits.")

    def require_shapes(
        self, found: Mapping[str, tuple[int, ...]], *, n_features: int, n_heads: int
    ) -> None:
        """Check the shapes of a probe's tensors.

        Args:
            found: The shape of each tensor, by name.
            n_features: F.
            n_heads: K.

        Raises:
            ConfigurationError: A tensor is missing or too many, or a shape does not fit.
        """
        if set(found) != set(self.shapes):
            raise ConfigurationError(
                f"a probe of the kind {self.kind!r} has the tensors {list(self.shapes)}, got "
                f"{sorted(found)}; pass each of them once."
            )
        sizes = {_FEATURES: n_features, _HEADS: n_heads}
        for name, dimensions in self.shapes.items():
            for dimension, size in zip(dimensions, found[name], strict=False):
                sizes.setdefault(dimension, max(size, 1))
        wanted = {name: tuple(sizes.get(d, 1) for d in own) for name, own in self.shapes.items()}
        if any(tuple(found[name]) != wanted[name] for name in wanted):
            raise ConfigurationError(
                f"{_listed(found, self.shapes)} do not fit {n_features} features and {n_heads} "
                f"heads; pass {_listed(wanted, self.shapes)}."
            )

    def logits(
        self, tensors: Mapping[str, NDArray[Any]], features: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Compute logits in NumPy.

        Args:
            tensors: float32 arrays by name, of the shapes checked by `require_shapes`.
            features: [..., F]; read as float32.

        Returns:
            [..., K] float32. NaN and infinities in the features come out as not finite.
        """
        values: dict[str, NDArray[Any]] = {**tensors, _FEATURES: np.asarray(features, np.float32)}
        with np.errstate(invalid="ignore"):  # what is not finite is for the caller to judge
            for node in self.nodes:
                arguments = (values[name] for name in node.inputs)
                values[node.output] = OPERATORS[node.operator](*arguments)
        return values[_LOGITS]


def _listed(shapes: Mapping[str, tuple[int, ...]], order: Mapping[str, object]) -> str:
    *first, last = [f"{name} {tuple(shapes[name])}" for name in order]
    return f"{', '.join(first)} and {last}" if first else last
