"""What a directory tree says of KSM, as text."""

from pathlib import Path


def sysfs(root: Path, name: str) -> Path:
    return root / "sys/kernel/mm/ksm" / name


def everything(root: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in sysfs(root, "run").parent.iterdir()}


def plain(settings: dict[str, str]) -> dict[str, str]:
    """As the kernel takes them: `[none] scan-time` is `none`."""
    return {
        name: text.partition("[")[2].partition("]")[0] or text for name, text in settings.items()
    }
