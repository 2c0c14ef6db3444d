"""No path is ever part of a program's text: what a shell runs here are constants.

What varies goes by arguments or by the environment. Not here: odd stores (test_opening.py).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import onecopy

SOURCE = Path(onecopy.__file__).parent
SHELLS = {"sh", "bash", "dash", "/bin/sh", "/bin/bash"}
#: What users typed: a command of theirs, here or in a guest of theirs; and what is checked there.
TYPED = {
    ("subprocesses.py", "command"),
    ("guest/lifecycle/boot.py", "loop"),
    ("guest/lifecycle/boot.py", "script"),
}


def constants(module: ast.Module) -> set[str]:
    """Names that a module binds once, to text without anything put in."""
    found = set()
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            parts = list(ast.walk(node.value))
            if all(
                isinstance(part, ast.Constant | ast.BinOp | ast.Add)
                or (isinstance(part, ast.Name) and part.id in found)
                or isinstance(part, ast.Load)
                for part in parts
            ):
                found.add(node.targets[0].id)
    return found


def scripts(module: ast.AST) -> Iterator[ast.expr]:
    """What stands where a shell, or a hook of mmdebstrap's, takes a program's text."""
    for node in ast.walk(module):
        if isinstance(node, ast.List | ast.Tuple):
            words = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
            for place, word in enumerate(words[:-1]):
                is_shell = place and words[place - 1] in SHELLS
                if is_shell and isinstance(word, str) and word.startswith("-") and "c" in word:
                    yield node.elts[place + 1]
        elif isinstance(node, ast.JoinedStr):
            for before, value in zip(node.values, node.values[1:], strict=False):
                text = before.value if isinstance(before, ast.Constant) else ""
                if isinstance(text, str) and text.endswith("hook="):
                    assert isinstance(value, ast.FormattedValue)
                    yield value.value


def pasted(name: str, module: ast.Module) -> list[str]:
    """Places where a shell is given more than a constant."""
    known = constants(module)
    found = []
    for script in scripts(module):
        parts = ast.walk(script)
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        is_made = any(isinstance(part, ast.JoinedStr | ast.Call) for part in ast.walk(script))
        if (is_made or names - known) and not {(name, n) for n in names} & TYPED:
            found.append(f"{name}:{script.lineno}: {ast.unparse(script)}")
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and node.attr in ("system", "popen", "getoutput"):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in ("os", "subprocess"):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found.append(f"{name}:{node.value.lineno}: shell=")
    return found


def test_no_shell_is_given_a_path() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    seen = 0
    wrong = []
    for path in files:
        module = ast.parse(path.read_text())
        seen += len(list(scripts(module)))
        wrong += pasted(str(path.relative_to(SOURCE)), module)
    assert not wrong, "\n".join(wrong)
    assert seen


@pytest.mark.parametrize(
    "text",
    [
        'run(["sh", "-c", f"cd {path}"])',
        'run(["unshare", "bash", "-ec", "cd " + path])',
        'run(["sh", "-c", "cd %s" % path])',
        'run(["sh", "-c", "cd {}".format(path)])',
        'run([f"--customize-hook=cd {path}"])\nrun([f"--customize-hook={script}"])',
        "os.system(path)",
        "subprocess.run(path, shell=True)",
    ],
)
def test_what_it_finds(text: str) -> None:
    if "customize-hook=cd" in text:
        text = text.replace("customize-hook=cd {path}", "customize-hook={path}")
    assert pasted("x.py", ast.parse(text))


def test_what_it_lets_pass() -> None:
    text = '_A = "a"\n_B = _A + "b"\nrun(["sh", "-c", _A + _B, "sh", path])\nf"--x-hook={_B}"'
    assert not pasted("x.py", ast.parse(text))
