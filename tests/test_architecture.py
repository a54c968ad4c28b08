"""No circles of imports, no long files, nothing heavy early; who may import whom is stated in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft_arena"


def circles(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Return the sets of modules that import each other in a circle."""
    return [sorted(one) for one in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(one) > 1]


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("peft_arena", cache_dir=None)  # late imports and those of types alone count
    edges = [(one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)]
    assert len(edges) > 1000, "no imports found: is the search path right?"
    assert circles(edges) == []
    assert circles([*edges, ("peft_arena.core.errors", "peft_arena.cli.app")]) != []


def test_no_file_is_long():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lines) > 500 and {name: count for name, count in lines.items() if count > 500} == {}


def test_no_package_holds_nothing():
    folders = [folder for folder in PACKAGE.rglob("*") if folder.is_dir() and any(folder.glob("*.py"))]
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def imported_by(code: str) -> str:
    """Return what a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_command_line_starts_without_heavy_libraries():
    heavy = "{'torch', 'polars', 'plotly', 'lm_eval', 'peft'}"
    assert imported_by(f"import peft_arena.cli.app, sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("registry", ["methods.registry:METHODS", "tasks.registry:TASKS"])
def test_every_registered_name_imports_without_torch(registry):
    module, _, name = registry.partition(":")
    code = (
        f"import sys; from peft_arena.{module} import {name} as registry;"
        "found = [registry.get(name) for name in registry.names()];"
        "print(len(found) > 10, 'torch' in sys.modules)"
    )
    assert imported_by(code) == "True False"
