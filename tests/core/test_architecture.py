"""docs/architecture.md names modules, functions and classes that exist, and the packages in the order of the layer test."""

import ast
import re
from pathlib import Path

from test_layers import ORDER, PACKAGE

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")


def exists(name: str) -> bool:
    if "/" in name:
        return (PACKAGE / name).is_file()
    *module, last = name.split(".")
    if PACKAGE.joinpath(*module, last).with_suffix(".py").is_file():
        return True
    base = PACKAGE.joinpath(*module)
    file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    if not file.is_file():
        return False
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return last in {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_places_exist():
    (table,) = re.findall(r"## Where a question is answered\n(.*?)\n## ", PAGE, flags=re.DOTALL)
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    names = [name for cell in rows for name in re.findall(r"`([\w/]+[./][\w./]+)`", cell)]
    assert len(names) > 50 and [name for name in names if not exists(name)] == []


def test_packages_are_in_order():
    (table,) = re.findall(r"## Packages\n(.*?)\n## ", PAGE, flags=re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == ORDER
