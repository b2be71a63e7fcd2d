"""Faults that are planted into a module, one at a time, as changes of its syntax tree.

Knows Python's syntax. Does not know tests, processes or results. What cannot change what a
program does is left alone: annotations, docstrings, decorators, `__all__`, assertions, and the
words of errors.

    comparison   <, <=, ==, is, in ... give way to their neighbour and to their opposite
    logic        and / or; `not` goes; a plain condition is negated
    arithmetic   + / -, * / /, //, %, **, & / |, and their assignments; a sign goes
    constant     an integer or a float grows, a truth value flips, a string is another one
    statement    a call, an assignment to an attribute or an item, a raise or a yield goes;
                 continue / break
    result       what a function returns becomes None
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Mutant", "mutants_of"]

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        place: Function in which it lies, dotted; "" for the module's own lines.
        before: The source of the statement's changed part, as `ast` writes it.
        after: What stands there instead.
        line: Line in the file.
        index: Counts mutants of one place that read alike.
        tree: The module with the fault.
    """

    place: str
    before: str
    after: str
    line: int
    index: int
    tree: ast.Module

    @property
    def name(self) -> str:
        """What tells it from the others, lines moved or not."""
        again = f" #{self.index + 1}" if self.index else ""
        return f"{self.place or 'module'}: {self.before} -> {self.after}{again}"


@dataclass(frozen=True)
class _Site:
    """Where a tree may change: a node, a field of its parent, and what takes its place."""

    place: str
    parent: ast.AST
    field: str
    at: int | None
    node: ast.AST
    replacement: ast.AST

    def put(self, node: ast.AST) -> None:
        if self.at is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.at] = node


def mutants_of(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, in the order of its lines.

    Each tree is good until the next is asked for.
    """
    tree = ast.parse(source)
    seen: dict[tuple[str, str, str], int] = {}
    for site in _Walk().sites(tree):
        before, after = _shown(site.node), _shown(site.replacement)
        key = (site.place, before, after)
        seen[key] = seen.get(key, -1) + 1
        site.put(site.replacement)
        # Line numbers stay those of the file, so that a traceback still reads right.
        ast.fix_missing_locations(ast.copy_location(site.replacement, site.node))
        yield Mutant(site.place, before, after, getattr(site.node, "lineno", 0), seen[key], tree)
        site.put(site.node)


class _Walk:
    """Finds the sites of a tree, and remembers in which function it is."""

    def __init__(self) -> None:
        self._place: list[str] = []

    def sites(self, node: ast.AST) -> Iterator[_Site]:
        """Yield the sites below a node."""
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named:
            self._place.append(node.name)  # type: ignore[attr-defined]
        for field, value in ast.iter_fields(node):
            if _is_spared(node, field):
                continue
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            for at, child in children:
                if not isinstance(child, ast.AST) or _is_silent(child):
                    continue
                for replacement in _replacements(node, field, child):
                    place = ".".join(self._place)
                    yield _Site(place, node, field, at, child, replacement)
                yield from self.sites(child)
        if named:
            self._place.pop()


def _is_spared(node: ast.AST, field: str) -> bool:
    """Say whether a field changes nothing, or no more than words."""
    if field in ("annotation", "returns", "decorator_list", "type_params", "bases"):
        return True
    return isinstance(node, ast.Raise)  # the statement goes whole, its words stay


def _is_silent(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring, or `...`
    if isinstance(node, ast.If) and _named(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and _named(node.targets[0]) == "__all__":
        return True
    return isinstance(node, ast.Call) and _named(node.func).endswith("Error")


def _named(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _replacements(parent: ast.AST, field: str, node: ast.AST) -> Iterator[ast.AST]:
    for kind in _OPERATORS:
        yield from kind(node)
    if field == "test" and isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(parent, ast.Return) and not _is_none(node):
        yield ast.Constant(None)


def _comparisons(node: ast.AST) -> Iterator[ast.AST]:
    for at, operator in enumerate(node.ops) if isinstance(node, ast.Compare) else ():
        for other in _COMPARISONS[type(operator)]:
            changed = copy.copy(node)
            changed.ops = [*node.ops[:at], other(), *node.ops[at + 1 :]]  # type: ignore[attr-defined]
            yield changed


def _logic(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BoolOp):
        changed = copy.copy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand


def _arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC:
        if isinstance(node, ast.BinOp) and (_is_text(node.left) or _is_text(node.right)):
            return
        changed = copy.copy(node)
        changed.op = _ARITHMETIC[type(node.op)]()
        yield changed


def _constants(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1)
    elif isinstance(value, str):
        yield ast.Constant(f"{value}~")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Raise | ast.Expr) or _sets_a_part(node):
        yield ast.Pass()


_OPERATORS: tuple[Callable[[ast.AST], Iterator[ast.AST]], ...] = (
    _comparisons,
    _logic,
    _arithmetic,
    _constants,
    _statements,
)


def _sets_a_part(node: ast.AST) -> bool:
    """Say whether a statement assigns to an attribute or an item; a name would only be missed."""
    return isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.AST) -> bool:
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_string or isinstance(node, ast.JoinedStr)


def _shown(node: ast.AST) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())
    return text if len(text) <= 90 else text[:87] + "..."
