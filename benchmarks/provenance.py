"""What a result names beside its figures, and how it gets into its file."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The commit of the checkout, marked where tracked files differ from it; "unknown" outside a checkout.

    Results do not count: a long run rewrites its own while it goes on.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False).stdout

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return (git("rev-parse", "--short=12", "HEAD").strip() or "unknown") + "-dirty" * bool(changed)


def versions(*names: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def save(told: dict[str, Any] | str, path: Path) -> None:
    """Write a result, or the text of one; moved into place, so that a run cut short leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = told if isinstance(told, str) else json.dumps(told, indent=1)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
