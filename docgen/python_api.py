"""The page of the Python API, from signatures and docstrings.

Docstrings are plain reStructuredText, with sections that end with a colon (Args, Returns,
Raises...) and have lines "NAME: text".
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest

import onecopy
from docgen.exit_codes import classes
from onecopy.aio.options import BootOptions, GuestBootOptions, StartOptions
from onecopy.errors import OnecopyError
from onecopy.guest.exec import Completed

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields|Source|Note|Example)s?:$")
_STARS: dict[object, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_HEAD = """# Python API

This page lists the public names. [From Python](../python.md) shows how to use them. `onecopy.aio`
has the same classes for asyncio: methods that wait are coroutines, and `with` is `async with`.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [_HEAD]
    for kind in (onecopy.Host, onecopy.Guest):
        parts += [f"## {kind.__name__}", document(inspect.getdoc(kind) or "")]
        parts += [_member(kind.__name__, name, each) for name, each in _members(kind)]
    parts += ["## Completed", document(inspect.getdoc(Completed) or ""), _fields(Completed)]
    for options in (StartOptions, GuestBootOptions, BootOptions):
        parts += [f"## {options.__name__}", document(inspect.getdoc(options) or "")]
        parts.append(_fields(options))
    parts += ["## Errors", _errors()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _members(kind: type) -> Iterator[tuple[str, object]]:
    for name, each in vars(kind).items():
        if not name.startswith("_") or (name == "__init__" and each.__doc__):
            yield name, each


def _member(owner: str, name: str, each: object) -> str:
    if isinstance(each, property):
        return f"### {owner}.{name}\n\n{document(inspect.getdoc(each) or '')}"
    assert callable(each), f"{owner}.{name}"
    title = owner if name == "__init__" else f"{owner}.{name}"
    call = f"```python\n{title}{_signature(each)}\n```"
    return f"### {title}()\n\n{call}\n\n{document(inspect.getdoc(each) or '')}"


def _signature(function: Callable[..., object]) -> str:
    found = inspect.signature(function)
    shown = list(_parameters(list(found.parameters.values())[1:]))
    after = _plain(found.return_annotation)
    after = after.replace("AbstractAsyncContextManager[", "ContextManager[")
    line = f"({', '.join(shown)}) -> {after}"
    if len(line) <= 70:
        return line
    return "(\n" + "".join(f"    {each},\n" for each in shown) + f") -> {after}"


def _parameters(parameters: list[inspect.Parameter]) -> Iterator[str]:
    star = False
    for each in parameters:
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            star = True
            yield "*"
        text = f"{_STARS.get(each.kind, '')}{each.name}: {_plain(each.annotation)}"
        yield (
            text if each.default is inspect.Parameter.empty else f"{text} = {_value(each.default)}"
        )


def _value(default: object) -> str:
    return "..." if callable(default) else repr(default)


def _plain(annotation: object) -> str:
    """Return a type as text, without the names of modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def _fields(kind: type) -> str:
    """Return a table of a class's fields, each with the string below it."""
    rows = [f"| `{name}` | `{type_}` | {text} |" for name, type_, text in _attributes(kind)]
    return "\n".join(["| Field | Type | Meaning |", "|---|---|---|", *rows])


def _attributes(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of each field, first of bases in the same file.

    This function reads the source, because a TypedDict has no bases at run time, and Python drops
    the strings below fields.
    """
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for base in map(ast.unparse, tree.bases):
        found = getattr(inspect.getmodule(kind), base, None)
        if inspect.isclass(found) and found.__module__ == kind.__module__:
            yield from _attributes(found)
    for each, after in zip_longest(tree.body, tree.body[1:]):
        if isinstance(each, ast.AnnAssign):
            yield ast.unparse(each.target), ast.unparse(each.annotation), _below(after)


def _below(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inline(" ".join(str(statement.value.value).split()))
    return ""


def _errors() -> str:
    base = document(inspect.getdoc(OnecopyError) or "")
    lines = ["### OnecopyError", "", base, "", "| Class | Exit code | Meaning |", "|---|---:|---|"]
    for each in classes():
        meaning = inline((each.__doc__ or "").splitlines()[0])
        lines.append(f"| `{each.__name__}` | {each.exit_code} | {meaning} |")
    return "\n".join(lines)


def document(text: str) -> str:
    """Return a docstring as Markdown."""
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        found = _SECTION.match(line)
        if found:
            section = found[0]
            lines += ["", f"**{section}**", ""]
        elif section and line.strip():
            lines.append(_entry(line))
        else:
            section = "" if line.strip() and not line.startswith(" ") else section
            lines.append(line if line.startswith("    ") else inline(line.replace("::", ":")))
    return "\n".join(lines).strip()


def _entry(line: str) -> str:
    """Return a line of a section: a new entry if indented once, else more of the last entry."""
    depth = len(line) - len(line.lstrip())
    name, colon, rest = line.strip().partition(": ")
    if depth > 4:
        return f"  {inline(line.strip())}"
    if colon and re.fullmatch(r"[\w.*, ]+", name):
        return f"- `{name}`: {inline(rest)}"
    return f"- {inline(line.strip())}" if depth == 4 else inline(line.strip())


def inline(text: str) -> str:
    """Return a line with ``code`` and `names` in Markdown."""
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(
        f"`{part.strip('`')}`" if part.startswith("`") else re.sub(r"([*_])", r"\\\1", part)
        for part in parts
    )
