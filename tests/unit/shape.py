"""Measures of a source tree: long files and functions, wide signatures, imports, repetitions.

Each function takes a folder, and returns one line for each fault. Not here: which of them a
project allows itself (test_shape.py).
"""

from __future__ import annotations

import ast
import graphlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

#: Lines of a file; lines of a function; parameters; equal lines that are a repetition.
FILE_LINES, FUNCTION_LINES, PARAMETERS, EQUAL_LINES = 400, 50, 6, 10
#: Between these the median of all files should be.
MEDIAN = (100, 200)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(root: Path) -> list[Path]:
    """All source files, whatever their language."""
    return sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def long_files(root: Path) -> list[str]:
    """Files of more than FILE_LINES lines."""
    return [
        f"{path.relative_to(root)}: {count} lines"
        for path in files(root)
        if (count := _lines(path)) > FILE_LINES
    ]


def median(root: Path) -> float:
    """The median of the lines of Python files that hold code."""
    counts = [_lines(path) for path in files(root) if path.suffix == ".py"]
    # An __init__.py of a docstring is no place to look for code.
    return statistics.median(count for count in counts if count > 1)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def long_functions(root: Path) -> list[str]:
    """Functions of more than FUNCTION_LINES lines, decorators not counted."""
    return [
        f"{name}: {count} lines"
        for name, function in _functions(root)
        if (count := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES
    ]


def wide_functions(root: Path) -> list[str]:
    """Functions of more than PARAMETERS parameters, ``self`` and ``cls`` not counted.

    The one exception are functions that click calls: their parameters are a command's options.
    """
    return [
        f"{name}: {count} parameters"
        for name, function in _functions(root)
        if (count := _parameters(function)) > PARAMETERS and not _is_command(function)
    ]


def _functions(root: Path) -> Iterator[tuple[str, _Function]]:
    """("aio/host.py:Host.start", its tree) of each function."""
    for path in files(root):
        if path.suffix == ".py":
            tree = ast.parse(path.read_text())
            for name, function in _inside(tree, ""):
                yield f"{path.relative_to(root)}:{name}", function


def _inside(tree: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Function):
            yield prefix + node.name, node
        if isinstance(node, _Function | ast.ClassDef):
            yield from _inside(node, f"{prefix}{node.name}.")
        else:
            yield from _inside(node, prefix)


def _parameters(function: _Function) -> int:
    args = function.args
    found = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    names = [each.arg for each in found if each]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def _is_command(function: _Function) -> bool:
    calls = (each.func for each in function.decorator_list if isinstance(each, ast.Call))
    return any(ast.unparse(call) == "click.command" for call in calls)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below ``root`` ("" for the package itself) -> file."""
    found = {}
    for path in files(root):
        if path.suffix == ".py":
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> the modules of ``package`` that it imports, wherever in it, both by dotted name."""
    known = modules(root)
    found = {}
    for name, path in known.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            wanted |= {each for each in _imported(node, package, known) if each != name}
        found[name] = wanted
    return found


def _imported(node: ast.AST, package: str, known: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        top, _, rest = node.module.partition(".")
        if top == package:
            for alias in node.names:
                inner = f"{rest}.{alias.name}".lstrip(".")
                yield inner if inner in known else rest
    elif isinstance(node, ast.Import):
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            if top == package:
                yield rest


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle of imports, as the modules on the way, or nothing.

    The package itself is no part of one: each import of a module runs it first.
    """
    inner = {name: {each for each in wanted if each} for name, wanted in graph.items() if name}
    try:
        graphlib.TopologicalSorter(inner).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room(module: str, rooms: Iterable[str]) -> str:
    """The room of a module: the longest of ``rooms`` that is it, or holds it."""
    inside = (each for each in rooms if module == each or module.startswith(f"{each}."))
    return max(inside, key=len, default=module)


def upward_imports(
    graph: Mapping[str, Iterable[str]], layers: Sequence[Sequence[str]]
) -> list[str]:
    """Imports from one room of another that is not in a lower layer; and modules in no room."""
    level = {name: number for number, layer in enumerate(layers) for name in layer}
    faults = []
    for module, wanted in sorted(graph.items()):
        here = room(module, level)
        if here not in level:
            faults.append(f"{module} is in no room")
            continue
        for other in sorted(wanted):
            there = room(other, level)
            if there != here and level.get(there, len(layers)) >= level[here]:
                faults.append(f"{module} imports {other}")
    return faults


def repetitions(root: Path) -> list[str]:
    """Places where EQUAL_LINES lines of another place stand again.

    White space is folded; blank lines and imports do not count.
    """
    first: dict[tuple[str, ...], str] = {}
    faults = []
    for path in files(root):
        lines = list(_code(path))
        last = -1
        for start in range(len(lines) - EQUAL_LINES + 1):
            passage = lines[start : start + EQUAL_LINES]
            place = f"{path.relative_to(root)}:{passage[0][0]}"
            before = first.setdefault(tuple(text for _, text in passage), place)
            # Of a longer one each line begins another: it is told once.
            if before != place and start > last:
                faults.append(f"{place} repeats {before}")
                last = start + EQUAL_LINES
    return faults


def _code(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that count."""
    text = path.read_text()
    passed: set[int] = set()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                passed.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.splitlines(), 1):
        folded = " ".join(line.split())
        if folded and number not in passed:
            yield number, folded


def imports_of_tests(root: Path) -> list[str]:
    """Imports of test modules (test_*.py) by any module of the tests: what is shared is in kits."""
    return [
        f"{name} imports {other}"
        for name, wanted in sorted(imports(root, root.name).items())
        for other in sorted(wanted)
        if other.rpartition(".")[2].startswith("test_")
    ]
