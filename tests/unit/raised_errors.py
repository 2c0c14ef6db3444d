"""Every error that the code makes, read from its syntax tree: which class, where, with what hint.

Not here: which of them may have no hint (test_errors.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Made(NamedTuple):
    """One place that makes an error."""

    where: str
    """File and function."""
    error: str
    """Name of its class."""
    hint: str
    """Its hint as the code has it, texts without quotes; "" if none is given."""


def made_errors(root: Path, classes: Iterable[str]) -> list[Made]:
    """Find the places below ``root`` that make an error of one of these classes, in order."""
    known = set(classes)
    return [
        Made(f"{path.relative_to(root)}:{where}", name, hint)
        for path in sorted(root.rglob("*.py"))
        for where, name, hint in _in(ast.parse(path.read_text()), known, "")
    ]


def _in(tree: ast.AST, known: set[str], where: str) -> Iterator[tuple[str, str, str]]:
    for node in ast.iter_child_nodes(tree):
        inner = where
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{where}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in known:
                hints = [each.value for each in node.keywords if each.arg == "hint"]
                yield where, name, _text(hints[0]) if hints else ""
        yield from _in(node, known, inner)


def _text(value: ast.expr) -> str:
    """A text without quotes, what is filled in between braces; all else as code."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        parts = (
            each.value if isinstance(each, ast.Constant) else f"{{{_filled(each)}}}"
            for each in value.values
        )
        return "".join(map(str, parts))
    return f"({ast.unparse(value)})"


def _filled(value: ast.expr) -> str:
    return ast.unparse(value.value) if isinstance(value, ast.FormattedValue) else "?"
