"""Imports flow one way: ten packages in one order, and no circle between modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmft_hf

PACKAGE = Path(mmft_hf.__file__).parent
# From bottom to top. A package imports from those before it and from itself.
ORDER = ["core", "data", "model", "predict", "captioning", "hub", "train", "baselines", "benchmark", "commands"]
RANK = {name: rank for rank, name in enumerate(ORDER)}
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}


def name_of(parts: tuple[str, ...]) -> tuple[str, ...]:
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(parts: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of this package that one of them imports, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[parts].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        inside = parts[:-1]
        base = (*inside[: len(inside) - node.level + 1], *(node.module.split(".") if node.module else ()))
        for alias in node.names:
            module = (*base, alias.name)
            found.add(module if module in MODULES or (*module, "__init__") in MODULES else base)
    return found - {()}


def test_the_packages_are_ten():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages == set(ORDER)
    assert {parts[0] for parts in MODULES if len(parts) == 1} == {"__init__", "__main__", "cli", "version"}


def test_imports_flow_one_way():
    upward = [
        f"{'/'.join(parts)} imports {'.'.join(module)}"
        for parts in MODULES
        if parts[0] in RANK
        for module in imports(parts)
        if RANK.get(module[0], 0 if module[0] == "version" else len(ORDER)) > RANK[parts[0]]
    ]
    assert not upward


def test_no_module_imports_itself_by_way_of_others():
    graph = {name_of(parts): imports(parts) for parts in MODULES}
    done: set = set()

    def visit(module, path):
        if module in path:
            pytest.fail(" -> ".join(".".join(m) for m in (*path[path.index(module) :], module)))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_captioning_through_a_server_loads_neither_torch_nor_the_trainer():
    code = "import sys, mmft_hf.commands.caption.actions, mmft_hf.captioning.ask.backends.openai as _; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'mmft_hf.commands.caption.actions'" in loaded
    assert "'torch'" not in loaded and "'transformers.trainer'" not in loaded


def test_the_help_of_captioning_loads_no_datasets():
    code = "import sys, mmft_hf.commands.caption; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'mmft_hf.commands.caption'" in loaded and "'datasets'" not in loaded and "'torch'" not in loaded
