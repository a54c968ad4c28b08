"""Where a record comes from: code version, packages, hardware, threads."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "lm_eval",
    "reasoning_gym",
    "numpy",
    "scipy",
)


def provenance() -> dict[str, Any]:
    """Return git commit and dirty flag, package versions, hardware and thread count, as JSON values.

    The commit is None for an installed package without a repository.
    """
    return {**_fixed(), "threads": _threads()}


@functools.cache
def _fixed() -> dict[str, Any]:
    from peft_arena import __version__

    return {
        "peft_arena": __version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": versions(PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of packages by name, without those that are not installed."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def _threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask git about the source tree this package runs from; None outside a repository of ours."""
    here = Path(__file__).resolve().parent
    root = here.parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
