"""Install and try the Debian packages in clean roots of their releases: script/test-package.

``python -m tests.package.clean_root bookworm trixie``. mmdebstrap makes each root, apt installs the
package, and chroot(1) enters the root in namespaces of its own. There the README's commands
run in an empty directory, and the guests say who they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.console import Step, sessions, shows

PROJECT = Path(__file__).parents[2]
#: Suite -> the mark in the package's version.
RELEASES = {"bookworm": "~deb12", "trixie": "~deb13"}
#: Mounts what programs need, and enters the root.
_ENTER = """
set -e
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"  # unshare(1) wants / to be a mount point
mount -t proc proc "$ROOT/proc"
mount --rbind /sys "$ROOT/sys"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o mode=0755 run "$ROOT/run"
exec chroot "$ROOT" /usr/bin/env --ignore-environment HOME=/root LC_ALL=C.UTF-8 \\
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
    ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \\
    bash -c "$SCRIPT"
"""


def enter(root: Path, script: str) -> str:
    """Run a script of bash in the root; return what it prints. Raises AssertionError."""
    env = os.environ | {"ROOT": str(root), "SCRIPT": f"cd /root/empty\n{script}"}
    done = subprocess.run(
        # A PID namespace: what a failed script leaves behind ends with it.
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", _ENTER],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def make(suite: str, root: Path) -> None:
    """Make a clean root, and install the package in it."""
    (package,) = (PROJECT / "out/package").glob(f"onecopy_*{RELEASES[suite]}_amd64.deb")
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=apt", "--include=curl", suite, root], check=True
    )
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copy(package, root / "root/onecopy.deb")
    (root / "root/empty").mkdir()
    enter(
        root,
        "export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; "
        "apt-get install -qq --no-install-recommends ../onecopy.deb",
    )


def has_its_files(root: Path) -> None:
    """The package has manual pages and completion, and hides what it bundles."""
    for name in ("onecopy", "onecopy-run", "onecopy-ksm-on"):
        assert (root / f"usr/share/man/man1/{name}.1.gz").stat().st_size > 200, name
    assert "_ONECOPY_COMPLETE" in enter(root, "cat /usr/share/bash-completion/completions/onecopy")
    # The library of fork servers is not compiled on the host.
    enter(root, "! which gcc; test -s /usr/lib/onecopy/lib/*/*/onecopy/vmm/files/fork_server.so")
    said = enter(root, "! python3 -c 'import msgspec' 2>&1; onecopy --version")
    assert "No module named 'msgspec'" in said
    where = "import onecopy, numpy; print(onecopy.__file__, numpy.__file__)"
    said = enter(root, f'/usr/lib/onecopy/bin/python3 -I -c "{where}"')
    assert said.startswith("/usr/lib/onecopy/") and "/usr/lib/python3/" in said


#: Types a command and a tab in an interactive zsh, and prints what it shows.
_ZSH = """
zmodload zsh/zpty
zpty shell env TERM=dumb zsh -f -i
zpty -w shell "PS1='> '; autoload -Uz compinit; compinit -u -D; print RE''ADY"
zpty -r shell shown '*READY*'
zpty -n -w shell "$1"$'\\t'
zpty -r shell shown "*$2*"
print -r -- $shown
"""


def shells_complete(root: Path) -> None:
    """bash, zsh and fish load the package's completion by themselves, and complete a command."""
    enter(root, "apt-get install -qq --no-install-recommends bash-completion zsh fish")
    (root / "root/zsh").write_text(_ZSH)
    assert "onecopy save" in enter(root, "timeout 60 zsh -f ../zsh 'onecopy sav' 'onecopy save'")
    assert enter(root, "fish -c 'complete -C \"onecopy sav\"'").split()[0] == "save"
    bash = """
        . /usr/share/bash-completion/bash_completion; _completion_loader onecopy
        COMP_WORDS=(onecopy sav); COMP_CWORD=1; COMP_LINE='onecopy sav'; COMP_POINT=11
        _onecopy_completion onecopy sav onecopy; echo "${COMPREPLY[@]}"
    """
    assert enter(root, bash).split() == ["save"]


def the_readme_works(root: Path) -> None:
    """The README's commands work in one shell, and each guest says its own name.

    All of it is one entry: the guests' run directories lie on the tmpfs of that entry.
    """
    (session,) = sessions((PROJECT / "README.md").read_text())
    asked = [Step(f"onecopy exec web-{n} hostname", f"web-{n}\n") for n in range(1, 5)]
    forked = "".join(f"web-{n} true\n" for n in range(1, 5))
    asked.append(Step("onecopy ps --format '{{.name}} {{.forked}}'", forked))
    steps = [*session, *asked]
    mark = "=== step ==="
    lines = ["set -e", "trap 'onecopy stop --all >/dev/null' EXIT"]
    for step in steps:
        lines += [f"echo '{mark}'", step.command]
    said = enter(root, "\n".join(lines)).split(f"{mark}\n")[1:]
    assert len(said) == len(steps)
    for step, output in zip(steps, said, strict=True):
        assert shows(step.output, output), f"{step}\n{output}"
    assert enter(root, "ls -A") == ""


def goes_again(root: Path) -> None:
    """Removing the package leaves nothing of it."""
    enter(root, "apt-get purge -qq onecopy")
    assert not (root / "usr/lib/onecopy").exists()
    assert not (root / "usr/bin/onecopy").is_symlink()


def main(suites: list[str]) -> int:
    """Try the packages of these releases; return the exit code."""
    checks: tuple[Callable[[Path], None], ...] = (
        *(has_its_files, shells_complete, the_readme_works, goes_again),
    )
    for suite in suites:
        with tempfile.TemporaryDirectory(prefix="onecopy-root-", dir="/var/tmp") as work:
            root = Path(work) / "root"
            make(suite, root)
            print(f"{suite}: installed", flush=True)
            for check in checks:
                check(root)
                print(f"{suite}: {check.__name__.replace('_', ' ')}", flush=True)
    print(f"{len(suites)} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
